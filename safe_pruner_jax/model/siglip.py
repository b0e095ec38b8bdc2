"""SigLIP vision tower: image → visual tokens in the language model's width.

Patch embedding and position embedding are float32, the blocks run in the activation dtype (softmax included),
layer norms take their statistics in float32. The head's output is used as it is, unscaled.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from safe_pruner_jax.arrays import Array, beside
from safe_pruner_jax.model import kernels, vision_kernels
from safe_pruner_jax.model.config import Pi0Config
from safe_pruner_jax.model.matrix import dense
from safe_pruner_jax.model.params import by_layer, read


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


def prepare(tree: dict, config: Pi0Config, dtype: jnp.dtype) -> VisionWeights:
    """Per-layer weights from openpi's `PaliGemma/img` subtree; pure and differentiable."""
    v = config.vision
    stack = tree["Transformer"]["encoderblock"]
    attn, mlp = stack["MultiHeadDotProductAttention_0"], stack["MlpBlock_0"]

    def affine(part: dict, rows: int) -> list[Affine]:
        kernels = by_layer(lambda w: jnp.asarray(w, dtype).reshape(rows, -1), part["kernel"])
        biases = by_layer(lambda b: jnp.asarray(b, dtype), part["bias"])
        return list(map(Affine, kernels, biases))

    def qkv() -> list[Affine]:
        fuse = lambda *parts: jnp.concatenate([p.reshape(-1, v.width) for p in parts], axis=-1).astype(dtype)
        kernels, biases = (
            by_layer(fuse, *(attn[name][part] for name in ("query", "key", "value"))) for part in ("kernel", "bias")
        )
        return [Affine(w, b[0]) for w, b in zip(kernels, biases, strict=True)]

    wide = _wider(v.mlp_dim) - v.mlp_dim if "vision" in config.savings else 0
    pad = lambda a, *by: Affine(jnp.pad(a.w, ((0, by[1]), (0, by[0]))), jnp.pad(a.b, (0, by[0])))
    norms = lambda name: by_layer(Affine, stack[name]["scale"], stack[name]["bias"])
    blocks = zip(
        norms("LayerNorm_0"),
        qkv(),
        affine(attn["out"], v.width),
        norms("LayerNorm_1"),
        [pad(a, wide, 0) for a in affine(mlp["Dense_0"], v.width)],
        [pad(a, 0, wide) for a in affine(mlp["Dense_1"], v.mlp_dim)],
        strict=True,
    )
    norm = tree["Transformer"]["encoder_norm"]
    return VisionWeights(
        patch=_affine(tree["embedding"], jnp.float32, v.width),
        positions=jnp.asarray(read(tree["pos_embedding"])[0], jnp.float32),
        blocks=tuple(BlockWeights(*row) for row in blocks),
        norm=Affine(read(norm["scale"]), read(norm["bias"])),
        head=_affine(tree["head"], dtype, config.prefix.width),
    )


def _wider(width: int) -> int:
    """The next multiple of 128, where XLA splits and tiles a product without padding it at every call.

    New columns of `up` are 0, so gelu(0) = 0 meets new rows of `down` that are 0: nothing changes.

    >>> _wider(4304)
    4352
    """
    return -(-width // 128) * 128


def _affine(part: dict, dtype: jnp.dtype, columns: int) -> Affine:
    return Affine(jnp.asarray(read(part["kernel"]), dtype).reshape(-1, columns), jnp.asarray(read(part["bias"]), dtype))


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
    x = _dense(x, w.patch)
    x = (x + beside(w.positions, x)).astype(dtype)
    few = "vision" in config.savings
    attend = _attend_turned_once if few else _attend
    if kernels.VISION in config.kernels and vision_kernels.supports(config):
        attend = vision_kernels.attend
    for block in w.blocks:
        x = _block(block, x, config.vision.num_heads, few, attend)
    return _dense(_layer_norm(x, w.norm, few), w.head)


def _block(w: BlockWeights, x: Array, heads: int, few: bool, attend: Callable[[Array], Array]) -> Array:
    I, S, D = x.shape
    qkv = _dense(_layer_norm(x, w.norm1, few), w.qkv).reshape(I, S, 3, heads, D // heads)
    x = x + _dense(attend(qkv).reshape(I, S, D), w.out)
    return x + _dense(jax.nn.gelu(_dense(_layer_norm(x, w.norm2, few), w.up)), w.down)


def _attend(qkv: Array) -> Array:
    """Attention of every token to all of its image: qkv [I, S, 3, N, H] → [I, S, N, H]."""
    q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    # openpi rounds √head_dim to the activation dtype before dividing
    q = q / jnp.asarray(np.sqrt(qkv.shape[-1]), qkv.dtype)
    probs = jax.nn.softmax(jnp.einsum("iqnh,iknh->inqk", q, k), axis=-1)
    return jnp.einsum("inqk,iknh->iqnh", probs, v)


def _attend_turned_once(qkv: Array) -> Array:
    """`_attend` with one transposition of q, k and v together, where XLA makes one of each.

    Images and heads are one axis, of which the product takes its left side as it reads it.
    """
    I, S, _, N, H = qkv.shape
    by = jnp.asarray([np.sqrt(H), 1.0, 1.0], qkv.dtype).reshape(3, 1, 1, 1, 1)
    turned = jax.lax.optimization_barrier(qkv.transpose(2, 0, 3, 1, 4) / by).reshape(3 * I * N, S, H)
    q, k, v = (turned[i * I * N : (i + 1) * I * N] for i in range(3))
    probs = jax.nn.softmax(jnp.einsum("xqh,xkh->xqk", q, k), axis=-1)
    return jnp.einsum("xqk,xkh->xqh", probs, v).reshape(I, N, S, H).swapaxes(1, 2)


def _dense(x: Array, a: Affine) -> Array:
    y = dense(x, a.w)
    return y + beside(a.b, y)


def _layer_norm(x: Array, a: Affine, few: bool = False) -> Array:
    """Statistics in float32; `few`: the variance of what is left of the mean, which XLA makes one launch of."""
    f = x.astype(jnp.float32)
    mean = f.mean(-1, keepdims=True)
    if few:
        f = f - mean
        var = (f * f).mean(-1, keepdims=True)
        return (f * (jax.lax.rsqrt(var + 1e-6) * beside(a.w, f)) + beside(a.b, f)).astype(x.dtype)
    var = jnp.maximum((f * f).mean(-1, keepdims=True) - mean * mean, 0.0)
    return ((f - mean) * (jax.lax.rsqrt(var + 1e-6) * beside(a.w, f)) + beside(a.b, f)).astype(x.dtype)
