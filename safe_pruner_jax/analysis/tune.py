"""The best setting of every method within one budget of multiply-adds: methods compared at equal cost.

    rows = [...]                              of `deviation`, methods written as NAME:choice=value,…
    proposals(rows, 0.78)                     method → its setting with the smallest error within the budget
    table(rows, 0.78)

Every method has to have the same number of settings, or the comparison favours the one that was tried more often. The
error is of the actions and of all calls, keyframes in: nothing is executed, so a setting is confirmed in closed loop.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from safe_pruner_jax.analysis.budget import Budget, best
from safe_pruner_jax.analysis.deviation import summary
from safe_pruner_jax.analysis.rows import Row
from safe_pruner_jax.figures.theme import Table, form, markdown


def settings(rows: Sequence[Row]) -> Counter[str]:
    """Method → how many settings of it were played, all shares kept."""
    return Counter(_name(method) for method, _ in {(row["method"], row["keep"]) for row in rows})


def proposals(rows: Sequence[Row], budget: float) -> dict[str, dict[str, Any] | None]:
    """Method → the numbers of its best setting within the budget, with "setting" (NAME:choice=value,…) and "keep".

    Args:
      rows: of `deviation.measure` with "method" and "keep".
      budget: multiply-adds of a call, mean over all calls, as a share of those of the full step.

    Returns:
      None for a method that has no setting within the budget.
    """
    points: dict[str, list[dict[str, Any]]] = {}
    for (method, keep), numbers in summary(rows).items():
        point = {"setting": method, "keep": keep, "error": numbers["rms"], **numbers}
        points.setdefault(_name(method), []).extend([point] if point["flops"] is not None else [])
    place = {name: best(played, Budget("flops", budget)) for name, played in points.items()}
    return {name: None if i is None else points[name][i] for name, i in place.items()}


def arguments(chosen: Mapping[str, dict[str, Any] | None]) -> list[str]:
    """The chosen settings as `openpi sweep --methods` takes them."""
    points = [point for point in chosen.values() if point is not None]
    return [f"{p['setting']}{',' if ':' in p['setting'] else ':'}keep={p['keep']:g}" for p in points]


def table(rows: Sequence[Row], budget: float) -> str:
    """The chosen settings, the smallest error first, and the command that plays them."""
    chosen, numbers = proposals(rows, budget), settings(rows)
    columns = ["method", "settings", "chosen", "keep", "keyframes", "multiply-adds", "error, all calls"]
    lines = [
        [
            name,
            str(numbers[name]),
            "none within the budget" if point is None else point["setting"].partition(":")[2] or "as it is",
            *(form(point and point[key], "{:.0%}") for key in ("keep", "keyframes")),
            form(point and point["flops"], "{:.3f}×"),
            form(point and point["error"], "{:.3f}"),
        ]
        for name, point in sorted(chosen.items(), key=lambda item: item[1]["error"] if item[1] else float("inf"))
    ]
    text = markdown(columns, lines)
    if len(set(numbers.values())) > 1:
        text += "\nNot every method has the same number of settings: the comparison favours the one that has more.\n"
    methods = " ".join(f"'{method}'" for method in arguments(chosen))
    return Table(f"{text}\nAt most {budget:g}× of the multiply-adds. Play them: `openpi sweep --methods {methods}`.\n")


def _name(method: str) -> str:
    return method.partition(":")[0]
