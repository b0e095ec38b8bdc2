"""`openpi bench --compile-for`: control steps of several GPUs compiled and counted, as a report, a table and bars.

report = compile_for(args, config, say)      plain numbers; targets that cannot be had are lines of text
table(report), bars(report)
"""

import dataclasses
import itertools
import logging
from collections import Counter
from functools import partial
from typing import Any

from matplotlib.figure import Figure

from safe_pruner_jax.bench import aot, openpi_launches
from safe_pruner_jax.bench.measure import Bench, Say
from safe_pruner_jax.bench.modelled import LEAST_US, Assumptions, launches_time, sequence_time
from safe_pruner_jax.bench.targets import Target, TargetError, target
from safe_pruner_jax.bench.thunks import Launch, Sequence
from safe_pruner_jax.bench.undone import undone
from safe_pruner_jax.figures.theme import form, markdown, panels
from safe_pruner_jax.model.config import Pi0Config

logger = logging.getLogger(__name__)

STEPS = {"full": ("decision", "full"), "pruned": ("decision", "pruned")}
"""Programs that a control step runs, one after the other."""

COLOURS = {"launch": "#0072b2", "memory": "#e69f00", "products": "#d55e00"}

OPENPI = "openpi"

EXTENDED = "extended from few layers to the model's"


def compile_for(args: Bench, config: Pi0Config, say: Say) -> dict[str, Any]:
    """Compiles every program for every target.

    Args:
      args: `compile_for` names the targets; sizes, method and denoise steps as for a benchmark.
      config: the model.
      say: tells the progress.

    Returns:
      {"assumptions": …, "targets": {name: {"target": …, "programs": {name × robots: …}, "failed": {name: line}}}}. What
      cannot be compiled is a line in "failed" or, for a target as a whole, in place of its entry.
    """
    rows: dict[str, Any] = {}
    for name in args.compile_for:
        try:
            rows[name] = _for_target(target(name), args, config, say)
        except TargetError as error:
            logger.warning("%s", error)
            rows[name] = str(error)
    return {
        "kind": "compiled, not run; times are modelled" + (f"; {EXTENDED}" if args.extend else ""),
        "assumptions": {"least_us": list(LEAST_US)} | dataclasses.asdict(Assumptions(dtype=config.dtype)),
        "targets": rows,
    }


def _for_target(to: Target, args: Bench, config: Pi0Config, say: Say) -> dict[str, Any]:
    gpu = aot.device(to)
    out: dict[str, Any] = {"target": dataclasses.asdict(to), "programs": {}, "failed": {}}

    def programs_of(config: Pi0Config, pruner: str, keep: float, robots: int) -> tuple[dict[str, aot.Program], ...]:
        chosen = {"keep": keep, "robots": robots, "views": args.views, "prompt": args.prompt}
        sizes = _few_layers(config) if args.extend else (config,)
        return tuple(aot.programs(size, pruner, num_steps=args.num_steps, **chosen) for size in sizes)

    def compile_row(config: Pi0Config, sizes: tuple[dict[str, aot.Program], ...], name: str) -> dict[str, Any]:
        low, *high = [row(aot.compiled(gpu, programs[name]), to, config.dtype) for programs in sizes]
        return extended(low, high[0], _layers_left(config, name)) if high else low

    for robots, pruner, keep in itertools.product(args.batches, args.pruners, args.keeps):
        sizes = programs_of(config, pruner, keep, robots)
        for name in sizes[0]:
            full_name = program_name(name, pruner, keep, robots)
            if full_name in out["programs"] or full_name in out["failed"]:
                continue
            say(f"{to.name}: {full_name}")
            try:
                out["programs"][full_name] = compile_row(config, sizes, name)
            except TargetError as error:
                logger.warning("target %s: %s: %s", to.name, full_name, error)
                out["failed"][full_name] = str(error)
    if args.undo:
        say(f"{to.name}: without each saving and kernel")
        first = partial(programs_of, pruner=args.pruners[0], keep=args.keeps[0], robots=args.batches[0])
        out["without"] = undone(config, first, compile_row)
    if args.openpi_python is not None:
        say(f"{to.name}: {OPENPI}")
        try:
            out["programs"][OPENPI] = row(openpi_launches.compiled(to, args, config), to, config.dtype)
        except TargetError as error:
            logger.warning("%s", error)
            out["failed"][OPENPI] = str(error)
    return out


LAYERS, BLOCKS = 4, 1
"""Layers of the language model and blocks of the vision tower that are compiled, with `Bench.extend`, and one more."""


def _few_layers(config: Pi0Config) -> tuple[Pi0Config, Pi0Config]:
    def small(more: int) -> Pi0Config:
        vision = dataclasses.replace(config.vision, depth=BLOCKS + more)
        return config.with_depth(LAYERS + more).replace(vision=vision)

    return small(0), small(1)


def _layers_left(config: Pi0Config, name: str) -> int:
    """How often a program of the model has what one of a layer (or block) more has: the second halves have no tower."""
    second = {programs[-1] for programs in STEPS.values()}
    return config.depth - LAYERS if name in second else config.vision.depth - BLOCKS


def extended(low: dict[str, Any], high: dict[str, Any], more: int) -> dict[str, Any]:
    """The row of a program that has `more` times what the second of two has beyond the first.

    Temporaries are the second's: layers use the same ones, one after the other.
    """
    out = dict(high)
    grow = lambda a, b: a + more * (b - a)
    for key in ("outside", "per_denoise_step", "launches", "starts", "argument_bytes", "bytes", "macs"):
        out[key] = grow(low[key], high[key])
    if len(low["graphs"]) == len(high["graphs"]):
        out["graphs"] = list(map(grow, low["graphs"], high["graphs"]))
    out["modelled_s"] = {
        us: {part: grow(low["modelled_s"][us][part], there[part]) for part in there}
        for us, there in high["modelled_s"].items()
    }
    out["loop_modelled_s"] = {
        us: grow(low["loop_modelled_s"][us], there) for us, there in high["loop_modelled_s"].items()
    }
    for key in ("kinds", "loop_kinds"):
        out[key] = {k: grow(low[key].get(k, 0), high[key].get(k, 0)) for k in {**high[key], **low[key]}}
    out["compile_s"] = round(low["compile_s"] + high["compile_s"], 1)
    return out


def program_name(name: str, pruner: str, keep: float, robots: int) -> str:
    """What a program is called in a report; vision and the layers before a cut are the same at every share kept."""
    times = "" if robots == 1 else f" ×{robots}"
    return f"{name}, {pruner} {keep:g}{times}" if name == "pruned" else f"{name}, {pruner}{times}"


def row(done: aot.Compiled, to: Target, dtype: str) -> dict[str, Any]:
    """One program in plain numbers."""
    s = done.sequence
    everything = [*s.outside, *(dataclasses.replace(launch, times=launch.times * s.turns) for launch in s.loop)]
    loop = lambda us: launches_time(s.loop, to, Assumptions(us, dtype=dtype)).total
    total = lambda part: sum(launch.times * getattr(launch.cost, part) for launch in everything)
    return {
        "outside": sum(launch.times for launch in s.outside),
        "per_denoise_step": sum(launch.times for launch in s.loop),
        "denoise_steps": s.turns,
        "launches": s.total,
        "graphs": s.graphs,
        "loop_in_graph": s.loop_in_graph,
        "starts": s.starts,
        "argument_bytes": done.argument_bytes,
        "temporary_bytes": done.temporary_bytes,
        "bytes": total("bytes"),
        "macs": total("macs"),
        "modelled_s": {f"{us:g} µs": dataclasses.asdict(_time(s, to, us, dtype)) for us in LEAST_US},
        "loop_modelled_s": {f"{us:g} µs": loop(us) for us in LEAST_US},
        "compile_s": round(done.seconds, 1),
        "kinds": kinds(s.outside),
        "loop_kinds": kinds(s.loop),
    }


def _time(s: Sequence, to: Target, least_us: float, dtype: str) -> Any:
    return sequence_time(s, to, Assumptions(least_us, dtype=dtype))


def kinds(launches: list[Launch]) -> dict[str, int]:
    """Launches by the stem of their kernels' names, the most frequent first."""
    counted: Counter[str] = Counter()
    for launch in launches:
        stem = launch.name.rstrip("0123456789").rstrip("._")
        counted[stem or launch.kind] += launch.times
    return dict(counted.most_common())


def steps(programs: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Whole control steps: what their programs launch and take together, as far as all of them were compiled."""
    out: dict[str, dict[str, Any]] = {}
    for name, second in programs.items():
        kind, _, how = name.partition(", ")
        if kind not in STEPS:
            continue
        method, _, times = how.partition("×")
        first = f"decision, {method.split(' ')[0]}" + (f" ×{times}" if times else "")
        if first in programs:
            out[name] = _sum(programs[first], second)
    if OPENPI in programs:
        out[OPENPI] = _sum(programs[OPENPI])
    return out


def _sum(*rows: dict[str, Any]) -> dict[str, Any]:
    last = rows[-1]
    times = {us: {k: sum(r["modelled_s"][us][k] for r in rows) for k in COLOURS} for us in last["modelled_s"]}
    added = {k: sum(r[k] for r in rows) for k in ("launches", "outside", "starts", "bytes", "macs") if k in last}
    return added | {"per_denoise_step": last["per_denoise_step"], "modelled_s": times}


def table(report: dict[str, Any]) -> str:
    """Programs of every target, and whole steps; lines of text for what could not be compiled."""
    text = ""
    for name, found in report["targets"].items():
        if isinstance(found, str):
            text += f"{found}\n\n"
            continue
        text += f"{found['target']['title']}, {report['kind']}:\n\n" + _programs(found["programs"])
        text += "\nWhole control steps there, modelled:\n\n" + _steps(found["programs"])
        text += "".join(f"\n{name}: {program}: {why}\n" for program, why in found["failed"].items()) + "\n"
    return text


def _programs(programs: dict[str, Any]) -> str:
    columns = ["program", "launches outside the loop", "per denoise step", "in all", "CUDA graphs", "host starts"]
    columns += ["arguments, GB", "temporaries, MB", "moved, GB", "10⁹ multiply-adds"]
    lines = []
    for name, r in programs.items():
        graphs = f"{len(r['graphs'])}" + (", the loop in one" if r["loop_in_graph"] else "")
        sizes = [f"{r['argument_bytes'] / 1e9:.2f}", f"{r['temporary_bytes'] / 1e6:.0f}", f"{r['bytes'] / 1e9:.2f}"]
        counts = [r["outside"], r["per_denoise_step"] or None, r["launches"], graphs, r["starts"]]
        lines.append([name, *counts, *sizes, f"{r['macs'] / 1e9:.0f}"])
    return markdown(columns, lines)


def _steps(programs: dict[str, Any]) -> str:
    us = [f"{least:g} µs" for least in LEAST_US]
    lines = []
    for name, r in steps(programs).items():
        total = lambda part, r=r: 1e3 * sum(r["modelled_s"][part].values())
        bound = r["modelled_s"][us[0]]["launch"] / sum(r["modelled_s"][us[0]].values())
        lines.append([name, r["launches"], *(form(total(part), "{:.1f}") for part in us), f"{bound:.0%}"])
    return markdown(
        ["step", "launches", *(f"ms at {part} per kernel" for part in us), "of it bound by launches"], lines
    )


def bars(report: dict[str, Any]) -> Figure:
    """One bar per whole step and target, stacked by what its launches are bound by."""
    there = {name: found for name, found in report["targets"].items() if not isinstance(found, str)}
    return _stacked(
        [(f"{name}: {step}", r) for name, found in there.items() for step, r in steps(found["programs"]).items()]
    )


def ladder(reports: dict[str, dict[str, Any]], to: str) -> Figure:
    """What each change of the programs was worth on one target: bars of openpi, and of every report's steps.

    Args:
      reports: of `compile_for`, by the name of the change, from the first to the last.
      to: the target.
    """
    rows, openpi = [], None
    for change, report in reports.items():
        there = steps(report["targets"][to]["programs"])
        openpi = there.pop(OPENPI, openpi)
        rows += [(f"{change}: {step}", r) for step, r in there.items()]
    rows.sort(key=lambda row: ": full" not in row[0])  # sorting keeps the order of the changes
    return _stacked(rows if openpi is None else [(OPENPI, openpi), *rows])


def _stacked(rows: list[tuple[str, dict[str, Any]]]) -> Figure:
    least = f"{LEAST_US[0]:g} µs"
    figure, axes = panels(1, width=8.0, height=0.9 + 0.36 * max(1, len(rows)))
    ax = axes[0, 0]
    for place, (_, r) in enumerate(rows):
        left = 0.0
        for part, colour in COLOURS.items():
            width = 1e3 * r["modelled_s"][least][part]
            ax.barh(place, width, left=left, color=colour, height=0.7, label=part if not place else None)
            left += width
        ax.text(left, place, f" {left:.1f} ms, {r['launches']} launches", va="center", fontsize=8)
    ax.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=8)
    ax.invert_yaxis()
    ax.margins(x=0.25)
    ax.set(xlabel=f"ms per control step, modelled at {least} per kernel, by what bounds each launch")
    if rows:
        figure.legend(fontsize=8, frameon=False, ncols=len(COLOURS), loc="outside lower center")
    return figure
