"""SigLIP vision tower: image → visual tokens in the language model's width.

Patch embedding and position embedding are float32, the blocks run in the activation dtype (softmax included),
layer norms take their statistics in float32. The head's output is used as it is, unscaled.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from safe_pruner_jax.arrays import Array, dense
from safe_pruner_jax.model.config import Pi0Config


@struct.dataclass
class Affine:
    """A kernel [in, out] and a bias [out], or the scale and bias [D] of a layer norm."""

    w: Array
    b: Array


@struct.dataclass
class BlockWeights:
    """One encoder block: two layer norms, fused qkv [D, 3D], out [D, D], and the MLP."""

    norm1: Affine
    qkv: Affine
    out: Affine
    norm2: Affine
    up: Affine
    down: Affine


@struct.dataclass
class VisionWeights:
    """The tower: patch kernel [p·p·3, D], positions [grid², D], blocks, final norm, head [D, d]."""

    patch: Affine
    positions: Array
    blocks: tuple[BlockWeights, ...]
    norm: Affine
    head: Affine


def prepare(tree: dict, config: Pi0Config, dtype) -> VisionWeights:
    """Per-layer weights from openpi's `PaliGemma/img` subtree; pure and differentiable."""
    v = config.vision
    stack = tree["Transformer"]["encoderblock"]
    attn, mlp = stack["MultiHeadDotProductAttention_0"], stack["MlpBlock_0"]

    def block(i: int) -> BlockWeights:
        qkv = [attn[name] for name in ("query", "key", "value")]
        return BlockWeights(
            norm1=Affine(stack["LayerNorm_0"]["scale"][i], stack["LayerNorm_0"]["bias"][i]),
            qkv=Affine(
                jnp.concatenate([p["kernel"][i].reshape(v.width, -1) for p in qkv], axis=1).astype(dtype),
                jnp.concatenate([p["bias"][i].reshape(-1) for p in qkv]).astype(dtype),
            ),
            out=_affine(attn["out"]["kernel"][i].reshape(-1, v.width), attn["out"]["bias"][i], dtype),
            norm2=Affine(stack["LayerNorm_1"]["scale"][i], stack["LayerNorm_1"]["bias"][i]),
            up=_affine(mlp["Dense_0"]["kernel"][i], mlp["Dense_0"]["bias"][i], dtype),
            down=_affine(mlp["Dense_1"]["kernel"][i], mlp["Dense_1"]["bias"][i], dtype),
        )

    norm = tree["Transformer"]["encoder_norm"]
    return VisionWeights(
        patch=_affine(tree["embedding"]["kernel"].reshape(-1, v.width), tree["embedding"]["bias"], jnp.float32),
        positions=jnp.asarray(tree["pos_embedding"][0], jnp.float32),
        blocks=tuple(block(i) for i in range(v.depth)),
        norm=Affine(norm["scale"], norm["bias"]),
        head=_affine(tree["head"]["kernel"], tree["head"]["bias"], dtype),
    )


def _affine(w, b, dtype) -> Affine:
    return Affine(jnp.asarray(w, dtype), jnp.asarray(b, dtype))


def encode(w: VisionWeights, config: Pi0Config, images: Array) -> Array:
    """Visual tokens of a stack of images.

    Args:
      w: the prepared tower.
      config: sizes.
      images: [I, S, S, 3] RGB, uint8, or float32 already in [-1, 1].

    Returns:
      [I, grid², d] in the activation dtype, row-major over the patch grid.
    """
    p, g, dtype = config.vision.patch, config.grid, jnp.dtype(config.dtype)
    x = images.astype(jnp.float32) / 255.0 * 2.0 - 1.0 if images.dtype == jnp.uint8 else images
    x = x.reshape(-1, g, p, g, p, 3).transpose(0, 1, 3, 2, 4, 5).reshape(-1, g * g, p * p * 3)
    x = (_dense(x, w.patch) + w.positions).astype(dtype)
    for block in w.blocks:
        x = _block(block, x, config.vision.num_heads)
    return _dense(_layer_norm(x, w.norm), w.head)


def _block(w: BlockWeights, x: Array, heads: int) -> Array:
    I, S, D = x.shape
    hd = D // heads
    qkv = _dense(_layer_norm(x, w.norm1), w.qkv).reshape(I, S, 3, heads, hd)
    q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    # openpi rounds √head_dim to the activation dtype before dividing
    q = q / jnp.asarray(np.sqrt(hd), x.dtype)
    probs = jax.nn.softmax(jnp.einsum("iqnh,iknh->inqk", q, k), axis=-1)
    x = x + _dense(jnp.einsum("inqk,iknh->iqnh", probs, v).reshape(I, S, D), w.out)
    return x + _dense(jax.nn.gelu(_dense(_layer_norm(x, w.norm2), w.up)), w.down)


def _dense(x: Array, a: Affine) -> Array:
    return dense(x, a.w) + a.b


def _layer_norm(x: Array, a: Affine) -> Array:
    f = x.astype(jnp.float32)
    mean = f.mean(-1, keepdims=True)
    var = jnp.maximum((f * f).mean(-1, keepdims=True) - mean * mean, 0.0)
    return ((f - mean) * (jax.lax.rsqrt(var + 1e-6) * a.w) + a.b).astype(x.dtype)
