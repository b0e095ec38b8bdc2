"""A policy's folder as LeRobot writes it: what `config.json` and the processors beside it say, in openpi's terms.

    config, stats = read_lerobot(folder, get_config("pi05_libero"))
    write_lerobot(folder, config, stats)

Weights are `model.pytorch`'s. Facts from LeRobot's `policies/pi05`, `policies/pi0` and `processor`. Its quantile
scaling adds no ε to the range, openpi's adds 1e-6; that moves an action by at most 5e-7.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from safe_pruner_jax.model.config import CAMERAS
from safe_pruner_jax.model.fetch import CheckpointError
from safe_pruner_jax.model.pytorch import read_arrays, write_arrays
from safe_pruner_jax.robots.transform import PolicyConfig
from safe_pruner_jax.robots.transforms import NormStats

CONFIG, INPUTS, OUTPUTS = "config.json", "policy_preprocessor.json", "policy_postprocessor.json"
"""Files that LeRobot looks for beside the weights."""

_STATE, _ACTION, _IMAGES = "observation.state", "action", "observation.images."
_SCALINGS = {"QUANTILES": ("q01", "q99"), "MIN_MAX": ("min", "max")}


def is_lerobot(folder: Path) -> bool:
    """Whether LeRobot wrote the folder: its `config.json` names a type of policy."""
    return (folder / CONFIG).is_file() and "type" in _json(folder / CONFIG)


def read_lerobot(folder: Path, config: PolicyConfig) -> tuple[PolicyConfig, dict[str, NormStats]]:
    """The configuration with what the folder says of the model, and the statistics; {} if the folder has none.

    From `config.json`: actions per chunk, padded width, prompt slots, the state in the prompt (always with π0.5), and
    relative actions. From the preprocessor: which cameras there are, after its rename rules, and the scaling.

    Raises:
      CheckpointError: another type of policy than the configuration's, cameras in another order, a scaling that
        neither π0 nor π0.5 has.
    """
    about, model = _json(folder / CONFIG), config.model
    expected = "pi05" if model.pi05 else "pi0"
    if about["type"] != expected:
        raise CheckpointError(
            f"{folder / CONFIG}: expected type {expected} for {config.name}, got {about['type']}; choose another config"
        )
    steps = _steps(folder / INPUTS)
    _check_cameras(folder, about, steps.get("rename_observations_processor", {}).get("rename_map", {}))
    model = model.replace(
        action_horizon=about.get("chunk_size", model.action_horizon),
        action_dim=about.get("max_action_dim", model.action_dim),
        max_token_len=about.get("tokenizer_max_length", model.max_token_len),
        discrete_state_input=model.pi05,
    )
    normaliser = steps.get("normalizer_processor", {})
    scaling = _scaling(folder, normaliser.get("norm_map") or about.get("normalization_mapping", {}))
    config = dataclasses.replace(
        config, model=model, quantiles=scaling != "MEAN_STD", delta_mask=_delta_mask(about, config)
    )
    file = normaliser.get("state_file")
    return config, {} if file is None else _statistics(folder / file, scaling)


def write_lerobot(folder: Path, config: PolicyConfig, stats: Mapping[str, NormStats]) -> None:
    """Writes what `read_lerobot` and LeRobot read: `config.json`, both processors and their statistics."""
    model, kind = config.model, "pi05" if config.model.pi05 else "pi0"
    if model.pi05 and not model.discrete_state_input:
        raise CheckpointError(
            f"LeRobot's pi05 always writes the state into the prompt, {config.name} never does: "
            "expected discrete_state_input, got none; convert to openpi's layout"
        )
    mode = "QUANTILES" if config.quantiles else "MEAN_STD"
    modes = {"VISUAL": "IDENTITY", "STATE": mode, "ACTION": mode}
    side = [3, model.image_size, model.image_size]
    inputs = {f"{_IMAGES}{camera}": {"type": "VISUAL", "shape": side} for camera in model.cameras}
    inputs[_STATE] = {"type": "STATE", "shape": [config.robot.state_dim]}
    outputs = {_ACTION: {"type": "ACTION", "shape": [config.robot.action_dim]}}
    about = {
        "type": kind,
        "n_obs_steps": 1,
        "input_features": inputs,
        "output_features": outputs,
        "normalization_mapping": modes,
        "chunk_size": model.action_horizon,
        "n_action_steps": model.action_horizon,
        "max_state_dim": model.action_dim,
        "max_action_dim": model.action_dim,
        "tokenizer_max_length": model.max_token_len,
        "image_resolution": [model.image_size] * 2,
        "dtype": model.dtype,
    }
    if config.delta_mask is not None:
        names = [f"joint_{i}" if relative else f"gripper_{i}" for i, relative in enumerate(config.delta_mask)]
        about |= {"use_relative_actions": True, "relative_exclude_joints": ["gripper"], "action_feature_names": names}
    _write_json(folder / CONFIG, about)
    scaled = {"eps": 1e-8, "features": inputs | outputs, "norm_map": modes}
    arrays = {
        f"{ours}.{name}": np.asarray(value, np.float32)
        for ours, theirs in ((_STATE, "state"), (_ACTION, "actions"))
        for name, value in dataclasses.asdict(stats[theirs]).items()
        if value is not None
    }
    for file in _write_processors(folder, kind, scaled, about):
        write_arrays(folder / file, arrays)


def _write_processors(folder: Path, kind: str, scaled: dict[str, Any], about: dict[str, Any]) -> list[str]:
    """Writes both processors; returns the files of statistics that they name."""
    relative, absolute = [], []
    if about.get("use_relative_actions"):  # LeRobot before 0.5 does not know these steps
        names = {"exclude_joints": about["relative_exclude_joints"], "action_names": about["action_feature_names"]}
        relative.append(("relative_actions_processor", {"enabled": True, **names}))
        absolute.append(("absolute_actions_processor", {"enabled": True}))
    text = {"max_length": about["tokenizer_max_length"], "tokenizer_name": "google/paligemma-3b-pt-224"}
    text |= {"padding": "max_length", "padding_side": "right", "task_key": "task", "truncation": True}
    prompt = "pi05_prepare_state_tokenizer_processor_step" if kind == "pi05" else "pi0_new_line_processor"
    device = {"device": "cpu", "float_dtype": None}
    before = [
        ("rename_observations_processor", {"rename_map": {}}),
        ("to_batch_processor", {}),
        *relative,
        ("normalizer_processor", scaled),
        (prompt, {}),
        ("tokenizer_processor", text),
        ("device_processor", device),
    ]
    outputs = {key: feature for key, feature in scaled["features"].items() if feature["type"] == "ACTION"}
    after = [
        ("unnormalizer_processor", scaled | {"features": outputs}),
        *absolute,
        ("device_processor", device),
    ]
    files: list[str] = []
    for name, file, steps in (("pre", INPUTS, before), ("post", OUTPUTS, after)):
        entries: list[dict[str, Any]] = [{"registry_name": step, "config": own} for step, own in steps]
        for number, entry in enumerate(entries):
            if entry["registry_name"].endswith("normalizer_processor"):
                files.append(f"policy_{name}processor_step_{number}_{entry['registry_name']}.safetensors")
                entry["state_file"] = files[-1]
        _write_json(folder / file, {"name": f"policy_{name}processor", "steps": entries})
    return files


def _steps(file: Path) -> dict[str, dict[str, Any]]:
    """Name of a processor's step → its own configuration, with "state_file" if it has one."""
    if not file.is_file():
        return {}
    named = [step for step in _json(file).get("steps", []) if "registry_name" in step]
    return {s["registry_name"]: {"state_file": s.get("state_file"), **s.get("config", {})} for s in named}


def _check_cameras(folder: Path, about: dict[str, Any], renamed: Mapping[str, str]) -> None:
    """The slots of the network are filled in the order of the features: it has to be that of `CAMERAS`."""
    features = [key for key in about.get("input_features", {}) if key.startswith("observation.image")]
    before = {new: old for old, new in renamed.items()}
    listing = ", ".join(f"{key} (from {before[key]})" if key in before else key for key in features)
    names = [key.removeprefix(_IMAGES) for key in features]
    order = [CAMERAS.index(name) for name in names if name in CAMERAS]
    wrist_first = bool(names) and "wrist" in names[0] and not all("wrist" in name for name in names)
    if len(features) > len(CAMERAS) or order != sorted(order) or wrist_first:
        raise CheckpointError(
            f"{folder / CONFIG}: expected at most {len(CAMERAS)} cameras in the order {', '.join(CAMERAS)}, got "
            f"{listing}; this network's slots are filled in that order"
        )


def _delta_mask(about: dict[str, Any], config: PolicyConfig) -> tuple[bool, ...] | None:
    """Which leading actions are relative to the state; the configuration's, where LeRobot knows no names of them."""
    if not about.get("use_relative_actions", False):
        return None
    names, excluded = about.get("action_feature_names"), about.get("relative_exclude_joints") or []
    if names is None:
        return (True,) * config.robot.action_dim if not excluded else config.delta_mask
    return tuple(not any(token.lower() in str(name).lower() for token in excluded) for name in names)


def _scaling(folder: Path, modes: Mapping[str, str]) -> str:
    scalings = {modes.get("STATE", "IDENTITY"), modes.get("ACTION", "IDENTITY")}
    if len(scalings) != 1 or not scalings <= {"MEAN_STD", *_SCALINGS}:
        raise CheckpointError(
            f"{folder / CONFIG}: expected one scaling of states and actions, {', '.join(_SCALINGS)} or MEAN_STD, got "
            f"STATE {modes.get('STATE')} and ACTION {modes.get('ACTION')}; train it with one of these"
        )
    return scalings.pop()


def _statistics(file: Path, scaling: str) -> dict[str, NormStats]:
    arrays, statistics = read_arrays(file), {}
    low, high = _SCALINGS.get(scaling, ("q01", "q99"))
    for ours, theirs in (("state", _STATE), ("actions", _ACTION)):
        values = {
            key.removeprefix(f"{theirs}."): array for key, array in arrays.items() if key.startswith(f"{theirs}.")
        }
        needed = ("mean", "std") if scaling == "MEAN_STD" else (low, high)
        if missing := [f"{theirs}.{name}" for name in needed if name not in values]:
            raise CheckpointError(
                f"{file}: expected the statistics {', '.join(missing)}, got none; {scaling} needs them"
            )
        span = values.get(high, values.get("mean")), values.get(low, values.get("mean"))
        mean, std = values.get("mean", (span[0] + span[1]) / 2), values.get("std", (span[0] - span[1]) / 2)
        statistics[ours] = NormStats(mean, std, values.get(low), values.get(high))
    return statistics


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{file} is not JSON: {error}; download it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: expected a JSON object, got {type(content).__name__}; download it again")
    return content


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
