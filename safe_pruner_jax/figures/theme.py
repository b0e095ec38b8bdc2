"""One theme for tables and figures: markdown, numbers, and empty axes that all look alike."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

INK = {"linewidth": 0.8, "color": "#e4e7ea"}


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
    return figure, axes
