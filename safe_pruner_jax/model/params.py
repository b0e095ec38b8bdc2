"""openpi's parameter tree: names, shapes, initialisers.

The tree is a nested dict with openpi's path components. Layer weights of all layers are stacked on a
leading axis; names ending in `_1` belong to the action expert.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from safe_pruner_jax.model.config import GemmaConfig, Pi0Config

Params = dict[str, Any]
"""Nested dict of arrays with openpi's path components as keys."""

_lecun = jax.nn.initializers.lecun_normal
_normal = jax.nn.initializers.normal
_zeros = jax.nn.initializers.zeros
_ones = jax.nn.initializers.ones


def _einsum(in_axis, out_axis) -> Callable:
    return jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis, out_axis, batch_axis=(0,))


def _gemma_spec(c: GemmaConfig, suffix: str, adaptive: bool) -> dict[str, tuple]:
    L, D, F, N, K, H = c.depth, c.width, c.mlp_dim, c.num_heads, c.num_kv_heads, c.head_dim
    spec = {
        f"layers/attn/q_einsum{suffix}/w": ((L, N, D, H), _einsum(2, (1, 3))),
        f"layers/attn/kv_einsum{suffix}/w": ((L, 2, K, D, H), _einsum(3, (1, 2, 4))),
        f"layers/attn/attn_vec_einsum{suffix}/w": ((L, N, H, D), _einsum((1, 2), 3)),
        f"layers/mlp{suffix}/gating_einsum": ((L, 2, D, F), _einsum(2, (1, 3))),
        f"layers/mlp{suffix}/linear": ((L, F, D), _einsum(1, 2)),
    }
    for norm, lead in (
        (f"layers/pre_attention_norm{suffix}", (L,)),
        (f"layers/pre_ffw_norm{suffix}", (L,)),
        (f"final_norm{suffix}", ()),
    ):
        if adaptive:
            spec[f"{norm}/Dense_0/kernel"] = ((*lead, D, 3 * D), _normal(0.02))
            spec[f"{norm}/Dense_0/bias"] = ((*lead, 3 * D), _zeros)
        else:
            spec[f"{norm}/scale"] = ((*lead, D), _zeros)
    return {f"PaliGemma/llm/{k}": v for k, v in spec.items()}


def _vision_spec(c: Pi0Config) -> dict[str, tuple]:
    v, L, D = c.vision, c.vision.depth, c.vision.width
    hd = D // v.num_heads
    block = "Transformer/encoderblock"
    attn = f"{block}/MultiHeadDotProductAttention_0"
    spec = {
        "embedding/kernel": ((v.patch, v.patch, 3, D), _lecun(in_axis=(0, 1, 2), out_axis=3)),
        "embedding/bias": ((D,), _zeros),
        "pos_embedding": ((1, c.tokens_per_camera, D), _normal(D**-0.5)),
        f"{block}/MlpBlock_0/Dense_0/kernel": ((L, D, v.mlp_dim), _einsum(1, 2)),
        f"{block}/MlpBlock_0/Dense_0/bias": ((L, v.mlp_dim), _zeros),
        f"{block}/MlpBlock_0/Dense_1/kernel": ((L, v.mlp_dim, D), _einsum(1, 2)),
        f"{block}/MlpBlock_0/Dense_1/bias": ((L, D), _zeros),
        f"{attn}/out/kernel": ((L, v.num_heads, hd, D), _einsum((1, 2), 3)),
        f"{attn}/out/bias": ((L, D), _zeros),
        "Transformer/encoder_norm/scale": ((D,), _ones),
        "Transformer/encoder_norm/bias": ((D,), _zeros),
        "head/kernel": ((D, c.prefix.width), _lecun()),
        "head/bias": ((c.prefix.width,), _zeros),
    }
    for name in ("query", "key", "value"):
        spec[f"{attn}/{name}/kernel"] = ((L, D, v.num_heads, hd), _einsum(1, (2, 3)))
        spec[f"{attn}/{name}/bias"] = ((L, v.num_heads, hd), _zeros)
    for norm in ("LayerNorm_0", "LayerNorm_1"):
        spec[f"{block}/{norm}/scale"] = ((L, D), _ones)
        spec[f"{block}/{norm}/bias"] = ((L, D), _zeros)
    return {f"PaliGemma/img/{k}": s for k, s in spec.items()}


def _dense_spec(name: str, d_in: int, d_out: int) -> dict[str, tuple]:
    return {f"{name}/kernel": ((d_in, d_out), _lecun()), f"{name}/bias": ((d_out,), _zeros)}


def _spec(c: Pi0Config) -> dict[str, tuple]:
    """Flat `path -> (shape, initialiser)` in sorted order."""
    A, W = c.action_dim, c.expert.width
    spec = _vision_spec(c) | _gemma_spec(c.prefix, "", False) | _gemma_spec(c.expert, "_1", c.pi05)
    spec["PaliGemma/llm/embedder/input_embedding"] = ((c.vocab_size, c.prefix.width), _normal(0.02))
    spec |= _dense_spec("action_in_proj", A, W) | _dense_spec("action_out_proj", W, A)
    if c.pi05:
        spec |= _dense_spec("time_mlp_in", W, W) | _dense_spec("time_mlp_out", W, W)
    else:
        spec |= _dense_spec("state_proj", A, W)
        spec |= _dense_spec("action_time_mlp_in", 2 * W, W) | _dense_spec("action_time_mlp_out", W, W)
    return dict(sorted(spec.items()))


def init_params(key: jax.Array, config: Pi0Config) -> Params:
    """Random float32 parameters in openpi's tree.

    Deviation from openpi: SigLIP's head is not zero-initialised, so that an untrained model has visual
    tokens that differ from one another; a model to be trained from scratch does not mind.

    Args:
      key: a PRNG key.
      config: sizes.

    Returns:
      Nested dict of float32 arrays; `flax.traverse_util.flatten_dict(…, sep="/")` gives openpi's paths.
    """
    spec = _spec(config)
    keys = jax.random.split(key, len(spec))
    flat = {path: init(k, shape, jnp.float32) for (path, (shape, init)), k in zip(spec.items(), keys, strict=True)}
    return traverse_util.unflatten_dict(flat, sep="/")


def param_shapes(config: Pi0Config) -> Params:
    """The parameter tree as `jax.ShapeDtypeStruct` leaves (float32); nothing is allocated."""
    return jax.eval_shape(lambda k: init_params(k, config), jax.random.key(0))
