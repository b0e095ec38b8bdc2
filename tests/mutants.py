"""Mutants: one line of the package is broken at a time, and the named tests must notice.

    python tests/mutants.py [NAME …]

Works on a copy of the package; prints a row per mutant, and exits with 1 if one of them survives. A line that is no
longer in the package is noticed by `test_house.py`. docs/decisions/0024-two-tiers-of-tests.md has the last table.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from shutil import copytree, ignore_patterns
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PACKAGE = "safe_pruner_jax"


class Mutant(NamedTuple):
    """`old` stands once in `file`, below the package; `tests` are pytest's arguments."""

    what: str
    file: str
    old: str
    new: str
    tests: str

    @property
    def name(self) -> str:
        return self.what.replace(" ", "-")


MUTANTS = (
    Mutant(
        "κ without its second norm",
        "pruners/forecast.py",
        "(jnp.sqrt(jnp.sum(s * s)) * jnp.sqrt(jnp.sum(forecast_s * forecast_s)))",
        "jnp.sqrt(jnp.sum(s * s))",
        "tests/test_temporal.py",
    ),
    Mutant(
        "the gripper is compared with nothing",
        "pruners/full_steps.py",
        "(steps > 1) & (now != closed).any()",
        "(steps > 1) & now.any()",
        "tests/test_full_steps.py",
    ),
    Mutant(
        "λ on the wrong side of the fusion",
        "pruners/forecast.py",
        "(1.0 - weight) * s + weight * late.mean(0)",
        "weight * s + (1.0 - weight) * late.mean(0)",
        "tests/test_temporal.py",
    ),
    Mutant(
        "dead reference tokens are candidates",
        "pruners/forecast.py",
        "jnp.broadcast_to(alive[None, :], similarity.shape)",
        "jnp.ones(similarity.shape, bool)",
        "tests/test_temporal.py",
    ),
    Mutant(
        "max-max instead of max-min",
        "pruners/diversity.py",
        "jnp.minimum(far, distance[v])",
        "jnp.maximum(far, distance[v])",
        "tests/test_peers.py",
    ),
    Mutant(
        "a κ that is not a number is no keyframe",
        "pruners/safe.py",
        "~(k >= threshold)",
        "(k < threshold)",
        "tests/test_pruners.py",
    ),
    Mutant(
        "the last prefix layer is remembered",
        "pruners/plan.py",
        "(min(max(layer, 0), depth - 2),)",
        "(min(max(layer, 0), depth - 1),)",
        "tests/test_plans.py",
    ),
    Mutant(
        "one reserved token more per camera",
        "tokens.py",
        "(ahead.sum(1) < per_camera)",
        "(ahead.sum(1) <= per_camera)",
        "tests/test_tokens.py",
    ),
    Mutant(
        "counting gives a tie to the later token",
        "tokens.py",
        "earlier = place[None, :] < place[:, None]",
        "earlier = place[None, :] > place[:, None]",
        "tests/test_tokens.py",
    ),
    Mutant(
        "queries are not scaled",
        "model/gemma.py",
        "_rotate(q, cos_sin) * c.head_dim**-0.5",
        "_rotate(q, cos_sin)",
        "tests/test_parity.py",
    ),
    Mutant(
        "a velocity points at the actions",
        "model/flow.py",
        "(noise - actions)).mean(-1)",
        "(actions - noise)).mean(-1)",
        "tests/test_training.py",
    ),
    Mutant(
        "training goes on with the first batch",
        "training/loop.py",
        "source.batches(s.seed, start)",
        "source.batches(s.seed, 0)",
        "tests/test_training.py",
    ),
    Mutant(
        "a mixed batch takes its rows from one program",
        "engine/engine.py",
        "source[rows] = start + np.arange(len(rows))",
        "source[rows] = np.arange(len(rows))",
        "tests/test_fleet.py",
    ),
    Mutant(
        "every robot draws from seed 0",
        "engine/engine.py",
        "[jax.random.key(s) for s in seeds]",
        "[jax.random.key(0) for s in seeds]",
        "tests/test_evaluate.py",
    ),
    Mutant(
        "full is not obeyed",
        "engine/engine.py",
        "jax.device_get(carry.selection.keyframe) | full,",
        "jax.device_get(carry.selection.keyframe),",
        "tests/test_peers_engine.py",
    ),
    Mutant(
        "history survives a change of cameras",
        "engine/programs.py",
        "[:, None] & (control.alive == alive)",
        "[:, None] | jnp.zeros_like(alive)",
        "tests/test_control.py",
    ),
    Mutant(
        "robots of different groups share a step",
        "serving/scheduler.py",
        "[ticket for ticket in tickets if ticket.prepared.group == group]",
        "tickets",
        "tests/test_scheduler.py",
    ),
    Mutant(
        "a full batch waits out the delay",
        "serving/scheduler.py",
        "together >= min(",
        "together > min(",
        "tests/test_scheduler.py",
    ),
    Mutant(
        "a newer observation goes to the end of the queue",
        "serving/scheduler.py",
        "        self._waiting[robot] = ticket\n",
        "        self._waiting.pop(robot, None)\n        self._waiting[robot] = ticket\n",
        "tests/test_scheduler.py",
    ),
    Mutant(
        "data longer than its shape needs is taken",
        "serving/wire.py",
        "count * dtype.itemsize != len(data)",
        "count * dtype.itemsize > len(data)",
        "tests/test_wire.py",
    ),
    Mutant(
        "booleans may be any byte",
        "serving/wire.py",
        ".max(initial=0) > 1:",
        ".max(initial=0) > 255:",
        "tests/test_wire.py",
    ),
    Mutant(
        "one nested container too many",
        "serving/wire.py",
        "if len(waiting) - 1 > limits.depth:",
        "if len(waiting) - 2 > limits.depth:",
        "tests/test_wire.py",
    ),
)


def noticed(mutant: Mutant, folder: Path) -> bool:
    """Whether a named test fails where the package is broken so; `folder` holds a copy of the package."""
    file = folder / PACKAGE / mutant.file
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    command = [sys.executable, "-BP", "-m", "pytest", "-x", "-p", "no:cacheprovider", *mutant.tests.split()]
    try:
        result = subprocess.run(
            command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(folder)}, capture_output=True, text=True
        )
    finally:
        file.write_text(text, encoding="utf-8")
    if result.returncode not in (0, 1):
        raise RuntimeError(f"{mutant.what}: pytest ended with {result.returncode}\n{result.stdout}{result.stderr}")
    return result.returncode == 1


def main(names: list[str]) -> int:
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        copytree(ROOT / PACKAGE, Path(folder) / PACKAGE, ignore=ignore_patterns("__pycache__", "assets"))
        (Path(folder) / PACKAGE / "assets").symlink_to(ROOT / PACKAGE / "assets")
        for mutant in MUTANTS:
            if names and mutant.name not in names:
                continue
            start = time.monotonic()
            verdict = "noticed" if noticed(mutant, Path(folder)) else "SURVIVES"
            survivors += verdict == "SURVIVES"
            room, tests = mutant.file.partition("/")[0].removesuffix(".py"), Path(mutant.tests.split()[0]).stem
            print(f"| {room} | {mutant.what} | `{tests}` | {verdict} | {time.monotonic() - start:.0f} s |", flush=True)
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
