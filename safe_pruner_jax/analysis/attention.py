"""Where attention goes, layer by layer: how many visual tokens it is spread over, and which camera has them.

    rows = measure(trace)                 one row per query rows and layer
    table(rows), figure(rows)

SAFE-Pruner rests on attention that is spread in early layers and narrow in late ones. The effective number of tokens,
exp(-Σ S log S) of a saliency S that sums to 1, says so in one figure: all n where S is uniform, 1 where one token has
it all. A policy that plays from memory has late layers as flat as early ones.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from safe_pruner_jax.analysis.rows import Row, rounded
from safe_pruner_jax.analysis.trace import Trace
from safe_pruner_jax.figures.theme import markdown, panels

QUERIES = ("prompt", "action")
"""Rows that look: the prompt's in the language model, the action tokens' in the expert."""


def effective(saliency: np.ndarray) -> np.ndarray:
    """exp of the entropy of saliencies [..., n] that each sum to 1 over their alive tokens."""
    s = np.asarray(saliency, np.float64)
    s = s / np.maximum(s.sum(-1, keepdims=True), 1e-30)
    return np.exp(-(s * np.log(np.where(s > 0, s, 1.0))).sum(-1))


def measure(trace: Trace) -> list[Row]:
    """One episode.

    Args:
      trace: of the episode.

    Returns:
      One row per "queries" and "layer": lists over the calls of "effective" tokens and of the "outside" camera's share,
      and "tokens", the alive ones per call.
    """
    first = np.arange(trace.alive.shape[1]) < trace.layout.tokens_per_camera
    alive = trace.alive.sum(1)
    rows: list[Row] = []
    for queries, saliency in (("prompt", trace.text), ("action", trace.late())):
        for layer in range(saliency.shape[1]):
            s = saliency[:, layer]
            share = s[:, first].sum(1) / np.maximum(s.sum(1), 1e-30)
            row = {"effective": rounded(effective(s)), "outside": rounded(share), "tokens": alive.tolist()}
            rows.append({"queries": queries, "layer": layer, **row})
    return rows


def medians(rows: Sequence[Row], queries: str) -> dict[int, tuple[float, float]]:
    """Layer → medians over calls and episodes: effective share of the alive tokens, share of the outside camera."""
    layers = sorted({row["layer"] for row in rows if row["queries"] == queries})
    result = {}
    for layer in layers:
        of = [row for row in rows if row["queries"] == queries and row["layer"] == layer]
        share = np.concatenate([np.divide(row["effective"], row["tokens"]) for row in of])
        result[layer] = float(np.median(share)), float(np.median(np.concatenate([row["outside"] for row in of])))
    return result


def table(rows: Sequence[Row]) -> str:
    """Effective share of the tokens and the outside camera's share, by layer."""
    found = {queries: medians(rows, queries) for queries in QUERIES}
    lines = [
        [layer, *(f"{value:.0%}" for queries in QUERIES for value in found[queries].get(layer, (np.nan, np.nan)))]
        for layer in sorted(set().union(*found.values()))
    ]
    heads = [f"{queries} rows: {what}" for queries in QUERIES for what in ("effective tokens", "outside camera")]
    return markdown(["layer", *heads], [[str(cell).replace("nan%", "–") for cell in line] for line in lines])


def figure(rows: Sequence[Row]) -> Figure:
    """Effective share of the tokens against the layer, one line per query rows."""
    drawn, axes = panels(1, width=5.5)
    for queries, marker in zip(QUERIES, "os", strict=True):
        points = medians(rows, queries)
        axes[0, 0].plot(
            [*points], [share for share, _ in points.values()], marker=marker, ms=3, label=f"{queries} rows"
        )
    axes[0, 0].set(xlabel="layer", ylabel="effective tokens / alive tokens", ylim=(0, 1))
    axes[0, 0].legend(fontsize=8, frameon=False)
    return drawn
