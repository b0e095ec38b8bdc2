"""openpi's parameter tree: names, shapes, initialisers.

The tree is a nested dict with openpi's path components. Layer weights of all layers are stacked on a
leading axis; names ending in `_1` belong to the action expert.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from safe_pruner_jax.model.config import GemmaConfig, Pi0Config

Params = dict[str, Any]
"""Nested dict of arrays with openpi's path components as keys; leaves may still be on disk (`checkpoint.Stored`)."""

Spec = tuple[tuple[int, ...], float, float]
"""Shape of a leaf, and the mean and standard deviation it is drawn with."""


def read(leaf: Any) -> Any:
    """The array of a leaf; one that is still on disk is read, and nobody keeps it but the caller."""
    return leaf.read() if hasattr(leaf, "read") else leaf


def by_layer(make: Callable[..., Any], *leaves: Any) -> list[Any]:
    """`make` of each layer's entry of stacked leaves [L, ...]. The stacks are gone when it returns."""
    return [make(*entries) for entries in zip(*map(read, leaves), strict=True)]


def _weights(shape: tuple[int, ...], *fan_in: int) -> Spec:
    """A matrix whose outputs keep unit variance; `fan_in` are the axes it sums over."""
    return shape, 0.0, math.prod(shape[axis] for axis in fan_in) ** -0.5


def _zeros(*shape: int) -> Spec:
    return shape, 0.0, 0.0


def _ones(*shape: int) -> Spec:
    return shape, 1.0, 0.0


def _gemma_spec(c: GemmaConfig, suffix: str, adaptive: bool) -> dict[str, Spec]:
    L, D, F, N, K, H = c.depth, c.width, c.mlp_dim, c.num_heads, c.num_kv_heads, c.head_dim
    spec = {
        f"layers/attn/q_einsum{suffix}/w": _weights((L, N, D, H), 2),
        f"layers/attn/kv_einsum{suffix}/w": _weights((L, 2, K, D, H), 3),
        f"layers/attn/attn_vec_einsum{suffix}/w": _weights((L, N, H, D), 1, 2),
        f"layers/mlp{suffix}/gating_einsum": _weights((L, 2, D, F), 2),
        f"layers/mlp{suffix}/linear": _weights((L, F, D), 1),
    }
    for norm, lead in (
        (f"layers/pre_attention_norm{suffix}", (L,)),
        (f"layers/pre_ffw_norm{suffix}", (L,)),
        (f"final_norm{suffix}", ()),
    ):
        if adaptive:
            spec[f"{norm}/Dense_0/kernel"] = ((*lead, D, 3 * D), 0.0, 0.02)
            spec[f"{norm}/Dense_0/bias"] = _zeros(*lead, 3 * D)
        else:
            spec[f"{norm}/scale"] = _zeros(*lead, D)
    return {f"PaliGemma/llm/{k}": v for k, v in spec.items()}


def _vision_spec(c: Pi0Config) -> dict[str, Spec]:
    v, L, D = c.vision, c.vision.depth, c.vision.width
    hd = D // v.num_heads
    block = "Transformer/encoderblock"
    attn = f"{block}/MultiHeadDotProductAttention_0"
    spec = {
        "embedding/kernel": _weights((v.patch, v.patch, 3, D), 0, 1, 2),
        "embedding/bias": _zeros(D),
        "pos_embedding": ((1, c.tokens_per_camera, D), 0.0, D**-0.5),
        f"{block}/MlpBlock_0/Dense_0/kernel": _weights((L, D, v.mlp_dim), 1),
        f"{block}/MlpBlock_0/Dense_0/bias": _zeros(L, v.mlp_dim),
        f"{block}/MlpBlock_0/Dense_1/kernel": _weights((L, v.mlp_dim, D), 1),
        f"{block}/MlpBlock_0/Dense_1/bias": _zeros(L, D),
        f"{attn}/out/kernel": _weights((L, v.num_heads, hd, D), 1, 2),
        f"{attn}/out/bias": _zeros(L, D),
        "Transformer/encoder_norm/scale": _ones(D),
        "Transformer/encoder_norm/bias": _zeros(D),
        "head/kernel": _weights((D, c.prefix.width), 0),
        "head/bias": _zeros(c.prefix.width),
    }
    for name in ("query", "key", "value"):
        spec[f"{attn}/{name}/kernel"] = _weights((L, D, v.num_heads, hd), 1)
        spec[f"{attn}/{name}/bias"] = _zeros(L, v.num_heads, hd)
    for norm in ("LayerNorm_0", "LayerNorm_1"):
        spec[f"{block}/{norm}/scale"] = _ones(L, D)
        spec[f"{block}/{norm}/bias"] = _zeros(L, D)
    return {f"PaliGemma/img/{k}": s for k, s in spec.items()}


def _dense_spec(name: str, d_in: int, d_out: int) -> dict[str, Spec]:
    return {f"{name}/kernel": _weights((d_in, d_out), 0), f"{name}/bias": _zeros(d_out)}


def spec(c: Pi0Config) -> dict[str, Spec]:
    """Flat `path -> (shape, mean, standard deviation)` in sorted order."""
    A, W = c.action_dim, c.expert.width
    leaves = _vision_spec(c) | _gemma_spec(c.prefix, "", False) | _gemma_spec(c.expert, "_1", c.pi05)
    leaves["PaliGemma/llm/embedder/input_embedding"] = ((c.vocab_size, c.prefix.width), 0.0, 0.02)
    leaves |= _dense_spec("action_in_proj", A, W) | _dense_spec("action_out_proj", W, A)
    if c.pi05:
        leaves |= _dense_spec("time_mlp_in", W, W) | _dense_spec("time_mlp_out", W, W)
    else:
        leaves |= _dense_spec("state_proj", A, W)
        leaves |= _dense_spec("action_time_mlp_in", 2 * W, W) | _dense_spec("action_time_mlp_out", W, W)
    return dict(sorted(leaves.items()))


def init_params(key: jax.Array, config: Pi0Config) -> Params:
    """Random float32 parameters in openpi's tree.

    Deviations from openpi: plain normal draws everywhere, and SigLIP's head is not zero, so that the visual tokens of
    an untrained model differ from one another.

    Every leaf shape compiles a draw of its own, which takes a CPU about a minute; `draw_params` does without.

    Args:
      key: a PRNG key.
      config: sizes.

    Returns:
      Nested dict of float32 arrays; `flax.traverse_util.flatten_dict(…, sep="/")` gives openpi's paths.
    """
    leaves = spec(config)
    keys = jax.random.split(key, len(leaves))
    flat = {
        path: mean + std * jax.random.normal(k, shape, jnp.float32) if std else jnp.full(shape, mean, jnp.float32)
        for (path, (shape, mean, std)), k in zip(leaves.items(), keys, strict=True)
    }
    return traverse_util.unflatten_dict(flat, sep="/")


def draw_params(config: Pi0Config, seed: int = 0) -> Params:
    """The same kind of parameters from a seeded NumPy generator, leaf by leaf: float32, and nothing is compiled."""
    rng = np.random.default_rng(seed)
    leaves = {
        path: (mean + std * rng.standard_normal(shape)).astype(np.float32)
        for path, (shape, mean, std) in spec(config).items()
    }
    return traverse_util.unflatten_dict(leaves, sep="/")


def param_shapes(config: Pi0Config) -> Params:
    """The parameter tree as `jax.ShapeDtypeStruct` leaves (float32); nothing is allocated."""
    return jax.eval_shape(lambda k: init_params(k, config), jax.random.key(0))
