"""κ along an episode, the keyframes it makes, and the subtask boundaries (SAFE-Pruner, Fig. 3 and Eq. 6-7).

    rows = measure(trace, threshold=0.92)          one row per query rows and call
    table(rows), figure(rows)

The pruner itself is replayed on the recorded evidence, once for each choice of the query rows.
"""

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from safe_pruner_jax.analysis.recall import QUERIES
from safe_pruner_jax.analysis.rows import Row, rounded
from safe_pruner_jax.analysis.trace import Trace, replay
from safe_pruner_jax.figures.theme import colour, form, markdown, panels
from safe_pruner_jax.pruners import PRUNERS

DRAWN = 4
"""Episodes in a figure; the table has all."""


def measure(trace: Trace, *, cut: int = 3, threshold: float | None = None, **choices: Any) -> list[Row]:
    """κ and keyframes of one episode.

    Args:
      trace: of the episode.
      cut: layer index ℓs.
      threshold: γ; None is the default of `safe`.
      choices: of `safe`.

    Returns:
      One row per "queries" and "call": "kappa" (None where undefined), "keyframe", "reference" (the keyframe that
      was compared to; None at the first call), "subtask", and "boundary": the first call of a subtask but the first.
    """
    choices = choices if threshold is None else choices | {"threshold": threshold}
    rows: list[Row] = []
    for queries in QUERIES:
        reference = None
        for call, selection in enumerate(replay(PRUNERS["safe"](cut=cut, queries=queries, **choices), trace)):
            rows.append(
                {
                    "queries": queries,
                    "call": call,
                    "kappa": rounded([selection.kappa])[0],
                    "keyframe": bool(selection.keyframe),
                    "reference": reference,
                    "subtask": int(trace.subtask[call]),
                    "boundary": bool(call and trace.subtask[call] != trace.subtask[call - 1]),
                }
            )
            reference = call if selection.keyframe else reference
    return rows


def caught(rows: Sequence[Row], slack: int = 1) -> tuple[int, int]:
    """Boundaries with a keyframe at the call itself or up to `slack` calls later, and all boundaries."""
    keyframes = {(r["part"], r["queries"], r["call"]) for r in rows if r["keyframe"]}
    edges = [(r["part"], r["queries"], r["call"]) for r in rows if r["boundary"]]
    hit = sum(any((part, q, call + i) in keyframes for i in range(slack + 1)) for part, q, call in edges)
    return hit, len(edges)


def table(rows: Sequence[Row]) -> str:
    """Per query rows: keyframes, boundaries they catch, and κ within and across subtasks."""
    lines = []
    for queries in dict.fromkeys(row["queries"] for row in rows):
        group = [row for row in rows if row["queries"] == queries]
        hit, edges = caught(group)
        number = {(row["part"], row["call"]): row["subtask"] for row in group}
        defined = [row for row in group if row["kappa"] is not None]
        same = lambda row: row["subtask"] == number[row["part"], row["reference"]]  # noqa: B023
        within, across = ([row["kappa"] for row in defined if same(row) is side] for side in (True, False))
        middle = lambda v: form(float(np.median(v)) if v else None, "{:.4f}")
        share = sum(row["keyframe"] for row in group) / len(group)
        lowest = form(min(within) if within else None, "{:.4f}")
        lines.append([queries, len(group), f"{share:.1%}", f"{hit} of {edges}", middle(within), lowest, middle(across)])
    head = ["queries", "calls", "keyframes", "boundaries caught", "κ within, median", "lowest", "κ across, median"]
    return markdown(head, lines)


def figure(rows: Sequence[Row], threshold: float) -> Figure:
    """κ call by call with γ, keyframes (points) and boundaries (vertical lines): query rows × episodes."""
    parts = list(dict.fromkeys(row["part"] for row in rows))[:DRAWN]
    queries = list(dict.fromkeys(row["queries"] for row in rows))
    drawn, axes = panels(len(parts), rows=len(queries), width=4.6, height=2.6, sharey="row")
    for line, q in zip(axes, queries, strict=True):
        for ax, part in zip(line, parts, strict=True):
            group = [row for row in rows if (row["queries"], row["part"]) == (q, part)]
            defined = [row for row in group if row["kappa"] is not None]
            ax.plot([r["call"] for r in defined], [r["kappa"] for r in defined], color=colour(0), lw=1.2)
            keyframes = [row for row in defined if row["keyframe"]]
            ax.scatter([r["call"] for r in keyframes], [r["kappa"] for r in keyframes], color=colour(3), s=22, zorder=3)
            ax.axhline(threshold, color=colour(3), lw=1, ls="--")
            for row in group:
                if row["boundary"]:
                    ax.axvline(row["call"], color=colour(2), lw=1.2)
            ax.set_xlabel("call", fontsize=8)
            ax.xaxis.get_major_locator().set_params(integer=True)
            ax.set_title(textwrap.fill(part.replace("_", " "), 44) if q == queries[0] else "", fontsize=8)
        line[0].set_ylabel(f"κ, {q}")
    drawn.suptitle("dashed: γ · points: keyframes after the first\nvertical: the gripper command changes", fontsize=9)
    return drawn
