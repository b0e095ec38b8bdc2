"""`openpi bench`: what a control step costs on this machine, against openpi and against the machine's limits.

openpi bench --config pi05_libero --dtype float32 --pruners safe fastv --keeps 0.3 0.2 0.1
openpi bench --config mini_libero --batches 1 2 4 8
openpi bench --config pi05_libero --openpi-python /path/to/openpi/.venv/bin/python
openpi bench --config pi05_libero --keeps 0.2 --compile-for h100 rtx4090 orin --name launches
"""

import json
import sys
from importlib import metadata
from typing import Any

from rich.progress import Progress

from safe_pruner_jax.bench import launches, machine
from safe_pruner_jax.bench.measure import Bench, fits, measure, openpi_baseline
from safe_pruner_jax.bench.picture import bars, table
from safe_pruner_jax.engine import xla
from safe_pruner_jax.model.config import Pi0Config
from safe_pruner_jax.pruners import factory
from safe_pruner_jax.robots.configs import get_config


def run_bench(args: Bench) -> None:
    """Measures, prints the table, writes the files.

    Raises:
      ValueError: what cannot be measured as asked.
      MemoryError: the weights do not fit; nothing has been allocated yet.
    """
    for name in args.pruners:
        factory(name)
    config = get_config(args.config).model
    config = config.replace(dtype=args.dtype or config.dtype)
    if args.depth is not None:
        config = config.with_depth(args.depth)
    platform = "gpu" if args.compile_for else None
    config = config.replace(savings=xla.savings(platform) if args.savings is None else args.savings)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.compile_for:
        return _compile(args, config.replace(kernels=args.kernels))
    fits(config)
    report: dict[str, Any] = {
        "command": " ".join(["openpi", *sys.argv[1:]]),
        "machine": machine.describe(),
        **_sizes(args, config),
    }
    with Progress(transient=True) as progress:
        bar = progress.add_task("preparing")

        def say(what: str, **more: Any) -> None:
            progress.update(bar, description=what, **more)

        baseline = openpi_baseline(args, config, say)
        report |= baseline.in_report()
        report |= measure(args, config, baseline, say)
    _write(args, report)


def _sizes(args: Bench, config: Pi0Config) -> dict[str, Any]:
    return {
        "model": args.config,
        "dtype": config.dtype,
        "depth": config.depth,
        "views": args.views,
        "prompt_tokens": args.prompt,
        "num_steps": args.num_steps,
        "savings": list(config.savings),
        "kernels": list(config.kernels),
    }


def _compile(args: Bench, config: Pi0Config) -> None:
    """`--compile-for`: nothing is run; the files are those of a measurement, and say what they are."""
    report: dict[str, Any] = {
        "command": " ".join(["openpi", *sys.argv[1:]]),
        "versions": {name: metadata.version(name) for name in ("jax", "jaxlib")},
        **_sizes(args, config),
    }
    with Progress(transient=True) as progress:
        bar = progress.add_task("preparing")
        report |= launches.compile_for(args, config, lambda what, **_: progress.update(bar, description=what))
    text = launches.table(report)
    (args.out / f"{args.name}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (args.out / f"{args.name}.md").write_text(text, encoding="utf-8")
    launches.bars(report).savefig(args.out / f"{args.name}.png")
    print(text + f"\neverything is in {args.out / args.name}.json, .md and .png")


def _write(args: Bench, report: dict[str, Any]) -> None:
    text = table(report)
    (args.out / f"{args.name}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (args.out / f"{args.name}.md").write_text(text, encoding="utf-8")
    bars(report).savefig(args.out / f"{args.name}.png")
    print(text, end="")
    restless = [name for name, row in report["modes"].items() if row["disturbed"]]
    if restless:
        print(f"\nDISTURBED: {', '.join(restless)}: the quartiles are more than 15 % apart; repeat on a quiet machine")
    print(f"\neverything is in {args.out / args.name}.json, .md and .png")
