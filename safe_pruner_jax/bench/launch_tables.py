"""Tables of docs/performance.md, made of records of `openpi bench --compile-for`: `scripts/make_tables.py`.

tables(results)       {name of a table: its Markdown}, from a folder with launches_pi05_*.json
"""

import json
from pathlib import Path
from typing import Any

from safe_pruner_jax.bench.launches import OPENPI, steps
from safe_pruner_jax.bench.modelled import LEAST_US
from safe_pruner_jax.figures.theme import markdown

CHANGES = ("before", "savings", "kernels", "fewer")
"""Records of the ladder, launches_pi05_NAME.json, the last of them with everything there is."""

TARGET, TARGETS = "h100", "targets"

US = tuple(f"{least:g} µs" for least in LEAST_US)


def tables(results: Path) -> dict[str, str]:
    """The tables by name.

    Args:
      results: benchmarks/results.

    Raises:
      FileNotFoundError: a record is missing.
    """
    read = lambda name: json.loads((results / f"launches_pi05_{name}.json").read_text(encoding="utf-8"))
    reports = {name: read(name) for name in CHANGES}
    programs = {name: report["targets"][TARGET]["programs"] for name, report in reports.items()}
    return {
        "ladder": ladder(programs),
        "parts": parts(programs[CHANGES[-1]]),
        "targets": targets(read(TARGETS)["targets"]),
    }


def ladder(changes: dict[str, dict[str, Any]]) -> str:
    """What each change was worth: launches by phase, and whole steps.

    Args:
      changes: {change: {program: row}} from the first to the last; openpi's own row in any of them.
    """
    lines = []
    openpi = next((programs[OPENPI] for programs in changes.values() if OPENPI in programs), None)
    if openpi is not None:
        lines.append([OPENPI, None, None, None, openpi["per_denoise_step"], None, *_step(openpi)])
    for change, programs in changes.items():
        split, whole = _phases(programs), {name.split(",")[0]: row for name, row in steps(programs).items()}
        counts = [split[name]["launches"] for name in ("vision tower", "layers before the cut", "decision")]
        per_step = programs[_only(programs, "pruned")]["per_denoise_step"]
        pruned, full = whole["pruned"], whole["full"]
        lines.append([change, *counts, per_step, pruned["launches"], full["launches"], *_ms(pruned), _ms(full)[0]])
    columns = ["H100", "vision", "before the cut", "decision", "denoise step", "pruned step", "keyframe"]
    return markdown([*columns, *(f"ms pruned at {us}" for us in US), f"ms keyframe at {US[0]}"], lines)


def _step(openpi: dict[str, Any]) -> list[Any]:
    """openpi's whole step in the columns of a keyframe, since it prunes nothing."""
    return [openpi["launches"], None, None, _ms(openpi)[0]]


def parts(programs: dict[str, Any]) -> str:
    """Where a pruned step's launches and milliseconds go."""
    split = _phases(programs)
    total = {us: sum(row["ms"][us] for row in split.values()) for us in US}
    lines = [
        [name, row["launches"], *(f"{row['ms'][us]:.2f}" for us in US), f"{row['ms'][US[0]] / total[US[0]]:.0%}"]
        for name, row in split.items()
    ]
    lines.append(["in all", sum(r["launches"] for r in split.values()), *(f"{total[us]:.2f}" for us in US), ""])
    return markdown(["phase", "launches", *(f"ms at {us}" for us in US), "share"], lines)


def targets(found: dict[str, Any]) -> str:
    """Pruned steps of every target and batch; a line where this jax has no compiler."""
    lines: list[list[Any]] = []
    for name, entry in found.items():
        if isinstance(entry, str):
            lines.append([f"{name}: {entry.partition(': ')[2].partition(' (')[0]}", *[None] * (2 + len(US))])
            continue
        rows = {step: row for step, row in steps(entry["programs"]).items() if step.startswith("pruned")}
        for step, row in rows.items():
            lines.append([entry["target"]["title"], step.partition("×")[2] or "1", row["launches"], *_ms(row)])
    return markdown(["pruned step", "robots", "launches", *(f"ms at {us}" for us in US)], lines)


def _only(programs: dict[str, Any], kind: str) -> str:
    return next(name for name in programs if name.startswith(f"{kind}, "))


def _ms(row: dict[str, Any]) -> list[str]:
    return [f"{1e3 * sum(row['modelled_s'][us].values()):.1f}" for us in US]


def _phases(programs: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Launches and milliseconds of a pruned step's phases: the first three are differences of prefixes of the step."""
    row = {kind: programs[_only(programs, kind)] for kind in ("vision", "before", "decision", "pruned")}
    ms = lambda r: {us: 1e3 * sum(r["modelled_s"][us].values()) for us in US}
    out, launches, spent = {}, 0, dict.fromkeys(US, 0.0)
    names = {"vision": "vision tower", "before": "layers before the cut", "decision": "decision"}
    for kind, name in names.items():
        now = ms(row[kind])
        out[name] = {"launches": row[kind]["launches"] - launches, "ms": {us: now[us] - spent[us] for us in US}}
        launches, spent = row[kind]["launches"], now
    last = row["pruned"]
    loop = {us: 1e3 * last["denoise_steps"] * last["loop_modelled_s"][us] for us in US}
    rest = {us: ms(last)[us] - loop[us] for us in US}
    out["layers behind the cut"] = {"launches": last["outside"], "ms": rest}
    steps_name = f"{last['denoise_steps']} denoise steps"
    out[steps_name] = {"launches": last["denoise_steps"] * last["per_denoise_step"], "ms": loop}
    return out
