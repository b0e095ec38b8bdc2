"""Tables of docs/performance.md, made of records of `openpi bench --compile-for`: `scripts/make_tables.py`.

tables(results)       {name of a table: its Markdown}, from a folder with launches_pi05_*.json
"""

import json
from pathlib import Path
from typing import Any

from safe_pruner_jax.bench.launches import OPENPI, steps
from safe_pruner_jax.bench.modelled import LEAST_US
from safe_pruner_jax.figures.theme import markdown

Programs = dict[str, dict[str, Any]]

CHANGES = {"before": "lossless", "savings": "fewer launches", "kernels": "kernels"}
"""Rungs of the ladder behind openpi, by their records launches_pi05_NAME.json; the last has everything there is."""

TARGET, TARGETS, SAVINGS = "h100", "targets", "savings"

US = tuple(f"{least:g} µs" for least in LEAST_US)


def record(results: Path, name: str) -> dict[str, Any]:
    """What `openpi bench --compile-for` wrote; raises FileNotFoundError."""
    return json.loads((results / f"launches_pi05_{name}.json").read_text(encoding="utf-8"))


def tables(results: Path) -> dict[str, str]:
    """The tables by name.

    Args:
      results: benchmarks/results.

    Raises:
      FileNotFoundError: a record is missing.
    """
    reports = {name: record(results, name)["targets"][TARGET] for name in CHANGES}
    return {
        "ladder": ladder({CHANGES[name]: report["programs"] for name, report in reports.items()}),
        "switches": switches(reports[SAVINGS]),
        "parts": parts(reports[list(CHANGES)[-1]]["programs"]),
        "targets": targets(record(results, TARGETS)["targets"]),
    }


def ladder(changes: dict[str, Programs]) -> str:
    """What each rung was worth: launches and modelled milliseconds of whole steps.

    Args:
      changes: {change: {program: row}} from the first to the last; openpi's own row in any of them.
    """
    lines = []
    openpi = next((programs[OPENPI] for programs in changes.values() if OPENPI in programs), None)
    if openpi is not None:
        lines.append([OPENPI, openpi["per_denoise_step"], openpi["launches"], _ms(openpi)[0], None, None, None])
    for change, programs in changes.items():
        pruned, full = (_step(programs, kind) for kind in ("pruned", "full"))
        whole = [pruned["per_denoise_step"], full["launches"], _ms(full)[0]]
        lines.append([change, *whole, pruned["launches"], *_ms(pruned)])
    columns = ["H100", "denoise step", "every token: launches", f"ms at {US[0]}", "pruned: launches"]
    return markdown([*columns, *(f"ms at {us}" for us in US)], lines)


def switches(entry: dict[str, Any]) -> str:
    """What each saving is worth: launches with all of them, and without one at a time.

    Args:
      entry: of a target, with "programs" and, from `--undo`, "without".
    """
    lines = [["all savings", *_counts(entry["programs"])]]
    for switch, without in entry["without"].items():
        names = {_only(entry["programs"], kind): row for kind, row in without.items()}
        lines.append([f"without `{switch.partition(': ')[2]}`", *_counts(entry["programs"] | names)])
    columns = ["H100, no kernels", "vision", "decision", "denoise step", "every token", "pruned", "host starts, pruned"]
    return markdown(columns, lines)


def _counts(programs: Programs) -> list[int]:
    split, pruned = _phases(programs, "pruned"), _step(programs, "pruned")
    phases = [split[name]["launches"] for name in ("vision tower", "decision")]
    return [
        *phases,
        pruned["per_denoise_step"],
        _step(programs, "full")["launches"],
        pruned["launches"],
        pruned["starts"],
    ]


def parts(programs: Programs) -> str:
    """Where the launches and milliseconds of a pruned step and of a keyframe go."""
    pruned, full = (_phases(programs, kind) for kind in ("pruned", "full"))
    ms = lambda row, us: f"{row['ms'][us]:.2f}"
    lines = [
        [name, row["launches"], *(ms(row, us) for us in US), full[name]["launches"], ms(full[name], US[0])]
        for name, row in pruned.items()
    ]
    total = lambda split, us: f"{sum(row['ms'][us] for row in split.values()):.2f}"
    count = lambda split: sum(row["launches"] for row in split.values())
    lines.append(["in all", count(pruned), *(total(pruned, us) for us in US), count(full), total(full, US[0])])
    columns = ["H100", "pruned: launches", *(f"ms at {us}" for us in US), "keyframe: launches", f"ms at {US[0]}"]
    return markdown(columns, lines)


def targets(found: dict[str, Any]) -> str:
    """Launches and milliseconds of pruned steps and keyframes, of every target and batch; a line without a compiler."""
    whole = {name: {} if isinstance(entry, str) else steps(entry["programs"]) for name, entry in found.items()}
    of = lambda step: (int(step.partition("×")[2] or 1), -step.startswith("pruned"))
    kinds = sorted({of(step) for rows in whole.values() for step in rows if step != OPENPI})
    lines: list[list[Any]] = []
    for name, entry in found.items():
        if isinstance(entry, str):
            lines.append([f"{name}: {entry.partition(': ')[2].partition(' (')[0]}", *[None] * len(kinds)])
            continue
        rows = {of(step): row for step, row in whole[name].items() if step != OPENPI}
        cells = [f"{rows[kind]['launches']}: {_ms(rows[kind])[0]} ms" if kind in rows else None for kind in kinds]
        lines.append([entry["target"]["title"], *cells])
    words = [
        ("pruned" if kind else "keyframe") + ("" if robots == 1 else f", {robots} robots") for robots, kind in kinds
    ]
    return markdown([f"launches: ms at {US[0]}", *words], lines)


def _only(programs: Programs, kind: str) -> str:
    return next(name for name in programs if name.startswith(f"{kind}, "))


def _step(programs: Programs, kind: str) -> dict[str, Any]:
    return next(row for name, row in steps(programs).items() if name.startswith(f"{kind}, "))


def _ms(row: dict[str, Any]) -> list[str]:
    return [f"{1e3 * sum(row['modelled_s'][us].values()):.1f}" for us in US]


def _phases(programs: Programs, second: str) -> dict[str, dict[str, Any]]:
    """Launches and milliseconds of a step's phases: the first three are differences of prefixes of the step."""
    row = {kind: programs[_only(programs, kind)] for kind in ("vision", "before", "decision", second)}
    ms = lambda r: {us: 1e3 * sum(r["modelled_s"][us].values()) for us in US}
    out, launches, spent = {}, 0, dict.fromkeys(US, 0.0)
    names = {"vision": "vision tower", "before": "layers before the cut", "decision": "decision"}
    for kind, name in names.items():
        now = ms(row[kind])
        out[name] = {"launches": row[kind]["launches"] - launches, "ms": {us: now[us] - spent[us] for us in US}}
        launches, spent = row[kind]["launches"], now
    last = row[second]
    loop = {us: 1e3 * last["denoise_steps"] * last["loop_modelled_s"][us] for us in US}
    rest = {us: ms(last)[us] - loop[us] for us in US}
    out["layers behind the cut"] = {"launches": last["outside"], "ms": rest}
    steps_name = f"{last['denoise_steps']} denoise steps"
    out[steps_name] = {"launches": last["denoise_steps"] * last["per_denoise_step"], "ms": loop}
    return out
