"""What 8-bit weights do to the actions, beside what they do to the time.

python benchmarks/precision.py --out benchmarks/results/precision_mini_cpu.json
python benchmarks/precision.py --config pi05_libero --checkpoint gs://openpi-assets/checkpoints/pi05_libero

Plays recorded episodes through a policy at full precision and with its language model and expert in 8 bits: the same
frames, prompts and noise, on the full and on the pruned path. Compares the actions that the robot would get. All kinds
take every call in turns; ratios are medians within calls.
"""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from safe_pruner_jax import load_policy
from safe_pruner_jax.analysis.episodes import EXAMPLE, episodes
from safe_pruner_jax.bench import machine
from safe_pruner_jax.figures.theme import markdown
from safe_pruner_jax.model import quantisation
from safe_pruner_jax.policy.embedded import EMBEDDED
from safe_pruner_jax.policy.loading import calibrated
from safe_pruner_jax.pruners import full, safe
from safe_pruner_jax.timing import ratio, spread

Key = tuple[str, str | None]
"""Path and kind of weights, None at full precision."""


def main(
    config: str = "mini_libero",
    checkpoint: str | None = None,
    dtype: str | None = None,
    data: tuple[str, ...] = (EXAMPLE,),
    keep: float = 0.2,
    out: Path | None = None,
) -> int:
    """Measures and prints a table.

    Args:
      config: name of the policy.
      checkpoint: its folder or address; None takes the published or embedded one.
      dtype: activations and weights at full precision; None takes the configuration's.
      data: episodes, see `openpi analyze recall --help`.
      keep: share kept on the pruned path.
      out: JSON file to write.
    """
    policy = load_policy(config, checkpoint, dtype=dtype)
    usable = [k for k in quantisation.STORED if quantisation.usable(k, policy.engine.config.dtype) == k]
    kinds = [None, *usable]
    # at the paper's γ the embedded policy would hardly leave the full path
    choices = calibrated() if config == EMBEDDED and checkpoint is None else {}
    paths = {"full": full, f"safe {keep:g}": lambda: safe(keep=keep, **choices)}
    exactly = policy.engine.weights
    stored = {kind: exactly if kind is None else quantisation.reduce(exactly, kind) for kind in kinds}
    robots = {(p, k): policy.with_pruner(make(), stored[k]).session() for p, make in paths.items() for k in kinds}
    size = (policy.engine.config.action_horizon, policy.engine.config.action_dim)
    actions, times = play(robots, data, size)
    rows = [row_of(key, actions, times) for key in robots]
    for row in rows:
        row["weights"] = row["weights"] or policy.engine.config.dtype
    print(table(rows), end="")
    if out is not None:
        report = {
            "command": " ".join(["python", "benchmarks/precision.py", *sys.argv[1:]]),
            "machine": machine.describe(),
            "calls": len(next(iter(actions.values()))),
            "rows": rows,
        }
        out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def play(robots: dict[Key, Any], data: tuple[str, ...], size: tuple[int, int]) -> tuple[dict[Key, list], ...]:
    """The same calls by every robot in turn: actions of all calls, and seconds of those after the first two."""
    draws = np.random.default_rng(0)
    actions, times = {key: [] for key in robots}, {key: [] for key in robots}
    for recording in (recording for source in data for recording in episodes(source)):
        for number, call in enumerate(recording.calls()):
            noise = draws.standard_normal(size).astype(np.float32)
            for key, robot in robots.items():
                start = time.perf_counter()
                reply = robot.infer(call.request | ({"reset": True} if number == 0 else {}), noise=noise)
                if number > 1:  # by then both paths are compiled
                    times[key].append(time.perf_counter() - start)
                actions[key].append(reply["actions"])
    return actions, times


def row_of(key: Key, actions: dict[Key, list], times: dict[Key, list]) -> dict[str, Any]:
    """One path and kind of weights against the same path at full precision."""
    path, kind = key
    exact = np.array(actions[path, None])
    error = np.abs(np.array(actions[key]) - exact) / exact.std((0, 1))
    return {
        "path": path,
        "weights": kind,
        "error_mean": float(error.mean()),
        "error_p99": float(np.quantile(error, 0.99)),
        "ms": dataclasses.asdict(spread(1e3 * np.array(times[key]))),
        "times_full_precision": dataclasses.asdict(ratio(np.array(times[key]), times[path, None])),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, one line per row."""
    lines = [
        [
            *(r["path"], r["weights"], f"{r['error_mean']:.1e}, {r['error_p99']:.1e}"),
            *(f"{r['ms']['median']:.1f}", f"{r['times_full_precision']['median']:.2f}×"),
        ]
        for r in rows
    ]
    return markdown(["path", "weights", "action error: mean, 99 % (standard deviations)", "ms", "times as fast"], lines)


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
