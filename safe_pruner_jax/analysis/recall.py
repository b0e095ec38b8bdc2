"""How many core tokens a score would have dropped (SAFE-Pruner, Fig. 2b).

    rows = measure(trace, cut=3)          one row per score and share kept
    table(rows), figure(rows)

The core tokens of a layer are the 10 % of the visual tokens with the highest saliency there, action tokens as queries.
The loss rate is the share of them that is not among the kept ones, averaged over the layers behind the cut and over
the calls that prune. The paper measures the shallow score; here every score is measured.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from safe_pruner_jax.analysis.measures import Matches, loss_rate, references, top
from safe_pruner_jax.analysis.rows import Row, rounded
from safe_pruner_jax.analysis.trace import Trace
from safe_pruner_jax.arrays import Layers
from safe_pruner_jax.figures.theme import MARKERS, QUIET, colour, form, grid, legend, markdown
from safe_pruner_jax.pruners import Capture, forecast
from safe_pruner_jax.tokens import budget

QUERIES = ("action", "text", "last", "all")
"""Rows of the shallow saliency, see `safe`."""
KEEPS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7)
FUSES = (0.0, 0.25, 0.5, 0.75, 1.0)


def measure(
    trace: Trace,
    *,
    cut: int = 3,
    late_layers: Layers = (0, -2, -1),
    late_steps: str = "half",
    soft: float = 0.0,
    keeps: Sequence[float] = KEEPS,
    fuses: Sequence[float] = FUSES,
    core: float = 0.1,
    every: int = 10,
) -> list[Row]:
    """Loss rates of one episode.

    Args:
      trace: of the episode.
      cut: layer index ℓs before which tokens would be dropped.
      late_layers, late_steps: L_d and the denoise steps of the late saliency, as in `safe`.
      soft: temperature of the correspondence, as in `safe`.
      keeps: shares of the alive visual tokens that are kept.
      fuses: λ; 0 is the shallow score alone, 1 the forecast alone.
      core: share of the tokens that are core.
      every: calls between keyframes within a subtask; every subtask starts with one (`measures.references`). So all
        scores forecast from the same calls, whatever their κ.

    Returns:
      Rows with "score" ("fused", "same slot", "fastv", "random", "truth"), "queries" (None where the score has none),
      "fuse", "keep", "calls" and "loss" in [0, 1]; "loss_by_layer" for layers cut..L-1. "random" is the expectation,
      1 - K/n.
      "same slot" is the keyframe's late saliency without matching, a control of the forecast alone (λ = 1).
      "truth" keeps by what L_d pay attention to in the call itself: the loss that no forecast can avoid. None where an
      episode has keyframes only.

    Raises:
      ValueError: no layer behind the cut.
    """
    if not 1 <= cut < trace.depth:
        raise ValueError(f"cut: expected a layer index from 1 to {trace.depth - 1}, got {cut}")
    late, match = trace.late(late_steps), Matches(trace, soft=soft)
    chosen, reference = late[:, [l % trace.depth for l in late_layers]], references(trace.subtask, every)
    shallow = {q: trace.captured(Capture(cut - 1, q)) for q in QUERIES}
    losses_of: dict[tuple, list[np.ndarray]] = defaultdict(list)
    for t in (t for t in range(len(trace)) if reference[t] != t):  # those that are pruned
        alive = trace.alive[t]
        cores = top(late[t, cut:], alive, core)
        late_now = match.forecast(chosen[reference[t]], t, reference[t])
        scores = {("fused", q, fuse): forecast.fuse(shallow[q][t], late_now, fuse) for q in QUERIES for fuse in fuses}
        scores["same slot", None, None] = np.where(alive, chosen[reference[t]].mean(0), 0.0)
        scores["fastv", None, None] = trace.probabilities["all"][t, cut - 1]
        scores["truth", None, None] = chosen[t].mean(0)
        for keep in keeps:
            for name, score in scores.items():
                losses_of[*name, keep].append(loss_rate(cores, top(np.asarray(score), alive, keep)))
            n = int(alive.sum())
            losses_of["random", None, None, keep].append(np.full(len(cores), 1 - budget(keep, n) / n))
    return [
        dict(zip(("score", "queries", "fuse", "keep"), key, strict=True))
        | {
            "calls": len(losses),
            "loss": round(float(np.mean(losses)), 6),
            "loss_by_layer": rounded(np.mean(losses, axis=0)),
        }
        for key, losses in losses_of.items()
    ]


def label(row: Mapping[str, Any]) -> str:
    """What a row's score is called in tables and figures."""
    if row["score"] == "fused":
        return {0: f"shallow, {row['queries']}", 1: "forecast"}.get(
            row["fuse"], f"fused λ={row['fuse']:g}, {row['queries']}"
        )
    plain = {"truth": "late saliency of the call itself", "same slot": "late saliency of the keyframe, same slot"}
    return plain.get(row["score"]) or row["score"]


def mean_loss(rows: Sequence[Row]) -> dict[tuple[str, float], float]:
    """(label, keep) → loss rate over all calls of all episodes."""
    total, count = defaultdict(float), defaultdict(int)
    # the forecast alone stands in the rows once for every choice of query rows
    unique = {(row["part"], label(row), row["keep"]): (row["loss"], row["calls"]) for row in rows}
    for key, (loss, calls) in unique.items():
        total[key[1:]] += loss * calls
        count[key[1:]] += calls
    return {key: total[key] / count[key] for key in total}


def table(rows: Sequence[Row]) -> str:
    """Loss rate of every score at every share kept."""
    losses = mean_loss(rows)
    keeps = sorted({keep for _, keep in losses}, reverse=True)
    names = list(dict.fromkeys(name for name, _ in losses))
    cells = [[name, *(form(losses.get((name, k)), "{:.1%}") for k in keeps)] for name in names]
    return markdown(["core tokens lost, keeping", *(f"{k:.0%}" for k in keeps)], cells)


def figure(rows: Sequence[Row]) -> Figure:
    """Loss rate against the pruning rate 1 - keep; one panel per query rows, the scores without queries in each."""
    losses = mean_loss(rows)
    panels = [queries for queries in QUERIES if any(row.get("queries") == queries for row in rows)]
    drawn, axes = grid(len(panels), sharey=True)
    fuses = sorted({row["fuse"] for row in rows if row["score"] == "fused" and 0 < row["fuse"] < 1})
    for ax, queries in zip(axes, panels, strict=True):
        shown = [{"score": "fused", "queries": queries, "fuse": 0}]
        shown += [{"score": "fused", "queries": queries, "fuse": fuse} for fuse in fuses]
        shown += [{"score": "fused", "queries": queries, "fuse": 1}]
        looks = [("-", MARKERS[i], colour(i)) for i in range(len(shown))]
        shown += [{"score": name} for name in ("same slot", "fastv", "random", "truth")]
        looks += [("--", "", colour(5)), ("--", "", colour(6)), (":", "", QUIET), ("-.", "", colour(6))]
        for row, (line, marker, color) in zip(shown, looks, strict=True):
            curve = {keep: loss for (name, keep), loss in losses.items() if name == label(row)}
            points = sorted((100 * (1 - keep), 100 * loss) for keep, loss in curve.items())
            if points:
                name = label(row).removesuffix(f", {queries}")
                ax.plot(*zip(*points, strict=True), line, marker=marker, ms=3.5, color=color, lw=1.2, label=name)
        ax.set(title=f"queries: {queries}", xlabel="visual tokens dropped, %")
        ax.set_ylabel("core tokens lost, %")
    legend(drawn, axes, columns=3)
    return drawn
