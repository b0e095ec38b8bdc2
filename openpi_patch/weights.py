"""openpi's NNX model → this package's sizes and weights, on the arrays that the model holds."""

import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util

from safe_pruner_jax.engine.xla import upright
from safe_pruner_jax.model import pi0
from safe_pruner_jax.model.config import GemmaConfig, Pi0Config, SiglipConfig
from safe_pruner_jax.model.params import Params, spec


class PatchError(ValueError):
    """A policy that cannot be pruned; the text says why and what to do."""


def parameters(model: Any) -> Params:
    """The model's parameters in openpi's tree: the very arrays it holds, nothing is copied.

    Args:
      model: openpi's `Pi0`, any `flax.nnx` module with its parameter paths.
    """
    state = nnx.state(model, nnx.Param)
    with warnings.catch_warnings(action="ignore"):  # State.to_pure_dict moved within flax
        return nnx.to_pure_dict(state) if hasattr(nnx, "to_pure_dict") else state.to_pure_dict()


def sizes(model: Any, params: Params) -> Pi0Config:
    """The sizes of a model, read off its parameters and attributes.

    Raises:
      PatchError: not a π0 or π0.5 flow model, or one with parameters (LoRA) that are not served here.
    """
    flat = {path: leaf.shape for path, leaf in traverse_util.flatten_dict(params, sep="/").items()}
    llm, img = "PaliGemma/llm", "PaliGemma/img/Transformer/encoderblock"
    try:
        config = Pi0Config(
            pi05="time_mlp_in/kernel" in flat,
            prefix=_gemma(flat, f"{llm}/layers", ""),
            expert=_gemma(flat, f"{llm}/layers", "_1"),
            vision=SiglipConfig(
                width=flat["PaliGemma/img/embedding/kernel"][-1],
                depth=flat[f"{img}/MlpBlock_0/Dense_0/kernel"][0],
                mlp_dim=flat[f"{img}/MlpBlock_0/Dense_0/kernel"][2],
                num_heads=flat[f"{img}/MultiHeadDotProductAttention_0/query/kernel"][2],
                patch=flat["PaliGemma/img/embedding/kernel"][0],
            ),
            vocab_size=flat[f"{llm}/embedder/input_embedding"][0],
            action_dim=int(model.action_dim),
            action_horizon=int(model.action_horizon),
            max_token_len=int(model.max_token_len),
            image_size=math.isqrt(flat["PaliGemma/img/pos_embedding"][1]) * flat["PaliGemma/img/embedding/kernel"][0],
            dtype=_activations(model, params),
        )
    except (KeyError, AttributeError) as error:
        raise PatchError(
            f"expected openpi's π0 or π0.5 in JAX, got {type(model).__name__} without {error}; "
            "π0-FAST and PyTorch models have no flow expert in JAX: serve them with openpi"
        ) from error
    expected = {path: shape for path, (shape, _, _) in spec(config).items()}
    wrong = sorted(path for path in flat.keys() | expected.keys() if flat.get(path) != expected.get(path))
    if wrong:
        raise PatchError(
            f"expected the parameters of {'π0.5' if config.pi05 else 'π0'}, got others at {', '.join(wrong[:4])}"
            f"{' …' if len(wrong) > 4 else ''}; merge LoRA weights into the base weights first"
        )
    return config


def _gemma(flat: dict[str, tuple[int, ...]], layers: str, suffix: str) -> GemmaConfig:
    depth, heads, width, head_dim = flat[f"{layers}/attn/q_einsum{suffix}/w"]
    kv_heads = flat[f"{layers}/attn/kv_einsum{suffix}/w"][2]
    return GemmaConfig(width, depth, flat[f"{layers}/mlp{suffix}/linear"][1], heads, kv_heads, head_dim)


def _activations(model: Any, params: Params) -> str:
    """The model's activation dtype: what openpi gave its language model, else that of the parameters."""
    llm = model.PaliGemma.llm if hasattr(model.PaliGemma, "llm") else model.PaliGemma["llm"]
    for name in ("module", "to_nnx__module"):  # flax renamed it
        if (dtype := getattr(getattr(llm, name, None), "embed_dtype", None)) is not None:
            return str(jnp.dtype(dtype))
    return str(params["PaliGemma"]["llm"]["embedder"]["input_embedding"].dtype)


def weights_of(params: Params, config: Pi0Config, num_steps: int) -> pi0.Weights:
    """Prepared weights. Leaves that need no other layout (embedding, projections, norms) share the model's buffers."""
    return jax.tree.map(jnp.asarray, pi0.prepare(params, config, num_steps=num_steps, upright=upright(config.dtype)))


def shared(params: Params, weights: pi0.Weights) -> list[str]:
    """Paths of the parameters whose buffer the weights use, sorted."""
    used = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(weights)}
    flat = traverse_util.flatten_dict(params, sep="/")
    return sorted(path for path, leaf in flat.items() if leaf.unsafe_buffer_pointer() in used)


def release(params: Params, weights: pi0.Weights) -> int:
    """Frees the model's buffers that the weights do not use; the model cannot run any more. Returns bytes freed."""
    keep, freed = set(shared(params, weights)), 0
    jax.block_until_ready(weights)
    for path, leaf in traverse_util.flatten_dict(params, sep="/").items():
        if path not in keep:
            freed += leaf.nbytes
            leaf.delete()
    return freed
