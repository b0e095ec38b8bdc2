"""Comparing this implementation with stored reference numbers.

    check_model("openpi_pi05_tiny.npz")                        openpi's own numbers on a small random model
    check_episode("openpi_pi05_tiny.npz", "safe_tiny.npz")     an independent NumPy oracle playing SAFE-Pruner

A model file holds `param/<path>`, `in/*` and `out*/<case>/*`, and a JSON beside it states sizes and cases; the
files of `tests/data` are described in its PROVENANCE.md. Everything is rebuilt from the two files.
"""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from safe_pruner_jax.engine.engine import Engine, StepInfo
from safe_pruner_jax.engine.programs import embed
from safe_pruner_jax.engine.state import ControlState, Inputs
from safe_pruner_jax.model import gemma, pi0
from safe_pruner_jax.model.config import GemmaConfig, Pi0Config, SiglipConfig
from safe_pruner_jax.model.params import Params
from safe_pruner_jax.pruners import PRUNERS, Pruner, forecast
from safe_pruner_jax.pruners.base import Evidence, Selection
from safe_pruner_jax.tokens import smallest_layout

NATIVE_TOLERANCE = 1e-4
"""openpi evaluates the time embedding in float32, where its angles of 1571 rad are off by 1e-4."""
EXACT_TOLERANCE = 1e-5
"""Against openpi with only that embedding evaluated in float64."""
BF16_FACTOR = 1.5
"""rms error of bfloat16 activations allowed, in units of openpi's own."""
BF16_RELATIVE = 0.02
"""rms of other bfloat16 quantities against openpi's bfloat16, in units of their standard deviation."""
EPISODE_TOLERANCE = {"kappa": 1e-4, "actions": 1e-4}
"""Absolute tolerances of an oracle episode; saliencies and scores 1e-6, choices exact."""


@dataclass(frozen=True)
class Row:
    """One compared quantity: largest and rms difference, what was tested, and against what limit."""

    case: str
    quantity: str
    max_abs: float
    rms: float
    measure: str
    limit: float

    @property
    def ok(self) -> bool:
        """The tested measure is within its limit (NaN is not)."""
        return (self.rms if self.measure == "rms" else self.max_abs) <= self.limit


@dataclass(frozen=True)
class Reference:
    """A model file: its sizes, parameters and stored arrays."""

    meta: dict
    arrays: Mapping[str, np.ndarray]
    config: Pi0Config
    params: Params

    def inputs(self, rows: slice) -> Inputs:
        """The stored inputs in openpi's own layout, every slot kept."""
        cameras = self.config.cameras
        take = lambda key: self.arrays[f"in/{key}"][rows]
        return Inputs(
            images=np.stack([take(f"image/{c}") for c in cameras], axis=1),
            camera_mask=np.stack([take(f"image_mask/{c}") for c in cameras], axis=1),
            tokens=take("tokenized_prompt"),
            token_mask=take("tokenized_prompt_mask"),
            state=take("state"),
        )

    def cases(self) -> dict[str, slice]:
        """Case name → rows of the stored inputs."""
        bounds = lambda text: map(int, re.fullmatch(r"inputs\[(\d+):(\d+)\]", text).groups())
        return {name: slice(*bounds(text)) for name, text in self.meta["batch_cases"].items()}


def load_reference(path: str | Path) -> Reference:
    """Reads a model file and the JSON beside it.

    Raises:
      FileNotFoundError: one of the two is missing.
      ValueError: the files are not of this kind.
    """
    path = Path(path)
    for needed in (path, path.with_suffix(".json")):
        if not needed.is_file():
            raise FileNotFoundError(f"expected {needed}: a reference is an npz and a json of the same name")
    meta = json.loads(path.with_suffix(".json").read_text())
    with np.load(path, allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files}
    params = {key.removeprefix("param/"): value for key, value in arrays.items() if key.startswith("param/")}
    missing = [k for k in ("model", "prefix_llm", "action_expert", "siglip", "batch_cases") if k not in meta]
    if missing or not params:
        raise ValueError(
            f"{path}: expected param/* arrays and the sizes in its json, got none of {missing or 'param/*'}"
        )
    v, cameras = meta["siglip"], tuple(meta["camera_order"])
    config = Pi0Config(
        pi05=meta["model"] == "pi05",
        prefix=GemmaConfig(**meta["prefix_llm"]),
        expert=GemmaConfig(**meta["action_expert"]),
        vision=SiglipConfig(v["width"], v["depth"], v["mlp_dim"], v["num_heads"], v["patch_size"][0]),
        vocab_size=meta["vocab_size"],
        action_dim=meta["action_dim"],
        action_horizon=meta["action_horizon"],
        max_token_len=meta["max_token_len"],
        image_size=arrays[f"in/image/{cameras[0]}"].shape[1],
        dtype=meta["dtype"],
        cameras=cameras,
    )
    return Reference(meta, arrays, config, traverse_util.unflatten_dict(params, sep="/"))


# --- the model ----------------------------------------------------------------------------------------------


def quantities(
    config: Pi0Config, num_steps: int, params: Params, inputs: Inputs, noise: jax.Array, x_half: jax.Array
) -> dict[str, jax.Array]:
    """Every quantity a model file stores, by its name there; one jit-able function."""
    weights = pi0.prepare(params, config, num_steps=num_steps)
    rows = embed(weights, config, inputs)
    hidden, segments, _ = pi0.prefix_layers(weights, config, rows, range(config.depth))
    prefix = pi0.Prefix(segments, rows.count)
    out = _prefix_quantities(config, weights, rows, hidden, segments)
    for name, t, x_t in (("t1", 1.0, noise), ("t05", 0.5, x_half)):
        at = jax.tree.map(lambda a: a[0], pi0.schedule(params, config, [t]))
        tokens = pi0.suffix_tokens(weights, config, inputs.state, x_t, at.mix)
        h, *_ = pi0.expert_layers(weights, config, tokens, prefix, at.mods)
        out[f"suffix_tokens_{name}"] = tokens
        out[f"suffix_out_{name}"] = gemma.rms_norm(h, weights.final_gain, at.last)[0]
        out[f"v_{name}"] = pi0.velocity(weights, config, prefix, inputs.state, x_t, at)[0]
        if config.pi05:
            out[f"adarms_cond_{name}"] = jnp.broadcast_to(at.cond, (x_t.shape[0], at.cond.shape[-1]))
    out["actions"], _ = pi0.sample(weights, config, prefix, inputs.state, noise)

    def euler(x: jax.Array, at: pi0.Schedule) -> tuple[jax.Array, jax.Array]:
        v, *_ = pi0.velocity(weights, config, prefix, inputs.state, x, at)
        x = x + (-1.0 / num_steps) * v
        return x, x

    _, out["traj_x"] = jax.lax.scan(euler, noise, weights.schedule)
    out["traj_t"] = weights.schedule.times
    return out


def _prefix_quantities(
    config: Pi0Config, weights: pi0.Weights, rows: pi0.Rows, hidden: jax.Array, segments: tuple[gemma.Segment, ...]
) -> dict[str, jax.Array]:
    """Those of them that the prefix alone decides; `hidden` are its rows before the last layer."""
    count, size = config.action_horizon + (not config.pi05), config.tokens_per_camera
    out = {f"image_tokens/{c}": rows.x[:, i * size : (i + 1) * size] for i, c in enumerate(config.cameras)}
    out |= {"prefix_tokens": rows.x, "prefix_pos": rows.positions, "prefix_mask": rows.mask}
    out["prefix_ar_mask"] = jnp.zeros(rows.mask.shape[1], bool)  # one bidirectional block
    out["suffix_pos"] = rows.count[:, None] + jnp.arange(count)[None]
    out["kv_k"] = jnp.stack([s.k for s in segments])
    out["kv_v"] = jnp.stack([s.v for s in segments])
    # inference never needs the last layer's output; the reference stores one row of it
    rotation = gemma.rope(rows.positions, config.prefix.head_dim)
    seen = rows.mask[:, :, None] & rows.mask[:, None, :]
    last, _, _ = gemma.layer(config.prefix, weights.prefix[-1], hidden, rotation, seen)
    last, _ = gemma.rms_norm(last, weights.prefix_gain)
    final = rows.mask.shape[1] - 1 - jnp.argmax(rows.mask[:, ::-1], axis=1)
    out["prefix_out_last_valid"] = jnp.take_along_axis(last, final[:, None, None], axis=1)[:, 0]
    return out


def check_model(path: str | Path) -> list[Row]:
    """Compares every stored quantity of every case of a model file.

    float32 files: against `out` within 1e-4 and `out_posemb64` within 1e-5. bfloat16 files: the rms error of actions
    and velocities against float32 activations is at most 1.5 times openpi's own, which the JSON states.
    """
    ref = load_reference(path)
    rows, variants = [], [("out", "float32")]
    if ref.config.dtype == "bfloat16":
        variants = [("out_pbf16", "bfloat16"), ("out_pf32", "float32")]
    steps = ref.meta["num_steps"]
    run = jax.jit(quantities, static_argnums=(0, 1))
    for variant, dtype in variants:
        params = jax.tree.map(lambda a, dtype=dtype: jnp.asarray(a, dtype), ref.params)
        for case, part in ref.cases().items():
            noise, half = ref.arrays["in/noise"][part], ref.arrays["in/x_t_half"][part]
            got = jax.device_get(run(ref.config, steps, params, ref.inputs(part), noise, half))
            rows += _model_rows(ref, variant, case, got)
    if "posemb/f64_rounded" in ref.arrays:
        embedding = pi0.time_embedding(ref.arrays["posemb/t"], ref.config.expert.width)
        rows.append(_row("posemb", "f64_rounded", embedding, ref.arrays["posemb/f64_rounded"], 2e-7))
        rows.append(_row("posemb", "t", pi0.euler_times(steps), ref.arrays["posemb/t"], 0))
    return rows


def _model_rows(ref: Reference, variant: str, case: str, computed: dict) -> Iterator[Row]:
    label = f"{variant}/{case}"
    for key, want in ref.arrays.items():
        name = key.removeprefix(f"{label}/")
        # actions_eager is openpi's own un-jitted run, not another quantity
        if name == key or name == "actions_eager":
            continue
        if name in ("traj_t",) or want.dtype.kind in "bi":
            yield _row(label, name, computed[name], want, 0)
        elif variant == "out":
            yield _row(label, name, computed[name], want, NATIVE_TOLERANCE)
        elif f"out_f32act/{case}/{name}" in ref.arrays:
            error = ref.meta[f"{case}_{variant.removeprefix('out_')}_{name}_vs_f32act"]["rms"]
            against = ref.arrays[f"out_f32act/{case}/{name}"]
            yield _row(label, f"{name} vs float32", computed[name], against, BF16_FACTOR * error, "rms")
        else:
            yield _row(label, name, computed[name], want, BF16_RELATIVE * float(np.std(want)), "rms")
    for name in ("v_t1", "v_t05", "actions"):
        key = f"out_posemb64/{case}/{name}"
        if variant == "out" and key in ref.arrays:
            yield _row(f"out_posemb64/{case}", name, computed[name], ref.arrays[key], EXACT_TOLERANCE)


def _row(case: str, quantity: str, got: Any, want: Any, limit: float, measure: str = "max") -> Row:
    got, want = np.asarray(got), np.asarray(want)
    if got.shape != want.shape:  # another number of kept tokens, for instance
        return Row(case, quantity, np.inf, np.inf, measure, limit)
    error = got.astype(np.float64) - want.astype(np.float64)
    return Row(case, quantity, float(np.abs(error).max()), float(np.sqrt(np.mean(error**2))), measure, limit)


# --- the method ---------------------------------------------------------------------------------------------


def recording(pruner: Pruner) -> Pruner:
    """The same pruner whose state also holds the evidence it last saw: (inner state, evidence)."""

    def step(state: tuple, evidence: Evidence) -> tuple[tuple, Selection]:
        inner, selection = pruner.step(state[0], evidence)
        return (inner, dataclasses.replace(evidence, key=state[1].key)), selection

    def init(evidence: Evidence) -> tuple:
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), dataclasses.replace(evidence, key=jnp.zeros(())))
        return pruner.init(evidence), zeros

    return Pruner(pruner.name, pruner.plan, init, step)


def check_episode(model: str | Path, episode: str | Path) -> list[Row]:
    """Plays an oracle episode in float32 on the weights of a model file and compares every step."""
    ref = load_reference(model)
    with np.load(episode, allow_pickle=False) as file:
        want = {key: file[key] for key in file.files}
    config, frames, prompt, noise = ref.config, want["frames"], want["tokens"], want["noise"]
    cameras = config.cameras[: frames.shape[1]]
    layout = smallest_layout(
        dict.fromkeys(cameras, True),
        len(prompt),
        cameras=config.cameras,
        tokens_per_camera=config.tokens_per_camera,
        max_token_len=config.max_token_len,
    )
    weights = jax.jit(lambda p: pi0.prepare(p, config, num_steps=ref.meta["num_steps"]))(ref.params)
    engine = Engine(weights, config, recording(_pruner_of(want)))
    control = engine.init((0,), len(cameras))
    mask = (np.arange(layout.text) < len(prompt))[None]
    tokens = np.zeros(mask.shape, np.int32)
    tokens[mask] = prompt
    rows = []
    for step in range(len(frames)):
        state = np.zeros((1, config.action_dim), np.float32)
        inputs = Inputs(frames[step][None], np.ones((1, len(cameras)), bool), tokens, mask, state)
        reference = jax.device_get(control.pruner[0])
        actions, control, info = engine.step(control, jax.device_put(inputs), jax.device_put(noise[step][None]))
        stored = {k.split("/")[1]: v for k, v in want.items() if k.startswith(f"step{step}/")}
        computed = _episode_quantities(engine, reference, control, info, actions)
        computed["n_alive"] = np.asarray(layout.visual + len(prompt))
        for name, value in stored.items():
            if name == "margin" or (name == "kappa" and np.isnan(value) and np.isnan(computed[name])):
                continue  # margin: how clear the oracle's choice was
            limit = 0 if value.dtype.kind in "bi" else EPISODE_TOLERANCE.get(name, 1e-6)
            rows.append(_row(f"step{step}", name, computed[name], value, limit))
    return rows


def _pruner_of(episode: Mapping[str, np.ndarray]) -> Pruner:
    """SAFE with the choices that an oracle episode was played with."""
    return PRUNERS["safe"](
        keep=float(episode["keep_ratio"]),
        cut=int(episode["cut"]),
        fuse=float(episode["fuse"]),
        threshold=float(episode["gamma"]),
        queries=str(episode["queries"]),
        late_layers=tuple(int(l) for l in episode["late_layers"]),
    )


def _episode_quantities(
    engine: Engine, reference: Reference, control: ControlState, info: StepInfo, actions: jax.Array
) -> dict[str, Any]:
    """What the oracle stores of one step, by its names."""
    evidence = jax.tree.map(lambda a: a[0], control.pruner[1])
    old = jax.tree.map(lambda a: a[0], reference)
    z = forecast.unit(evidence.visual)
    match = forecast.correspondence(z, old.reference, evidence.alive)
    keyframe = bool(info.keyframe[0])
    index = np.flatnonzero(evidence.alive) if keyframe else np.asarray(info.selection.index[0])
    out = {
        "S_shallow": evidence.saliency[0],
        "kappa": info.selection.kappa[0],
        "match": match,
        "forecast_shallow": forecast.forecast(old.shallow, match, evidence.alive),
        "score": info.selection.score[0],
        "keyframe": np.asarray(keyframe),
        "keep": index,
        "actions": actions[0],
    }
    return out | {f"late_{l}": control.late[0, i] for i, l in enumerate(engine.plan.late_layers)}
