"""`openpi bench`: what a control step costs on this machine, against openpi and against the machine's limits.

openpi bench --config pi05_libero --dtype float32 --pruners safe fastv --keeps 0.3 0.2 0.1
openpi bench --config mini_libero --batches 1 2 4 8
openpi bench --config pi05_libero --openpi-python /path/to/openpi/.venv/bin/python
"""

import dataclasses
import itertools
import json
import logging
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from rich.progress import Progress

from safe_pruner_jax.bench import machine
from safe_pruner_jax.bench.baseline import Openpi, OpenpiUnavailable
from safe_pruner_jax.bench.modes import Mode, example_of, make, random_weights, roofline_s, shapes_of, step_mode
from safe_pruner_jax.bench.picture import bars, table
from safe_pruner_jax.engine import autotune
from safe_pruner_jax.model import pi0, quantisation
from safe_pruner_jax.model.config import Pi0Config
from safe_pruner_jax.model.quantisation import EightBit
from safe_pruner_jax.policy.policy import all_slots, layout_of
from safe_pruner_jax.pruners import factory, full
from safe_pruner_jax.robots.configs import get_config
from safe_pruner_jax.timing import WARM_UP, Step, interleave, ratio, spread

logger = logging.getLogger(__name__)

OPENPI, ALL_SLOTS, FULL = "openpi", "all slots", "full"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """Time control steps: openpi, all slots, every alive token, and pruned.

    Weights are random numbers of the real shapes, on which time does not depend. Every round runs every mode once;
    ratios are medians of the ratios within a round.

    Args:
      config: whose sizes; see `openpi serve --help`.
      dtype: weights and activations; the default is the configuration's.
      depth: layers of the language model and the expert, fewer than the model's: what does not fit, or not beside
        openpi, still gives ratios. Cuts stay where they are.
      views: real cameras.
      prompt: alive prompt tokens.
      num_steps: denoise steps.
      pruners: methods, each at every share of `keeps`; their keyframes once.
      keeps: shares of the visual tokens kept.
      quantise: 8-bit weights that every mode for one robot is also run with.
      batches: robots per step; more than one also with a quarter of them at a keyframe.
      rounds: counted rounds.
      minutes: no further round begins after so many minutes of timing; the report says how many there were.
      phases: whether to time the phases of each step too.
      openpi_python: interpreter that can import openpi, with its pins; without one, the baseline is this
        package's path with all slots.
      openpi_variant: "dummy" takes openpi's test sizes, to try things out.
      out: folder for NAME.json, NAME.md and NAME.png, and for NAME.rounds.jsonl, which gets every round as it ends.
      name: of these files.
    """

    config: str = "pi05_libero"
    dtype: Literal["bfloat16", "float32"] | None = None
    depth: int | None = None
    views: int = 2
    prompt: int = 20
    num_steps: int = 10
    pruners: tuple[str, ...] = ("safe",)
    keeps: tuple[float, ...] = (0.5, 0.3, 0.2, 0.1)
    quantise: tuple[EightBit, ...] = ()
    batches: tuple[int, ...] = (1,)
    rounds: int = 10
    minutes: float | None = None
    phases: bool = True
    openpi_python: str | None = None
    openpi_variant: str = ""
    out: Path = Path("out/bench")
    name: str = "bench"


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
    fits(config)
    args.out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        "command": " ".join(["openpi", *sys.argv[1:]]),
        "machine": machine.describe(),
        "model": args.config,
        "dtype": config.dtype,
        "depth": config.depth,
        "views": args.views,
        "prompt_tokens": args.prompt,
        "num_steps": args.num_steps,
        "rounds": args.rounds,
        "modes": {},
    }
    with Progress(transient=True) as progress:
        bar = progress.add_task("preparing")
        say = lambda what, **more: progress.update(bar, description=what, **more)
        times = _openpi_alone(args, config, report, say)
        measure(args, config, report, times, say)
    _leave(args, report)


def fits(config: Pi0Config) -> None:
    """Raises MemoryError when the weights cannot be held where they belong."""
    need = weights_bytes(config)
    if jax.default_backend() == "cpu":
        there, where = machine.available_bytes(), "host memory"
    else:
        there, where = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", math.inf), "device memory"
    if need > there:
        raise MemoryError(
            f"expected {need / 1e9:.1f} GB of {where} for {config.dtype} weights, got {there / 1e9:.1f} GB; "
            "close other programs, or choose --dtype bfloat16 or --config mini_libero"
        )


def weights_bytes(config: Pi0Config) -> int:
    """Size of the prepared weights, without making them."""
    return sum(math.prod(s.shape) * s.dtype.itemsize for s in jax.tree.leaves(shapes_of(config)))


def measure(args: Bench, config: Pi0Config, report: dict, before: dict[str, np.ndarray], say: Callable) -> None:
    """Times every mode of this package and fills `report`.

    Args:
      args, config: what to measure.
      report: gets "limits", "layout", "weights_bytes" and "modes".
      before: times of modes that were measured on their own.
      say: tells the progress.
    """
    say("measuring the machine's limits")
    limits = machine.limits(config.dtype)
    say("making weights")
    weights = jax.block_until_ready(random_weights(config, args.num_steps))
    say("trying kernels")
    config, found = autotune.on_gpu(weights, config)
    report["kernels"] = {name: dataclasses.asdict(finding) for name, finding in found.items()}
    example = example_of(config, args.views, args.prompt)
    alive, slots = layout_of(example, config), all_slots(config)
    report["limits"] = limits.as_json()
    report["layout"] = {"alive": alive.slots, "all slots": slots.slots, "visual": alive.visual, "text": alive.text}
    held = lambda tree: sum(a.nbytes for a in jax.tree.leaves(tree))
    report["weights_bytes"] = held(weights)
    modes: list[Mode] = []

    def add(name: str, layout: Any, pruner: Any, weights: pi0.Weights = weights, **options: Any) -> None:
        say(f"compiling {name}")
        modes.append(step_mode(name, weights, config, layout, example, pruner, **options))

    add(ALL_SLOTS, slots, full(), phases=args.phases)
    for robots in args.batches:
        times = "" if robots == 1 else f" ×{robots}"
        alone = {"robots": robots, "phases": args.phases and robots == 1}
        add(FULL + times, alive, full(), **alone)
        for pruner in args.pruners:
            for keep in args.keeps:
                add(f"{pruner} {keep:g}{times}", alive, make(pruner, keep), **alone)
            if not modes[-1].facts["refreshes"]:
                continue
            if robots == 1:
                add(f"{pruner} keyframe", alive, make(pruner, args.keeps[0]), keyframes=1, **alone)
            else:
                some = max(1, robots // 4)
                name = f"{pruner} {args.keeps[0]:g}{times}, {some} at a keyframe"
                add(name, alive, make(pruner, args.keeps[0]), robots=robots, keyframes=some, phases=False)
    for kind in args.quantise:
        say(f"making {kind} weights")
        usable = quantisation.usable(kind, config.dtype)
        report.setdefault("quantise", {})[kind] = usable or "not possible on this device"
        if usable != kind:
            continue
        small = quantisation.reduce(weights, kind)
        report["weights_bytes"] += held((small.prefix, small.expert))  # the rest is shared
        add(f"{FULL}, {kind}", alive, full(), small, phases=args.phases)
        for pruner, keep in itertools.product(args.pruners, args.keeps):
            add(f"{pruner} {keep:g}, {kind}", alive, make(pruner, keep), small, phases=args.phases)
    steps: dict[str, Step] = {}
    for mode in modes:
        say(f"memory of {mode.name}")
        mode.facts["peak_bytes"] = machine.peak_bytes(mode.step)
        steps |= {f"{mode.name}/step": mode.step} | {f"{mode.name}/{mark}": run for mark, run in mode.marks.items()}
    beside = report.pop("_openpi", None)
    if beside is not None:
        steps[OPENPI] = beside.step_seconds
    say("timing", total=args.rounds + WARM_UP, completed=0)
    with (args.out / f"{args.name}.rounds.jsonl").open("w", encoding="utf-8") as file:

        def ended(number: int, seconds: dict[str, float]) -> None:
            file.write(json.dumps({"round": number, "warm_up": number <= WARM_UP, "seconds": seconds}) + "\n")
            file.flush()
            say("timing", completed=number)

        budget = None if args.minutes is None else 60 * args.minutes
        times = interleave(steps, args.rounds, on_round=ended, seconds=budget)
    report["rounds"] = rounds = len(next(iter(times.values())))
    if beside is not None:
        beside.close()
        before = {OPENPI: times.pop(OPENPI)}
    whole = before | {mode.name: times[f"{mode.name}/step"] for mode in modes}
    base = OPENPI if OPENPI in whole else ALL_SLOTS
    report["baseline"] = base
    for mode in modes:
        own = {key.rpartition("/")[2]: t for key, t in times.items() if key.rpartition("/")[0] == mode.name}
        row = _row(own["step"], whole, base, rounds) | mode.facts
        row["robots_per_s"] = mode.robots / float(np.median(own["step"]))
        row["phases_ms"] = {k: dataclasses.asdict(spread(1e3 * v)) for k, v in mode.phases(own).items()}
        if mode.robots == 1 and "macs" in row:
            least = roofline_s(row["macs"], row["weight_bytes"], limits)
            row |= {"roofline_ms": 1e3 * least, "roofline_share": least / float(np.median(own["step"]))}
        report["modes"][mode.name] = row
    for name, t in before.items():
        report["modes"][name] = _row(t, whole, base, len(t)) | {"robots": 1} | report["openpi"]


def _row(times: np.ndarray, whole: dict[str, np.ndarray], base: str, rounds: int) -> dict[str, Any]:
    ms = spread(1e3 * times)
    row = {"ms": dataclasses.asdict(ms), "runs": rounds, "disturbed": ms.disturbed}
    for name in (base, FULL):
        to = whole[name]
        # rounds of a mode that ran on its own have no partner: its median stands in
        within = ratio(times, to) if len(to) == len(times) and name != OPENPI else ratio(times, np.median(to))
        row[f"times_{name.replace(' ', '_')}"] = dataclasses.asdict(within)
    return row


def _openpi_alone(args: Bench, config: Pi0Config, report: dict, say: Callable) -> dict[str, np.ndarray]:
    """openpi's times if it has to run before us, because both do not fit; else it waits in report["_openpi"]."""
    if args.openpi_python is None:
        report["openpi"] = "not measured: give --openpi-python an interpreter that can import it"
        return {}
    say("starting openpi")
    options = {"dtype": config.dtype, "cameras": args.views, "prompt": args.prompt, "horizon": config.action_horizon}
    options |= {"depth": args.depth} if args.depth is not None else {}
    options |= {"steps": args.num_steps} | ({"variant": args.openpi_variant} if args.openpi_variant else {})
    try:
        child = Openpi(args.openpi_python, **options)
        report["openpi"] = child.facts
        both = machine.available_bytes() if jax.default_backend() == "cpu" else math.inf
        report["interleaved_with_openpi"] = 1.3 * weights_bytes(config) < both
        if report["interleaved_with_openpi"]:
            report["_openpi"] = child
            return {}
        times = interleave({OPENPI: child.step_seconds}, args.rounds, warm_up=1)
        child.close()
        return times
    except OpenpiUnavailable as error:
        report["openpi"] = f"not measured: {error}"
        logger.warning("%s; the baseline is this package's path with all slots", error)
        return {}


def _leave(args: Bench, report: dict[str, Any]) -> None:
    text = table(report)
    (args.out / f"{args.name}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (args.out / f"{args.name}.md").write_text(text, encoding="utf-8")
    bars(report).savefig(args.out / f"{args.name}.png")
    print(text, end="")
    restless = [name for name, row in report["modes"].items() if row["disturbed"]]
    if restless:
        print(f"\nDISTURBED: {', '.join(restless)}: the quartiles are more than 15 % apart; repeat on a quiet machine")
    print(f"\neverything is in {args.out / args.name}.json, .md and .png")
