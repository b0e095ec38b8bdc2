"""One theme for tables and figures: markdown, numbers, axes, colours and legends that all look alike.

    figure, axes = panels(2)                                axes [1, 2]
    figure, axes = grid(4)                                  four axes, two in a line: read at the width of a column
    ax.plot(x, y, **look(3), label="…")                     the fourth line of a figure, in every figure
    band(ax, x, low, high, colour(3))                       its interval
    legend(figure, axes)                                    below the panels, where it hides nothing

Colours are Okabe and Ito's, which people with any colour vision tell apart, without yellow; markers repeat what they
say. Paper is white, so that a figure reads the same on a dark page.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

INK = {"linewidth": 0.8, "color": "#e4e7ea"}

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#333333")
"""Okabe and Ito 2008, jfly.uni-koeln.de/color, in the order in which lines of a figure take them."""
QUIET = "#9aa3ab"
"""What is there for comparison."""
MARKERS = "osD^vP*X<>"


class Table(str):
    """Markdown that notebooks show as a table; a string everywhere else."""

    def _repr_markdown_(self) -> str:
        return str(self)


def markdown(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> Table:
    """A table; the first column is text, the others are aligned to the right; None is a dash."""
    cell = lambda value: "–" if value is None else str(value)
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *([cell(v) for v in row] for row in rows)]
    return Table("\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n")


def form(value: float | None, pattern: str) -> str | None:
    """A number by a pattern, None as it is.

    >>> form(0.5, "{:.1%}"), form(None, "{}")
    ('50.0%', None)
    """
    return None if value is None else pattern.format(value)


def colour(number: int) -> str:
    """Of the n-th line of a figure; after the last one they begin anew."""
    return COLOURS[number % len(COLOURS)]


def look(number: int) -> dict[str, Any]:
    """How the n-th line of a figure is drawn: colour and marker, and dashes once the colours begin anew."""
    dashed = number // len(COLOURS) % 2 == 1
    line = {"color": colour(number), "linestyle": "--" if dashed else "-", "linewidth": 1.4}
    return line | {"marker": MARKERS[number % len(MARKERS)], "markersize": 4}


def band(ax: Axes, x: Sequence[float], low: Sequence[float], high: Sequence[float], color: str) -> None:
    """An interval along a line; a bar where it has one point only."""
    if len(x) > 1:
        ax.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)
    else:
        ax.vlines(x, low, high, color=color, linewidth=1.4)


def legend(figure: Figure, axes: Iterable[Axes], columns: int = 4, **options: Any) -> None:
    """One legend for all axes, below them; each name once."""
    entries = {name: line for ax in axes for line, name in zip(*ax.get_legend_handles_labels(), strict=True)}
    if entries:
        look = {"loc": "outside lower center", "frameon": False, "fontsize": 9, "ncols": min(columns, len(entries))}
        figure.legend(entries.values(), entries.keys(), **look | options)


def grid(count: int, columns: int = 2, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure of `count` axes, some in a line; what is left of the last line is empty."""
    columns = min(columns, count)
    figure, axes = panels(columns, rows=-(-count // columns), **{"width": 3.7, "height": 3.1} | options)
    for ax in axes.flat[count:]:
        ax.set_axis_off()
    return figure, list(axes.flat[:count])


def panels(
    count: int, *, width: float = 4.2, height: float = 3.8, rows: int = 1, **options: Any
) -> tuple[Figure, np.ndarray]:
    """A figure that belongs to nobody, and its axes [rows, count]; pyplot is not touched."""
    figure = Figure((width * count + 0.5, height * rows), dpi=120, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, count, squeeze=False, **options)
    for ax in axes.flat:
        ax.grid(**INK)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_prop_cycle(color=COLOURS)
    return figure, axes
