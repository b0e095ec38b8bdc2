"""A checkpoint made ready to run: per-layer fused weights, and the schedule of the sampler.

weights = prepare(params, config)                     once per checkpoint: split, fuse, precompute
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from safe_pruner_jax.arrays import Array, beside
from safe_pruner_jax.model import gemma, siglip
from safe_pruner_jax.model.config import Pi0Config
from safe_pruner_jax.model.params import Params, by_layer, read


@struct.dataclass
class Schedule:
    """Everything about the flow times t_0..t_{s-1} that does not depend on the observation.

    Args:
      times: [s] float32 flow times, 1 is noise and 0 is data.
      cond: [s, W] the condition of the adaptive norms (π0.5), else None.
      mods: per layer `Modulation` of [s, 3W] (π0.5), or with the saving "stacked" `Stacked` [s, L+1, 2, 3, W], behind
        the layers the final norm twice; else None.
      final: [s, 3W] modulation of the final norm (π0.5, if not stacked), else None; see `last`.
      mix: [s, W] what time adds to every action token (π0), else None.
    """

    times: Array
    cond: Array | None
    mods: tuple[gemma.Modulation, ...] | gemma.Stacked | None
    final: Array | None
    mix: Array | None

    @property
    def last(self) -> Array | gemma.Stacked | None:
        """Modulation of the final norm, wherever it lies."""
        return gemma.Stacked(self.mods.values[..., -1, 0, :, :]) if isinstance(self.mods, gemma.Stacked) else self.final

    @property
    def first_mods(self) -> tuple[gemma.Modulation, ...] | gemma.Stacked | None:
        """`mods` at the first flow time; `Stacked` ones are the first of [s·(L+1), 2, 3, W], which takes no copy."""
        if isinstance(self.mods, gemma.Stacked):
            values = self.mods.values
            return gemma.Stacked(values.reshape(-1, *values.shape[-3:]))
        return jax.tree.map(lambda a: a[0], self.mods)


@struct.dataclass
class Weights:
    """A checkpoint, ready to run: per-layer fused weights and the schedule of the sampler."""

    vision: siglip.VisionWeights
    embedding: Array
    prefix: tuple[gemma.LayerWeights, ...]
    expert: tuple[gemma.LayerWeights, ...]
    final_gain: Array | None
    prefix_gain: Array
    action_in: siglip.Affine
    action_out: siglip.Affine
    state: siglip.Affine | None
    mixer: tuple[Array, siglip.Affine] | None
    schedule: Schedule


def euler_times(num_steps: int) -> np.ndarray:
    """Flow times [s] of the sampler, accumulated in float32 as openpi does: 1, 0.9, 0.79999995, …"""
    times, t, dt = [], np.float32(1.0), np.float32(-1.0 / num_steps)
    for _ in range(num_steps):
        times.append(t)
        t = np.float32(t + dt)
    return np.array(times, np.float32)


def time_embedding(times: Sequence[float] | np.ndarray | Array, width: int) -> np.ndarray | Array:
    """[sin, cos] of 2πt/period with periods 4e-3·1000^frac, frac = linspace(0, 1, W/2).

    The angle reaches 1571 rad, where float32 is off by 1e-4: known times are evaluated in float64 and rounded once.

    Args:
      times: [s] flow times; a jax array (training draws them) is evaluated in float32.
      width: W, even.

    Returns:
      [s, W] float32, all sines first.
    """
    period = 4e-3 * 1000.0 ** np.linspace(0.0, 1.0, width // 2)
    if isinstance(times, jax.Array):
        angle = times[:, None] * (2 * np.pi / period).astype(np.float32)[None]
        return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
    angle = 2 * np.pi * np.asarray(times, np.float64)[:, None] / period
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=-1).astype(np.float32)


def prepare(params: Params, config: Pi0Config, *, num_steps: int = 10, upright: bool = False) -> Weights:
    """Inference weights from openpi's parameter tree: pure and differentiable.

    Stacked layers are split, so that no step slices a stack; q, k, v and gate, up are fused; matrices that
    compute in the activation dtype are cast to it; time embedding and adaptive norms of all denoise steps are
    evaluated. Leaves are read one after the other and only once: of a tree that is still on disk
    (`checkpoint.open_params`) there is in memory what becomes of it, and one leaf.

    Args:
      params: the tree of `param_shapes(config)`, any float dtype.
      config: sizes.
      num_steps: denoise steps the sampler will take.
      upright: store the language model's widest matrices for XLA's CPU product (`gemma.upright_mlp`).

    Returns:
      Weights for every function of this module.
    """
    dtype = jnp.dtype(config.dtype)
    llm, img = params["PaliGemma"]["llm"], params["PaliGemma"]["img"]
    affine = lambda name: siglip.Affine(*(jnp.asarray(read(params[name][part])) for part in ("kernel", "bias")))
    mixer = None
    if not config.pi05:
        first = affine("action_time_mlp_in")
        mixer = (first.w[: config.expert.width], affine("action_time_mlp_out"))
    return Weights(
        prefix=gemma.prepare_layers(llm["layers"], config.prefix, "", dtype, upright),  # the largest leaf first
        embedding=jnp.asarray(read(llm["embedder"]["input_embedding"])),
        vision=siglip.prepare(img, config, dtype),
        expert=gemma.prepare_layers(llm["layers"], config.expert, "_1", dtype),
        final_gain=None if config.pi05 else 1 + jnp.asarray(read(llm["final_norm_1"]["scale"]), jnp.float32),
        prefix_gain=1 + jnp.asarray(read(llm["final_norm"]["scale"]), jnp.float32),
        action_in=affine("action_in_proj"),
        action_out=affine("action_out_proj"),
        state=None if config.pi05 else affine("state_proj"),
        mixer=mixer,
        schedule=schedule(params, config, euler_times(num_steps)),
    )


def schedule(params: Params, config: Pi0Config, times: Sequence[float] | np.ndarray | Array) -> Schedule:
    """The schedule of given flow times [s], see `Schedule`."""
    times = times if isinstance(times, jax.Array) else np.asarray(times, np.float32)
    emb = jnp.asarray(time_embedding(times, config.expert.width))

    def dense(name: str, x: Array) -> Array:
        y = x @ read(params[name]["kernel"])
        return y + beside(read(params[name]["bias"]), y)

    if not config.pi05:
        first = params["action_time_mlp_in"]
        mix = emb @ read(first["kernel"])[config.expert.width :]
        mix = mix + beside(read(first["bias"]), mix)
        return Schedule(jnp.asarray(times), None, None, None, mix)
    cond = jax.nn.swish(dense("time_mlp_out", jax.nn.swish(dense("time_mlp_in", emb))))
    dtype = jnp.dtype(config.dtype)

    def modulate(kernel: Array, bias: Array) -> Array:
        y = cond.astype(dtype) @ kernel.astype(dtype)
        return y + beside(bias.astype(dtype), y)

    llm = params["PaliGemma"]["llm"]
    attn, mlp, last = (
        (norm["Dense_0"]["kernel"], norm["Dense_0"]["bias"])
        for norm in (llm["layers"]["pre_attention_norm_1"], llm["layers"]["pre_ffw_norm_1"], llm["final_norm_1"])
    )
    mods = tuple(map(gemma.Modulation, by_layer(modulate, *attn), by_layer(modulate, *mlp)))
    final = modulate(*map(read, last))
    if "stacked" in config.savings:
        norms = [(m.attn, m.mlp) for m in mods] + [(final, final)]
        rows = [jnp.stack([_widened(a), _widened(b)], axis=-3) for a, b in norms]
        return Schedule(jnp.asarray(times), cond, gemma.Stacked(jnp.stack(rows, -4)), None, None)
    return Schedule(jnp.asarray(times), cond, mods, final, None)


def _widened(mod: Array) -> Array:
    """scale, shift, gate [..., 3W] → 1 + scale, shift, gate [..., 3, W] float32, as `gemma.rms_norm` computes it."""
    parts = mod.reshape(*mod.shape[:-1], 3, -1).astype(jnp.float32)
    return parts.at[..., 0, :].add(1.0)
