"""What one control step costs: all slots, alive slots, keyframes and pruned steps, interleaved in one process.

python benchmarks/control_step.py [--rounds 15] [--keeps 0.3 0.2 0.1] [--out benchmarks/results/control_step.json]

Uses the embedded model (π0.5's architecture; its weights do not matter for time). Every figure is a wall time with the
result on the host; the modes take turns, so that a slow moment of the machine hits all of them.
"""

import json
import os
import platform
import sys
import time
from pathlib import Path

import jax
import numpy as np
import tyro

from safe_pruner_jax.loading import EMBEDDED, load_policy
from safe_pruner_jax.policy import all_slots, layout_of, pack
from safe_pruner_jax.pruners import full, safe


def stepper(policy, layout, keyframe: bool):
    """A function that runs one control step to the end: [milliseconds, of which until the decision]."""
    engine = policy.engine
    example, _ = policy.transform.prepare(policy.transform.config.robot.example(np.random.default_rng(0)))
    host = pack([example], layout)
    fresh = engine.init((0,), len(layout.cameras))
    _, warm, _ = engine.step(fresh, jax.device_put(host))

    def step() -> tuple[float, float | None]:
        start = time.perf_counter()
        actions, _, info = engine.step(fresh if keyframe else warm, jax.device_put(host))
        jax.device_get(actions)
        assert info.keyframe[0] == (keyframe or engine.plan.cut is None)
        shallow = None if info.decided_at is None else (info.decided_at - start) * 1e3
        return (time.perf_counter() - start) * 1e3, shallow

    return step


def main(rounds: int = 15, keeps: tuple[float, ...] = (0.3, 0.2, 0.1), out: Path | None = None) -> int:
    """Measures and prints a table.

    Args:
      rounds: measured rounds; every round runs every mode once, after two rounds of warm-up.
      keeps: shares of visual tokens kept by SAFE-Pruner.
      out: JSON file to write; nothing is written without it.
    """
    plain = load_policy(EMBEDDED, pruner=full())
    example, _ = plain.transform.prepare(plain.transform.config.robot.example(np.random.default_rng(0)))
    small, everything = layout_of(example, plain.engine.config), all_slots(plain.engine.config)
    modes = {"all slots": stepper(plain, everything, True), "full": stepper(plain, small, True)}
    for keep in keeps:
        # γ = -1: never a keyframe but the first
        policy = load_policy(EMBEDDED, pruner=safe(keep=keep, threshold=-1.0))
        if keep == keeps[0]:
            modes["safe keyframe"] = stepper(policy, small, True)
        modes[f"safe keep {keep}"] = stepper(policy, small, False)
    times: dict[str, list] = {name: [] for name in modes}
    for i in range(rounds + 2):
        for name, step in modes.items():
            result = step()
            if i >= 2:
                times[name].append(result)
    rows = {}
    for name, values in times.items():
        total = np.array([v[0] for v in values])
        shallow = [v[1] for v in values if v[1] is not None]
        q1, median, q3 = np.percentile(total, [25, 50, 75])
        rows[name] = {
            "median_ms": median,
            "iqr_ms": [q1, q3],
            "shallow_ms": float(np.median(shallow)) if shallow else None,
            "runs": rounds,
        }
    base = rows["full"]["median_ms"]
    print(f"{'mode':16} {'ms median':>10} {'quartiles':>18} {'shallow':>9} {'speed-up over full':>19}")
    for name, row in rows.items():
        quartiles = "{:.0f} .. {:.0f}".format(*row["iqr_ms"])
        shallow = "" if row["shallow_ms"] is None else f"{row['shallow_ms']:.0f}"
        print(f"{name:16} {row['median_ms']:10.0f} {quartiles:>18} {shallow:>9} {base / row['median_ms']:18.2f}x")
    report = {
        "command": " ".join(sys.argv),
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "device": str(jax.devices()[0]),
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "numpy": np.__version__},
        "dtype": plain.engine.config.dtype,
        "views": len(small.cameras),
        "prompt_tokens": len(example.tokens),
        "prompt_slots": small.text,
        "layouts": {"all slots": everything.slots, "alive": small.slots},
        "modes": rows,
    }
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=1) + "\n")
        print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
