"""Pictures of a report: success against what is kept, and against what it costs. Functions return figures."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from safe_pruner_jax.evaluation.report import Estimate, Row

COLOURS = [*matplotlib.colormaps["tab10"].colors, *matplotlib.colormaps["tab20"].colors[1::2]]
"""Of methods: the usual ten, then the lighter ones."""


def success_by_keep(rows: Sequence[Row]) -> Figure:
    """Success rates with their 95 % intervals against the share of visual tokens kept; one panel per suite."""
    return _panels(rows, lambda row: None if row.keep is None else 100 * row.keep, "visual tokens kept, %", shares=True)


def success_by_flops(rows: Sequence[Row], *, exact: bool = True) -> Figure:
    """Success rates with their 95 % intervals against multiply-adds per policy call; one panel per suite.

    Args:
      rows: from `summarise`, of equal conditions.
      exact: all that the programs compute, or the papers' prefix.
    """
    name = "exact_flops" if exact else "paper_flops"
    giga = lambda row: None if getattr(row, name) is None else getattr(row, name) / 1e9
    return _panels(rows, giga, f"10⁹ multiply-adds per call ({'all' if exact else 'prefix, as in papers'})")


def success_by_speed(rows: Sequence[Row]) -> Figure:
    """Success rates with their 95 % intervals against the measured speed-up of a typical call; one panel per suite.

    Rows that did not run on the baseline's device have no speed-up and are left out.
    """
    return _panels(rows, lambda row: 1 / row.ms_ratio if row.ms_ratio else None, "measured speed-up of a policy call")


def _panels(rows: Sequence[Row], x: Callable[[Row], float | None], label: str, *, shares: bool = False) -> Figure:
    if not rows:
        raise ValueError("rows: expected at least one to draw, got none")
    if any(row.conditions != rows[0].conditions for row in rows):
        raise ValueError("rows: expected equal conditions (policy, checkpoint, …); draw one figure for each")
    suites, methods = (list(dict.fromkeys(getattr(row, name) for row in rows)) for name in ("suite", "method"))
    names = short_names(methods)
    legend = 0.5 + 0.075 * max(map(len, names.values()))  # inches beside the panels: methods may be many, hide points
    figure = Figure((5 * len(suites) + 0.6 + legend, 4), dpi=120, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(suites), sharey=True, squeeze=False)[0]
    for ax, suite in zip(axes, suites, strict=True):
        for place, method in enumerate(methods):
            points = [(x(row), row.success) for row in rows if (row.suite, row.method) == (suite, method)]
            # shares kept are the same for many methods: side by side, so that every interval is seen
            aside = 0.988 ** (place - (len(methods) - 1) / 2) if shares else 1.0
            _draw(ax, points, aside, label=names[method], **_look(place))
        ax.set_title(suite, fontsize=11)
        ax.set_xlabel(label)
        ax.set_ylim(-3, 103)
        ax.grid(color="#e4e7ea", linewidth=0.8)
        ax.set_axisbelow(True)
        if shares:
            ax.set_xscale("log")
            ticks = sorted({x(row) for row in rows} - {None})
            ax.set_xticks(ticks, [f"{share:g}" for share in ticks])
            ax.minorticks_off()
            ax.invert_xaxis()
    axes[0].set_ylabel("success, %")
    lines = {label: line for ax in axes for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    if lines:
        axes[-1].legend(lines.values(), lines, fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.tight_layout()
    return figure


def _look(place: int) -> dict[str, Any]:
    """Colour and marker of the method at a place of the legend."""
    return {"color": COLOURS[place % len(COLOURS)], "marker": "osD^vPX*"[place % 8], "markersize": 5, "capsize": 3}


def _draw(ax: Axes, points: Sequence[tuple[float | None, Estimate | None]], aside: float, **look: Any) -> None:
    """One method's line with its intervals; points without one of the two are left out."""
    points = sorted(((at, e) for at, e in points if at is not None and e is not None), key=lambda point: point[0])
    if not points:
        return
    values = [100 * e.value for _, e in points]
    spans = [[100 * (e.value - e.low) for _, e in points], [100 * (e.high - e.value) for _, e in points]]
    ax.errorbar([at * aside for at, _ in points], values, spans, linewidth=1.3, **look)


def short_names(methods: Sequence[str]) -> dict[str, str]:
    """Methods' names for a legend: of the choices only those in which the variants of one pruner differ."""
    words = {method: re.split(r" (?=\w+=|rtc$)", method) for method in methods}  # a choice may have spaces in it
    variants: dict[str, list[set[str]]] = {}
    for pruner, *choices in words.values():
        variants.setdefault(pruner, []).append(set(choices))
    shared = {pruner: set.intersection(*sets) if len(sets) > 1 else set() for pruner, sets in variants.items()}
    return {method: " ".join(w for w in parts if w not in shared[parts[0]]) for method, parts in words.items()}


def report_figures(rows: Sequence[Row]) -> dict[str, Figure]:
    """Every figure of a report by file name; those of further conditions are numbered."""
    figures: dict[str, Figure] = {}
    conditions = []
    for row in rows:
        if row.conditions not in conditions:
            conditions.append(row.conditions)
    for place, condition in enumerate(conditions, 1):
        chosen, end = [row for row in rows if row.conditions == condition], "" if place == 1 else f"_{place}"
        drawn = {
            "success_by_keep": success_by_keep(chosen),
            "success_by_exact_flops": success_by_flops(chosen),
            "success_by_paper_flops": success_by_flops(chosen, exact=False),
        }
        # nothing to draw where a server did not tell what its calls cost
        figures |= {f"{name}{end}": f for name, f in drawn.items() if any(ax.containers for ax in f.axes)}
    return figures
