"""What is measured in a benchmark: modes of this package timed in turns, openpi beside them or before them."""

import dataclasses
import itertools
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from safe_pruner_jax.bench import machine
from safe_pruner_jax.bench.baseline import Openpi, OpenpiUnavailable
from safe_pruner_jax.bench.modes import Mode, example_of, make, random_weights, roofline_s, shapes_of, step_mode
from safe_pruner_jax.engine import autotune
from safe_pruner_jax.model import pi0, quantisation
from safe_pruner_jax.model.config import Pi0Config, Saving
from safe_pruner_jax.model.quantisation import EightBit
from safe_pruner_jax.policy.policy import all_slots, layout_of
from safe_pruner_jax.pruners import Pruner, full
from safe_pruner_jax.timing import WARM_UP, Step, interleave, ratio, spread
from safe_pruner_jax.tokens import PrefixLayout

logger = logging.getLogger(__name__)

OPENPI, ALL_SLOTS, FULL = "openpi", "all slots", "full"

Say = Callable[..., None]
"""Tells the progress: what is being done, and `total` and `completed` where there are steps to count."""


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
      compile_for: GPUs (h100, h200, rtx4090, rtx5090, orin, thor) that the programs are compiled for instead of being
        run here: launches, memory and a modelled time. Takes jax's CUDA plugin (extra `aot`) and no GPU.
      extend: with `compile_for`, compile the model with few layers and with one more, and extend what that one has to
        the model's depth: minutes instead of hours, and the same launches, since layers are alike.
      undo: with `compile_for`, also compile without each saving and kernel what it changes; of the first method, share
        and number of robots.
      savings: what programs do for fewer launches, names of `model.config.SAVINGS`; None: what pays on the platform.
      kernels: with `compile_for`, names of `model.config.KERNELS` that programs are compiled with; here they are chosen
        by measurement.
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
    compile_for: tuple[str, ...] = ()
    extend: bool = False
    undo: bool = False
    savings: tuple[Saving, ...] | None = None
    kernels: tuple[str, ...] = ()
    out: Path = Path("out/bench")
    name: str = "bench"


@dataclasses.dataclass(frozen=True)
class Baseline:
    """openpi, as far as it could be had.

    Args:
      facts: what it says of itself, or why there is none.
      child: alive and waiting to be timed in turns with the modes.
      times: [rounds] seconds, measured on its own because both do not fit at once.
    """

    facts: dict[str, Any] | str
    child: Openpi | None = None
    times: np.ndarray | None = None

    def in_report(self) -> dict[str, Any]:
        """Its part of the report."""
        there = self.child is not None or self.times is not None
        return {"openpi": self.facts} | ({"interleaved_with_openpi": self.child is not None} if there else {})


@dataclasses.dataclass
class Candidates:
    """The modes that are compared: one model at several settings.

    Args:
      args, config: what to measure.
      weights: of the model.
      say: tells the progress.

    Attributes:
      modes: those added so far.
      weights_bytes: held on the device.
      quantise: 8-bit kind → what this device makes of it.
    """

    args: Bench
    config: Pi0Config
    weights: pi0.Weights
    say: Say
    modes: list[Mode] = dataclasses.field(default_factory=list)
    weights_bytes: int = 0
    quantise: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        self.example = example_of(self.config, self.args.views, self.args.prompt)
        self.alive, self.slots = layout_of(self.example, self.config), all_slots(self.config)
        self.weights_bytes = held(self.weights)

    def add(
        self, name: str, layout: PrefixLayout, pruner: Pruner, weights: pi0.Weights | None = None, **options: Any
    ) -> None:
        """Compiles one mode."""
        self.say(f"compiling {name}")
        weights = self.weights if weights is None else weights
        self.modes.append(step_mode(name, weights, self.config, layout, self.example, pruner, **options))

    def add_all(self) -> None:
        """All slots, then every alive token and every pruner at every number of robots, then 8 bits."""
        self.add(ALL_SLOTS, self.slots, full(), phases=self.args.phases)
        for robots in self.args.batches:
            self._of_a_batch(robots)
        for kind in self.args.quantise:
            self._in_8_bits(kind)

    def _of_a_batch(self, robots: int) -> None:
        args, times = self.args, "" if robots == 1 else f" ×{robots}"
        alone = {"robots": robots, "phases": args.phases and robots == 1}
        self.add(FULL + times, self.alive, full(), **alone)
        for pruner in args.pruners:
            for keep in args.keeps:
                self.add(f"{pruner} {keep:g}{times}", self.alive, make(pruner, keep), **alone)
            if not self.modes[-1].facts["refreshes"]:
                continue
            first = make(pruner, args.keeps[0])
            if robots == 1:
                self.add(f"{pruner} keyframe", self.alive, first, keyframes=1, **alone)
            else:
                some = max(1, robots // 4)
                name = f"{pruner} {args.keeps[0]:g}{times}, {some} at a keyframe"
                self.add(name, self.alive, first, robots=robots, keyframes=some, phases=False)

    def _in_8_bits(self, kind: EightBit) -> None:
        self.say(f"making {kind} weights")
        usable = quantisation.usable(kind, self.config.dtype)
        self.quantise[kind] = usable or "not possible on this device"
        if usable != kind:
            return
        small = quantisation.reduce(self.weights, kind)
        self.weights_bytes += held((small.prefix, small.expert))  # the rest is shared
        self.add(f"{FULL}, {kind}", self.alive, full(), small, phases=self.args.phases)
        for pruner, keep in itertools.product(self.args.pruners, self.args.keeps):
            self.add(f"{pruner} {keep:g}, {kind}", self.alive, make(pruner, keep), small, phases=self.args.phases)


def held(tree: Any) -> int:
    """Bytes of the arrays of a tree."""
    return sum(a.nbytes for a in jax.tree.leaves(tree))


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


def openpi_baseline(args: Bench, config: Pi0Config, say: Say) -> Baseline:
    """openpi in a process of its own, waiting; already timed, if it does not fit beside this package."""
    if args.openpi_python is None:
        return Baseline("not measured: give --openpi-python an interpreter that can import it")
    say("starting openpi")
    options = {"dtype": config.dtype, "cameras": args.views, "prompt": args.prompt, "horizon": config.action_horizon}
    options |= {"depth": args.depth} if args.depth is not None else {}
    options |= {"steps": args.num_steps} | ({"variant": args.openpi_variant} if args.openpi_variant else {})
    try:
        child = Openpi(args.openpi_python, **options)
        both = machine.available_bytes() if jax.default_backend() == "cpu" else math.inf
        if 1.3 * weights_bytes(config) < both:
            return Baseline(child.facts, child)
        times = interleave({OPENPI: child.step_seconds}, args.rounds, warm_up=1)
        child.close()
        return Baseline(child.facts, times=times[OPENPI])
    except OpenpiUnavailable as error:
        logger.warning("%s; the baseline is this package's path with all slots", error)
        return Baseline(f"not measured: {error}")


def measure(args: Bench, config: Pi0Config, baseline: Baseline, say: Say) -> dict[str, Any]:
    """Times every mode of this package, and openpi if it waits.

    Args:
      args, config: what to measure.
      baseline: openpi; it is closed.
      say: tells the progress.

    Returns:
      "limits", "kernels", "layout", "weights_bytes", "rounds", "baseline" and "modes" of the report.
    """
    say("measuring the machine's limits")
    limits = machine.limits(config.dtype)
    say("making weights")
    weights = jax.block_until_ready(random_weights(config, args.num_steps))
    say("trying kernels")
    config, kernels = autotune.on_gpu(weights, config)
    candidates = Candidates(args, config, weights, say)
    candidates.add_all()
    alive, modes = candidates.alive, candidates.modes
    times = _times(args, modes, baseline, say)
    rounds = len(next(iter(times.values())))
    if baseline.times is not None:
        times[OPENPI] = baseline.times
    base = OPENPI if OPENPI in times else ALL_SLOTS
    return {
        "kernels": {name: dataclasses.asdict(finding) for name, finding in kernels.items()},
        "limits": limits.as_json(),
        "layout": {
            "alive": alive.slots,
            "all slots": candidates.slots.slots,
            "visual": alive.visual,
            "text": alive.text,
        },
        "weights_bytes": candidates.weights_bytes,
        **({"quantise": candidates.quantise} if candidates.quantise else {}),
        "rounds": rounds,
        "baseline": base,
        "modes": dict(_rows(modes, times, base, limits, baseline)),
    }


def _times(args: Bench, modes: list[Mode], baseline: Baseline, say: Say) -> dict[str, np.ndarray]:
    """Seconds [rounds] of every step "mode/mark", and of openpi if it waits; round by round into a file, too."""
    steps: dict[str, Step] = {}
    for mode in modes:
        say(f"memory of {mode.name}")
        mode.facts["peak_bytes"] = machine.peak_bytes(mode.step)
        steps |= {f"{mode.name}/step": mode.step} | {f"{mode.name}/{mark}": run for mark, run in mode.marks.items()}
    if baseline.child is not None:
        steps[OPENPI] = baseline.child.step_seconds
    say("timing", total=args.rounds + WARM_UP, completed=0)
    with (args.out / f"{args.name}.rounds.jsonl").open("w", encoding="utf-8") as file:

        def ended(number: int, seconds: dict[str, float]) -> None:
            file.write(json.dumps({"round": number, "warm_up": number <= WARM_UP, "seconds": seconds}) + "\n")
            file.flush()
            say("timing", completed=number)

        budget = None if args.minutes is None else 60 * args.minutes
        times = interleave(steps, args.rounds, on_round=ended, seconds=budget)
    if baseline.child is not None:
        baseline.child.close()
    return times


def _rows(
    modes: list[Mode], times: Mapping[str, np.ndarray], base: str, limits: machine.Limits, baseline: Baseline
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and row of the report, of every mode and of openpi if it was timed."""
    whole = {mode.name: times[f"{mode.name}/step"] for mode in modes}
    whole |= {OPENPI: times[OPENPI]} if OPENPI in times else {}
    for mode in modes:
        marks = {key.rpartition("/")[2]: t for key, t in times.items() if key.rpartition("/")[0] == mode.name}
        row = _row(marks["step"], whole, base, len(marks["step"])) | mode.facts
        row["robots_per_s"] = mode.robots / float(np.median(marks["step"]))
        row["phases_ms"] = {k: dataclasses.asdict(spread(1e3 * v)) for k, v in mode.phases(marks).items()}
        if mode.robots == 1 and "macs" in row:
            least = roofline_s(row["macs"], row["weight_bytes"], limits)
            row |= {"roofline_ms": 1e3 * least, "roofline_share": least / float(np.median(marks["step"]))}
        yield mode.name, row
    if OPENPI in whole and isinstance(baseline.facts, dict):
        t = whole[OPENPI]
        yield OPENPI, _row(t, whole, base, len(t)) | {"robots": 1} | baseline.facts


def _row(times: np.ndarray, whole: dict[str, np.ndarray], base: str, rounds: int) -> dict[str, Any]:
    ms = spread(1e3 * times)
    row = {"ms": dataclasses.asdict(ms), "runs": rounds, "disturbed": ms.disturbed}
    for name in (base, FULL):
        to = whole[name]
        # rounds of a mode that ran on its own have no partner: its median stands in
        within = ratio(times, to) if len(to) == len(times) and name != OPENPI else ratio(times, np.median(to))
        row[f"times_{name.replace(' ', '_')}"] = dataclasses.asdict(within)
    return row
