"""What identifies a policy: method, weights, precision, device. What differs in it is not counted together."""

import hashlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax

from safe_pruner_jax import __version__
from safe_pruner_jax.pruners import Pruner
from safe_pruner_jax.robots.configs import CONFIGS, get_config
from safe_pruner_jax.robots.robots import LIBERO
from safe_pruner_jax.tokens import PROMPT_LENGTHS

METHOD = ("pruner", "choices", "plan", "rtc")


"""Fields of a configuration in which methods differ; the others are the conditions under which they are compared."""


MODEL = ("policy", "checkpoint", "precision", "num_steps", "temperature")


"""Fields of a configuration that say what computes."""


@dataclass(frozen=True)
class Configuration:
    """Everything that must agree for episodes to be counted together.

    Args:
      pruner, choices, plan: name, factory arguments and static plan of the method.
      policy: openpi's name of the configuration.
      checkpoint: from `checkpoint_fingerprint`.
      precision: dtype of the activations, and of the weights where they are in 8 bits.
      num_steps: denoise steps.
      prompt_lengths: static prompt lengths.
      replan: actions executed per policy call.
      max_steps: per episode; None is the suite's limit.
      noise: where the policy's noise comes from.
      simulator: versions that pictures and contacts depend on, from `simulator.provenance`.
      delay: control steps from an observation until its actions are used.
      rtc: whether chunks continue the last one (`rtc`).
      temperature: standard deviation of the noise.
    """

    pruner: str
    choices: Mapping[str, Any]
    plan: Mapping[str, Any]
    policy: str
    checkpoint: str
    precision: str
    num_steps: int
    prompt_lengths: tuple[int, ...]
    replan: int = 5
    max_steps: int | None = None
    noise: str = ""
    simulator: Mapping[str, str] = field(default_factory=dict)
    delay: int = 0
    rtc: bool = False
    temperature: float = 1.0

    def as_json(self) -> dict[str, Any]:
        """Plain JSON types, equal to what reading them back gives."""
        return json.loads(json.dumps(asdict(self)))


def checkpoint_fingerprint(folder: str | os.PathLike, note: str = "") -> str:
    """12 hex digits of what is below a checkpoint's folder; its own path does not matter.

    Files above 64 MiB enter with their size and both ends: reading gigabytes would take longer than loading them, and
    orbax names its data files at random at every save. A calibration does not enter: what it chooses is recorded.

    Raises:
      FileNotFoundError: no such folder, or an empty one.
    """
    whole, end = 64 << 20, 1 << 20
    root, digest = Path(folder), hashlib.sha256(note.encode())
    files = sorted(p for p in root.rglob("*") if p.is_file() and not {"__pycache__", "calibrate.json"} & {*p.parts})
    if not files:
        raise FileNotFoundError(f"no checkpoint in {root}")
    for path in files:
        size = path.stat().st_size
        digest.update(f"\n{path.relative_to(root).as_posix()} {size}\n".encode())
        with path.open("rb") as file:
            if size <= whole:
                digest.update(file.read())
            else:
                digest.update(file.read(end))
                file.seek(-end, os.SEEK_END)
                digest.update(file.read())
    return digest.hexdigest()[:12]


def identity(configuration: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same on every node: model, checkpoint, method, and the versions that compute them."""
    chosen = {key: configuration[key] for key in (*MODEL, *METHOD) if key != "rtc"}
    return chosen | {"safe_pruner_jax": __version__, "jax": jax.__version__}


def differences(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "") -> list[str]:
    """Where two configurations differ, as "field: old → new".

    >>> differences({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}})
    ['b.c: 2 → 3']
    """
    differing = []
    for key in dict.fromkeys((*old, *new)):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            differing += differences(a, b, f"{path}{key}.")
        elif a != b:
            differing.append(f"{path}{key}: {a} → {b}")
    return differing


SERVED = "safe_pruner"


"""Key of a server's metadata under which it tells its configuration and device."""


def describe(
    policy: str,
    folder: str | os.PathLike,
    pruner: Pruner,
    choices: Mapping[str, Any],
    *,
    dtype: str | None = None,
    quantise: str | None = None,
    num_steps: int = 10,
    temperature: float | None = None,
    prompt_lengths: Sequence[int] = PROMPT_LENGTHS,
    note: str = "",
    anywhere: bool = False,
) -> Configuration:
    """The configuration of a policy that plays LIBERO, known before its weights are read.

    Args:
      policy: openpi's name of the configuration.
      folder: of the checkpoint, on this machine.
      pruner, choices: the method and the factory arguments that made it.
      dtype, quantise, num_steps, temperature, prompt_lengths: as for `load_policy`.
      note: enters the checkpoint's fingerprint.
      anywhere: for a policy of any robot, which plays nothing.

    Raises:
      ValueError: an unknown configuration, one of another robot, or a pruner that does not fit the model.
      FileNotFoundError: no checkpoint.
    """
    config = get_config(policy)
    if config.robot != LIBERO and not anywhere:
        fitting = ", ".join(name for name, c in CONFIGS.items() if c.robot == LIBERO)
        raise ValueError(f"config: {policy} drives {config.robot.name}, which LIBERO does not have; choose {fitting}")
    return Configuration(
        pruner=pruner.name,
        choices=dict(choices),
        plan=asdict(pruner.plan.for_depth(config.model.depth)),
        policy=policy,
        checkpoint=checkpoint_fingerprint(folder, note),
        precision=(dtype or config.model.dtype) + (f", {quantise} weights" if quantise else ""),
        num_steps=num_steps,
        temperature=config.model.temperature if temperature is None else temperature,
        prompt_lengths=tuple(prompt_lengths),
    )


def local_device() -> str:
    """The device in words; latencies of different ones are not compared."""
    device = jax.devices()[0]
    return f"{platform.machine()}, {os.cpu_count()} cores" if device.platform == "cpu" else device.device_kind
