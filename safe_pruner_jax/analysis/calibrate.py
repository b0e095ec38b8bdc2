"""Defaults by one rule: which query rows, which λ, which γ.

    proposal = propose(recall_rows, forecast_rows, keep=0.2, share=0.1)

1. Query rows and λ: the pair with the lowest core-token loss at `keep` (`recall`). λ = 1 loses the same whatever the
   rows, so of equal pairs the one counts whose κ tells subtasks apart best (`measures.separation`).
2. γ, for these rows: the `share`-quantile of κ over all pairs of calls of one subtask up to ten apart (`forecast`).
   Within a subtask that share of comparisons would make a keyframe. What γ catches of the pairs across a
   boundary is told, not chosen.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from safe_pruner_jax.analysis import forecast
from safe_pruner_jax.analysis.measures import separation
from safe_pruner_jax.analysis.recall import QUERIES, label, mean_loss
from safe_pruner_jax.analysis.rows import Row
from safe_pruner_jax.figures.theme import Table, colour, form, grid, legend, markdown


def gammas(rows: Sequence[Row], share: float = 0.1) -> dict[str, dict[str, float | None]]:
    """What κ is like for each choice of query rows.

    Args:
      rows: of `forecast.measure`, with "part".
      share: of the comparisons within a subtask that may fall below γ, in (0, 1).

    Returns:
      queries → "gamma", "within" and "across" (medians of κ), "caught" (share of the pairs across a boundary below γ),
      "separation"; None where there is nothing to take it from.

    Raises:
      ValueError: share outside (0, 1).
    """
    if not 0 < share < 1:
        raise ValueError(f"share: expected a share in (0, 1), got {share}; for example 0.1")
    by_queries = {}
    for queries in QUERIES:
        name = f"shallow {queries}"
        within, across = (forecast.values(rows, name, "cosine", within=side) for side in (True, False))
        gamma = float(np.quantile(within, share)) if len(within) else None
        by_queries[queries] = {
            "gamma": gamma,
            "within": float(np.median(within)) if len(within) else None,
            "across": float(np.median(across)) if len(across) else None,
            "caught": float((across < gamma).mean()) if len(across) and gamma is not None else None,
            "separation": separation(within, across),
        }
    return by_queries


def candidates(recall: Sequence[Row], kappa: dict[str, dict[str, float | None]], keep: float) -> list[dict[str, Any]]:
    """Every pair of query rows and λ with its loss at `keep`, the best first.

    Raises:
      ValueError: no rows for this share kept.
    """
    losses = mean_loss(recall)
    pairs = dict.fromkeys((r["queries"], r["fuse"]) for r in recall if (r["score"], r["keep"]) == ("fused", keep))
    if not pairs:
        measured = ", ".join(f"{k:g}" for k in sorted({r["keep"] for r in recall}))
        raise ValueError(f"keep: expected one of the measured {measured or 'shares'}, got {keep:g}")
    name = lambda queries, fuse: label({"score": "fused", "queries": queries, "fuse": fuse})
    rows = [{"queries": q, "fuse": f, "loss": losses[name(q, f), keep]} | kappa[q] for q, f in pairs]
    return sorted(rows, key=lambda r: (r["loss"], -(r["separation"] or 0)))


def propose(
    recall: Sequence[Row], forecasts: Sequence[Row], *, keep: float = 0.2, share: float = 0.1
) -> dict[str, Any]:
    """The choices of `safe` that the module's rule gives.

    Args:
      recall, forecasts: rows of both analyses on the same episodes.
      keep: share kept at which losses are compared; one that was measured.
      share: see `gammas`.

    Returns:
      "choices" ("queries", "fuse", "threshold": arguments of `safe`), "keep", "share", "episodes", "calls" (that
      prune), and "candidates".

    Raises:
      ValueError: no pruned calls, no pairs within a subtask, or a share that was not measured.
    """
    kappa = gammas(forecasts, share)
    ranked = candidates(recall, kappa, keep)
    best = ranked[0]
    if best["gamma"] is None:
        raise ValueError("data: expected episodes with at least two calls in a subtask, got none; give longer ones")
    calls = {row["part"]: row["calls"] for row in recall}
    return {
        "choices": {"queries": best["queries"], "fuse": best["fuse"], "threshold": round(best["gamma"], 4)},
        "keep": keep,
        "share": share,
        "episodes": len(calls),
        "calls": sum(calls.values()),
        "candidates": ranked,
    }


def table(proposal: dict[str, Any]) -> str:
    """The candidates, best first, and the proposal as arguments of the command line."""
    lines = [
        [
            f"{r['queries']}, λ = {r['fuse']:g}",
            form(1 - r["loss"], "{:.1%}"),
            *(form(r[key], "{:.4f}") for key in ("within", "across", "gamma")),
            form(r["caught"], "{:.0%}"),
            form(r["separation"], "{:.3f}"),
        ]
        for r in proposal["candidates"]
    ]
    share = f"γ at {proposal['share']:.0%}"
    recall = f"core tokens kept at {proposal['keep']:.0%}"
    head = ["queries, λ", recall, "κ within", "κ across", share, "boundaries below γ", "separation"]
    of = f"Episodes: {proposal['episodes']}, pruned calls: {proposal['calls']}."
    return Table(f"{markdown(head, lines)}\n{of} Proposed: `{command(proposal['choices'])}`.\n")


def command(choices: Mapping[str, Any]) -> str:
    """Choices of `safe` as the command line takes them.

    >>> command({"keep": 0.2, "late_layers": (0, -1)})
    '--pruner=safe --pruner.keep 0.2 --pruner.late-layers 0 -1'
    """
    words = lambda value: " ".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)
    parts = [f"--pruner.{name.replace('_', '-')} {words(value)}" for name, value in choices.items()]
    return " ".join(["--pruner=safe", *parts])


def figure(forecasts: Sequence[Row], proposal: dict[str, Any]) -> Figure:
    """Distributions of κ within a subtask and across a boundary, and each γ; one panel per query rows."""
    kappa = {r["queries"]: r for r in proposal["candidates"]}
    panels = [queries for queries in QUERIES if queries in kappa]
    drawn, axes = grid(len(panels), height=2.6)
    for ax, queries in zip(axes, panels, strict=True):
        sides = [forecast.values(forecasts, f"shallow {queries}", "cosine", within=side) for side in (True, False)]
        bins = np.linspace(min((v.min() for v in sides if len(v)), default=0), 1, 40)
        for number, (side, name) in enumerate(zip(sides, ("within a subtask", "across a boundary"), strict=True)):
            if len(side):
                ax.hist(side, bins, density=True, histtype="stepfilled", alpha=0.25, color=colour(number))
                ax.hist(side, bins, density=True, histtype="step", lw=1.4, color=colour(number), label=name)
        if kappa[queries]["gamma"] is not None:
            ax.axvline(kappa[queries]["gamma"], color="#222222", lw=1.2, ls="--", label="γ")
        chosen = ", proposed" if queries == proposal["choices"]["queries"] else ""
        ax.set(title=f"queries: {queries}{chosen}", xlabel="κ", yticks=[])
    legend(drawn, axes)
    return drawn
