"""`openpi sweep`: success against the share of visual tokens kept, every method at every share, then the report.

    openpi sweep --suite libero_object --trials 50 --out out/sweep
    openpi sweep --suite libero_object --shard 2/4 …              a part of every cell, on another machine
    openpi sweep --suite libero_object --on ray --address auto …  every cell on all nodes of a cluster
    openpi sweep --suite libero_object --report-only              cells of all shards below --out

A cell is one `openpi evaluate` with a records file of its own. The same command again skips finished cells, goes on
with the one that was interrupted, and reports on everything that is there; success_by_keep.png is the sweep, with
Wilson's 95 % intervals.
"""

import dataclasses
import inspect
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from safe_pruner_jax.cli.arguments import parse
from safe_pruner_jax.cli.evaluate import Evaluate
from safe_pruner_jax.cli.report import Report, run_report
from safe_pruner_jax.evaluation.evaluate import episodes
from safe_pruner_jax.evaluation.records import RecordsError, read_records
from safe_pruner_jax.evaluation.shards import read_shard
from safe_pruner_jax.libero.env import num_tasks
from safe_pruner_jax.policy.identity import METHOD, MODEL, differences
from safe_pruner_jax.policy.spec import check_choices, split_method
from safe_pruner_jax.pruners import PRUNERS, factory
from safe_pruner_jax.pruners.ablations import ABLATIONS
from safe_pruner_jax.pruners.baselines import BASELINES

MEMORYLESS = ("random", "fastv", "divprune", "sparsevlm")
"""Pruners that every call starts anew: with three full calls first, they have what the others begin with."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """Play every method at every share of tokens kept, and report; the same command again continues.

    Args:
      suite: of LIBERO.
      tasks: of the suite; all of them by default.
      trials: episodes per task and cell.
      keeps: shares of the visual tokens kept.
      methods: names of pruners; `safe-paper` (features Z, λ = 0.5, no pool, the most similar token: the paper's; γ and
        warm start as calibrated), `safe-topk` (the best tokens and no pool), `safe-shallow` (λ = 0, "w/o forecast"),
        `safe-every` (a keyframe at a fixed interval, "w/o division") and `random-warm`, `fastv-warm`, `divprune-warm`,
        `sparsevlm-warm` (three full calls first, as in `vla_pruner`); choices after a colon, fastv:warm_start=1, of
        which `keep` takes the place of `keeps`; `full` is always played.
      every: keyframe interval of `safe-every`, policy calls.
      shard: i/n plays the i-th of n parts of every cell; "slurm" the part of this task of a job array.
      out: folder; one records file per cell and shard in it, then the report.
      evaluate: the policy and further arguments of `openpi evaluate`, as one string that begins with the policy.
      on: this machine, or the nodes of a Ray cluster.
      address: of the cluster: auto, host:port or ray://host:10001; without it one is started on this machine.
      policies: on the cluster; see openpi evaluate.
      simulators: on the cluster; see openpi evaluate.
      report_only: plays nothing.
    """

    suite: str = "libero_object"
    tasks: tuple[int, ...] = ()
    trials: int = 50
    keeps: tuple[float, ...] = (0.5, 0.3, 0.2, 0.1)
    methods: tuple[str, ...] = ("safe", "safe-shallow", "safe-every", "fastv", "random")
    every: int = 10
    shard: str = "1/1"
    out: Path = Path("out/sweep")
    evaluate: str = "policy:embedded"
    on: Literal["here", "ray"] = "here"
    address: str | None = None
    policies: int | None = None
    simulators: int | None = None
    report_only: bool = False

    @property
    def part(self) -> tuple[int, int]:
        """(i, n) of the shard; raises ValueError."""
        return read_shard(self.shard, os.environ)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One method at one share kept: its name, and the pruner's arguments."""

    name: str
    arguments: tuple[str, ...]


def cells(sweep: Sweep) -> list[Cell]:
    """`full` first, then method after method, in the order of the shares.

    Raises:
      ValueError: an unknown method, or a choice that it does not have.
    """
    choices = {name: (f"--pruner={name}",) for name in (*PRUNERS, *ABLATIONS, *BASELINES) if name != "full"}
    choices["safe-shallow"] = ("--pruner=safe", "--pruner.fuse", "0.0")
    paper = {"features": "Z", "fuse": 0.5, "soft": 0.0, "pool": 1.0}
    written = [word for name, value in paper.items() for word in (f"--pruner.{name}", str(value))]
    choices["safe-paper"] = ("--pruner=safe", *written)
    choices["safe-topk"] = ("--pruner=safe", "--pruner.pool", "1.0")
    choices["safe-every"] = ("--pruner=safe", "--pruner.every", str(sweep.every))
    choices |= {f"{name}-warm": (f"--pruner={name}", "--pruner.warm-start", "3") for name in MEMORYLESS}
    methods = [split_method(method) for method in sweep.methods]
    if unknown := {name for name, _ in methods} - set(choices):
        raise ValueError(f"methods: expected some of {', '.join(choices)}, got {', '.join(sorted(unknown))}")
    result = [Cell("full", ("--pruner=full",))]
    for text, (name, given) in zip(sweep.methods, methods, strict=True):
        method = choices[name][0].removeprefix("--pruner=")
        check_choices(text, method, given, inspect.signature(factory(method)).parameters)
        keep = given.pop("keep", None)
        values = {key: [part for part in value.strip("()").split(",") if part] for key, value in given.items()}
        label = "-".join([name.replace("/", "-"), *(key + "_".join(parts) for key, parts in values.items())])
        options = [word for key, parts in values.items() for word in (f"--pruner.{key.replace('_', '-')}", *parts)]
        for share in (f"{keep:g}" for keep in sweep.keeps) if keep is None else [keep]:
            result.append(Cell(f"{label}-keep{share}", (*choices[name], *options, "--pruner.keep", share)))
    return result


def records_file(sweep: Sweep, cell: Cell) -> Path:
    """Where a cell's records are: shards are told apart by the name."""
    part, parts = sweep.part
    end = "" if parts == 1 else f".{part}-of-{parts}"
    return sweep.out / f"{cell.name}{end}.jsonl"


def arguments(sweep: Sweep, cell: Cell) -> list[str]:
    """The command line of `openpi evaluate` for a cell."""
    options = ["--suite", sweep.suite, "--trials", str(sweep.trials), "--shard", "/".join(map(str, sweep.part))]
    options += ["--on", sweep.on]
    for name in ("address", "policies", "simulators"):
        if (value := getattr(sweep, name)) is not None:
            options += [f"--{name}", str(value)]
    options += ["--tasks", *map(str, sweep.tasks)] if sweep.tasks else []
    return [*options, "--out", str(records_file(sweep, cell)), *cell.arguments, *shlex.split(sweep.evaluate)]


def missing(sweep: Sweep, cell: Cell) -> int:
    """How many of a cell's episodes (of this shard) are not recorded.

    Raises:
      RecordsError: the records are of another policy or method.
    """
    tasks = sweep.tasks or range(num_tasks(sweep.suite))
    jobs = episodes(sweep.suite, tasks, sweep.trials, shard=sweep.part)
    path = records_file(sweep, cell)
    records = read_records(path) if path.exists() else []
    if records:
        args, method = parse(Evaluate, arguments(sweep, cell), "openpi evaluate")
        now = args.describe("LIBERO", args.fit("LIBERO", method, args.replan)).as_json()
        same = lambda c: {key: c[key] for key in (*MODEL, *METHOD)}
        if differing := differences(same(records[-1].configuration), same(now)):
            raise RecordsError(
                f"{path}: expected records of this policy, got others ({differing[0]}); choose another --out"
            )
    done = {record.key for record in records}
    return sum((job.suite, job.task, job.trial) not in done for job in jobs)


def play(sweep: Sweep, cell: Cell) -> int:
    """Runs `openpi evaluate` for a cell in a process of its own; its exit code."""
    return subprocess.run([sys.executable, "-m", "safe_pruner_jax", "evaluate", *arguments(sweep, cell)]).returncode


def run(sweep: Sweep, play: Callable[[Sweep, Cell], int] = play) -> int:
    """Plays what is missing, cell after cell, and reports; exit code of the first cell that failed, else 0."""
    sweep.out.mkdir(parents=True, exist_ok=True)
    todo = [] if sweep.report_only else cells(sweep)
    for cell in todo:  # a value out of range is said before the first episode
        parse(Evaluate, arguments(sweep, cell), "openpi evaluate")
    for number, cell in enumerate(todo, 1):
        episodes = missing(sweep, cell)
        what = f"{episodes} episodes to play" if episodes else "finished"
        print(f"[{number}/{len(todo)}] {cell.name}: {what}", flush=True)
        if episodes and (code := play(sweep, cell)):
            print(
                f"openpi sweep: {cell.name} ended with exit code {code}; the same command continues there",
                file=sys.stderr,
            )
            return code
    # other shards and earlier sweeps count as well: the report keeps unlike conditions apart
    files = sorted(path for path in sweep.out.glob("*.jsonl") if path.stat().st_size)
    if not files:
        raise ValueError(f"out: expected records in {sweep.out}, got none; run without --report-only first")
    print(f"\nreport.md, report.csv and the figures: {sweep.out}; the sweep is success_by_keep.png\n", flush=True)
    run_report(Report(tuple(files), out=sweep.out))
    return 0


def run_sweep(sweep: Sweep) -> int:
    """Exit code: 0 done, otherwise that of the cell that failed."""
    return run(sweep)
