"""What 8-bit weights do to the actions, beside what they do to the time.

python benchmarks/quantisation.py --out benchmarks/results/precision_mini_cpu.json
python benchmarks/quantisation.py --config pi05_libero --checkpoint gs://openpi-assets/checkpoints/pi05_libero

Plays recorded episodes through a policy at full precision and with its language model and expert in 8 bits: the same
frames, prompts and noise, on the full and on the pruned path. Compares the actions that the robot would get. All kinds
take every call in turns; ratios are medians within calls.
"""

import dataclasses
import json
import sys
import time
from pathlib import Path

import numpy as np
import tyro

from safe_pruner_jax import load_policy
from safe_pruner_jax.analysis.episodes import EXAMPLE, episodes
from safe_pruner_jax.bench import machine
from safe_pruner_jax.figures.theme import markdown
from safe_pruner_jax.model import quantisation
from safe_pruner_jax.policy.loading import EMBEDDED, calibrated
from safe_pruner_jax.pruners import full, safe
from safe_pruner_jax.timing import ratio, spread


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
    draws, size = np.random.default_rng(0), (policy.engine.config.action_horizon, policy.engine.config.action_dim)
    actions, times = {key: [] for key in robots}, {key: [] for key in robots}
    for source in data:
        for recording in episodes(source):
            for number, call in enumerate(recording.calls()):
                noise = draws.standard_normal(size).astype(np.float32)
                for key, robot in robots.items():
                    start = time.perf_counter()
                    reply = robot.infer(call.request | ({"reset": True} if number == 0 else {}), noise=noise)
                    if number > 1:  # by then both paths are compiled
                        times[key].append(time.perf_counter() - start)
                    actions[key].append(reply["actions"])
    rows = []
    for (path, kind), mine in actions.items():
        exact = np.array(actions[path, None])
        error = np.abs(np.array(mine) - exact) / exact.std((0, 1))
        ms, gain = spread(1e3 * np.array(times[path, kind])), ratio(np.array(times[path, kind]), times[path, None])
        rows.append(
            {
                "path": path,
                "weights": kind or policy.engine.config.dtype,
                "error_mean": float(error.mean()),
                "error_p99": float(np.quantile(error, 0.99)),
                "ms": dataclasses.asdict(ms),
                "times_full_precision": dataclasses.asdict(gain),
            }
        )
    lines = [
        [
            *(r["path"], r["weights"], f"{r['error_mean']:.1e}, {r['error_p99']:.1e}"),
            *(f"{r['ms']['median']:.1f}", f"{r['times_full_precision']['median']:.2f}×"),
        ]
        for r in rows
    ]
    columns = ["path", "weights", "action error: mean, 99 % (standard deviations)", "ms", "times as fast"]
    print(markdown(columns, lines), end="")
    if out is not None:
        report = {
            "command": " ".join(["python", "benchmarks/quantisation.py", *sys.argv[1:]]),
            "machine": machine.describe(),
            "calls": len(next(iter(actions.values()))),
            "rows": rows,
        }
        out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
