"""Pictures of a report: success against what is kept, and against what it costs. Functions return figures."""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from safe_pruner_jax.evaluation.report import Row
from safe_pruner_jax.figures.theme import QUIET, band, colour, grid, legend, look

TOGETHER = 4
"""Methods that share a panel; more of them get one each, with the others in grey behind."""


def success_by_keep(rows: Sequence[Row]) -> Figure:
    """Success rates with their 95 % intervals against the share of visual tokens kept."""
    return _panels(rows, lambda row: None if row.keep is None else 100 * row.keep, "visual tokens kept, %", shares=True)


def success_by_flops(rows: Sequence[Row], *, exact: bool = True, together: int = TOGETHER) -> Figure:
    """Success rates with their 95 % intervals against multiply-adds per policy call.

    Args:
      rows: from `summarise`, of equal conditions.
      exact: all that the programs compute, or the papers' prefix.
      together: methods that share a panel.
    """
    name = "exact_flops" if exact else "paper_flops"
    giga = lambda row: None if getattr(row, name) is None else getattr(row, name) / 1e9
    label = f"10⁹ multiply-adds per call ({'all' if exact else 'prefix, as in papers'})"
    return _panels(rows, giga, label, together=together)


def success_by_speed(rows: Sequence[Row]) -> Figure:
    """Success rates with their 95 % intervals against the measured speed-up of a typical call.

    Rows that did not run on the baseline's device have no speed-up and are left out.
    """
    return _panels(rows, lambda row: 1 / row.ms_ratio if row.ms_ratio else None, "measured speed-up of a policy call")


def _panels(
    rows: Sequence[Row],
    x: Callable[[Row], float | None],
    label: str,
    *,
    shares: bool = False,
    together: int = TOGETHER,
) -> Figure:
    if not rows:
        raise ValueError("rows: expected at least one to draw, got none")
    if any(row.conditions != rows[0].conditions for row in rows):
        raise ValueError("rows: expected equal conditions (policy, checkpoint, …); draw one figure for each")
    suites, methods = (list(dict.fromkeys(getattr(row, name) for row in rows)) for name in ("suite", "method"))
    names = short_names(methods)
    at = {(s, m): _points(rows, s, m, x) for s in suites for m in methods}
    if len(methods) <= together:
        figure, axes = grid(len(suites))
        for ax, suite in zip(axes, suites, strict=True):
            ax.set_title(suite, fontsize=11)
            _lines(ax, {names[method]: at[suite, method] for method in methods})
    else:
        figure, axes = grid(len(methods), columns=3, width=2.8, height=2.4, sharex=True, sharey=True)
        for ax, method in zip(axes, methods, strict=True):
            ax.set_title(names[method], fontsize=9)
            for other in (at[suite, m] for suite in suites for m in methods if m != method):
                ax.plot([p.x for p in other], [p.middle for p in other], color=QUIET, alpha=0.35, linewidth=1)
            _lines(ax, {suite: at[suite, method] for suite in suites})
    for ax in axes:
        ax.set_ylim(-3, 103)
        if shares:
            _share_axis(ax, sorted({share for row in rows if (share := x(row)) is not None}))
    for ax in axes:
        if ax.get_subplotspec().is_first_col():
            ax.set_ylabel("success, %")
    for ax in axes[-min(3, len(axes)) :]:
        ax.set_xlabel(label, fontsize=9)
        ax.tick_params(labelbottom=True)
    if len(methods) <= together or len(suites) > 1:
        legend(figure, axes)
    return figure


class _Point(NamedTuple):
    """Success in per cent with its 95 % interval."""

    x: float
    middle: float
    low: float
    high: float


def _points(rows: Sequence[Row], suite: str, method: str, x: Callable[[Row], float | None]) -> list[_Point]:
    estimates = [(x(row), row.success) for row in rows if (row.suite, row.method) == (suite, method)]
    return sorted(_Point(at, 100 * e.value, 100 * e.low, 100 * e.high) for at, e in estimates if None not in (at, e))


def _lines(ax: Axes, lines: dict[str, list[_Point]]) -> None:
    """Each with its interval as a band; one that has no point has no name either."""
    for number, (name, points) in enumerate(lines.items()):
        if points:
            at = [p.x for p in points]
            ax.plot(at, [p.middle for p in points], label=name, **look(number))
            band(ax, at, [p.low for p in points], [p.high for p in points], colour(number))


def _share_axis(ax: Axes, ticks: Sequence[float]) -> None:
    ax.set_xscale("log")
    ax.set_xticks(ticks, [f"{share:g}" for share in ticks])
    ax.minorticks_off()
    if not ax.xaxis_inverted():  # panels may share it
        ax.invert_xaxis()


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
        figures |= {f"{name}{end}": f for name, f in drawn.items() if any(ax.lines for ax in f.axes)}
    return figures
