"""Where attention goes, layer by layer: how many visual tokens it is spread over, and which camera has them.

    rows = measure(trace)                 one row per query rows and layer
    table(rows), figure(rows)             with those of `regions` where they are
    beside({"a": rows, "b": rows})        several policies in one figure

SAFE-Pruner rests on attention that is spread in early layers and narrow in late ones. The effective number of tokens,
exp(-Σ S log S) of a saliency S that sums to 1, says so in one figure: all n where S is uniform, 1 where one token has
it all. A policy that plays from memory has late layers as flat as early ones.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from safe_pruner_jax.analysis.regions import REGIONS, median
from safe_pruner_jax.analysis.rows import Row, rounded
from safe_pruner_jax.analysis.trace import Trace
from safe_pruner_jax.figures.theme import MARKERS, colour, form, grid, legend, look, markdown, panels

QUERIES = ("prompt", "action")
"""Rows that look: the prompt's in the language model, the action tokens' in the expert."""

CARRIED = ("matched", "same slot", "prior")
"""What the shallow saliency of a call is compared with: see `regions.carried`."""


def effective(saliency: np.ndarray) -> np.ndarray:
    """exp of the entropy of saliencies [..., n] that each sum to 1 over their alive tokens."""
    s = np.asarray(saliency, np.float64)
    s = s / np.maximum(s.sum(-1, keepdims=True), 1e-30)
    return np.exp(-(s * np.log(np.where(s > 0, s, 1.0))).sum(-1))


def measure(trace: Trace, *, cut: int = 3) -> list[Row]:
    """One episode.

    Args:
      trace: of the episode.
      cut: ℓs, whose shallow saliency `prior` is about.

    Returns:
      One row per "queries" and "layer": lists over the calls of "effective" tokens and of the "outside" camera's share,
      and "tokens", the alive ones per call; and a row of the queries "prior" with the mean shallow saliency, "map" [n].
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
    shallow = trace.text[:, cut - 1].mean(0)
    return [*rows, {"queries": "prior", "layer": cut - 1, "calls": len(trace), "map": rounded(shallow, 8)}]


def prior(rows: Sequence[Row], without: str) -> np.ndarray:
    """[n] mean shallow saliency of all episodes but one, weighed by calls; there must be another."""
    others = [row for row in rows if row["queries"] == "prior" and row["part"] != without]
    return np.average([row["map"] for row in others], axis=0, weights=[row["calls"] for row in others])


def medians(rows: Sequence[Row], queries: str) -> dict[int, tuple[float, float]]:
    """Layer → medians over calls and episodes: effective share of the alive tokens, share of the outside camera."""
    rows = [row for row in rows if "effective" in row]
    layers = sorted({row["layer"] for row in rows if row["queries"] == queries})
    result = {}
    for layer in layers:
        of = [row for row in rows if row["queries"] == queries and row["layer"] == layer]
        share = np.concatenate([np.divide(row["effective"], row["tokens"]) for row in of])
        result[layer] = float(np.median(share)), float(np.median(np.concatenate([row["outside"] for row in of])))
    return result


def places(rows: Sequence[Row], queries: str) -> dict[str, dict[int | None, float]]:
    """Region → layer → median share of the attention over calls and episodes; empty where nothing is labelled."""
    labelled = [row for row in rows if row["queries"] == queries and REGIONS[0] in row]
    layers = sorted({row["layer"] for row in labelled}, key=lambda layer: -1 if layer is None else layer)
    values = lambda region, layer: np.concatenate([row[region] for row in labelled if row["layer"] == layer])
    return {r: {layer: float(np.median(values(r, layer))) for layer in layers} for r in REGIONS} if labelled else {}


def table(rows: Sequence[Row], calls: Sequence[Row] = ()) -> str:
    """By layer: effective share of the tokens, the outside camera's share, attention on the target; then κ by call."""
    medians_of = {queries: medians(rows, queries) for queries in QUERIES}
    target = {queries: places(rows, queries).get(REGIONS[0], {}) for queries in QUERIES}
    cells = lambda queries, layer: (*medians_of[queries].get(layer, (None, None)), target[queries].get(layer))
    lines = [
        [layer, *(form(value, "{:.0%}") for queries in QUERIES for value in cells(queries, layer))]
        for layer in sorted(set().union(*medians_of.values()))
    ]
    names = ("effective tokens", "outside camera", "on the target")
    text = markdown(["layer", *(f"{queries} rows: {what}" for queries in QUERIES for what in names)], lines)
    uniform = places(rows, "uniform")
    if uniform:
        shares = ", ".join(f"{region} {share[None]:.1%}" for region, share in uniform.items())
        text += f"\nOf the tokens: {shares}.\n"
    return text + (f"\n{_carried(calls)}" if calls else "")


def _carried(calls: Sequence[Row]) -> str:
    sides = {"κ within a subtask": True, "κ across a boundary": False}
    cell = lambda name, within: form(median(calls, name, within), "{:.3f}")
    lines = [[label, *(cell(name, within) for name in CARRIED)] for label, within in sides.items()]
    right = [form(median(calls, name), "{:.0%}") for name in ("right", "right, same slot")]
    return markdown(["", *CARRIED], [*lines, ["tokens of a thing whose partner shows it too", *right, None]])


def figure(rows: Sequence[Row], calls: Sequence[Row] = ()) -> Figure:
    """Effective tokens by layer; where it is labelled, attention by region and layer; κ and right matches by call."""
    labelled, where = bool(places(rows, "uniform")), {queries: places(rows, queries) for queries in QUERIES}
    drawn, axes = grid(1 + 2 * labelled + bool(calls))
    for queries, marker in zip(QUERIES, "os", strict=True):
        points = medians(rows, queries)
        shares = [share for share, _ in points.values()]
        axes[0].plot([*points], shares, marker=marker, ms=3, label=f"{queries} rows")
    axes[0].set(xlabel="layer", ylabel="effective tokens / alive tokens", ylim=(0, 1))
    for ax, queries in zip(axes[1:3] if labelled else (), QUERIES, strict=False):
        for number, region in enumerate(REGIONS):
            layers = where[queries][region]
            ax.plot([*layers], [*layers.values()], color=colour(number), marker=MARKERS[number], ms=3, label=region)
            ax.axhline(places(rows, "uniform")[region][None], color=colour(number), lw=0.8, ls=":")
        ax.set(xlabel="layer", ylabel=f"attention of the {queries} rows", ylim=(0, None))
        ax.set_title("dotted: share of the tokens", fontsize=8)
    if calls:
        _draw_carried(axes[-1], calls)
    for ax in axes[: 1 + 2 * labelled]:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    for ax in axes:
        low, high = ax.get_ylim()
        ax.set_ylim(low, high + 0.25 * (high - low))  # room for the names
        ax.legend(fontsize=8, frameon=False, ncols=2, loc="upper center")
    return drawn


def beside(policies: Mapping[str, Sequence[Row]]) -> Figure:
    """Effective tokens and, where it is labelled, attention on the target by depth: a line per policy.

    Args:
      policies: name → rows of `measure` and `regions.masses`. Depth is the layer's place between the first and the
        last, so that policies of unlike depth share an axis.
    """
    drawn, axes = panels(2, rows=2, width=3.7, height=3.1)
    for row, queries in enumerate(QUERIES):
        for number, (name, rows) in enumerate(policies.items()):
            shares = {layer: share for layer, (share, _) in medians(rows, queries).items()}
            for ax, layers in zip(axes[row], (shares, places(rows, queries).get(REGIONS[0], {})), strict=True):
                depth = np.linspace(0, 1, len(layers)) if layers else []
                ax.plot(depth, [*layers.values()], label=name, **look(number))
        axes[row, 0].set(ylabel=f"{queries} rows: effective / alive tokens", ylim=(0, 1))
        axes[row, 1].set(ylabel=f"{queries} rows: share on the target", ylim=(0, None))
    for ax in axes[-1]:
        ax.set_xlabel("depth, first to last layer")
    legend(drawn, [axes[0, 0]])
    return drawn


def _draw_carried(ax: Axes, calls: Sequence[Row]) -> None:
    """κ of every kind, within subtasks and across: medians with quartiles."""
    for number, (label, within) in enumerate({"within a subtask": True, "across a boundary": False}.items()):
        for place, name in enumerate(CARRIED):
            values = [row[name] for row in calls if row[name] is not None and row["within"] is within]
            if values:
                low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
                bars = [[middle - low], [high - middle]]
                shown = label if place == 0 else None
                at, style = place + 0.16 * number - 0.08, {"fmt": MARKERS[number], "ms": 4, "color": colour(number)}
                ax.errorbar(at, middle, bars, label=shown, **style)
    ax.set_xticks(range(len(CARRIED)), CARRIED)
    ax.set_ylabel("κ, median and quartiles")
