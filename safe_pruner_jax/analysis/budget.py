"""A budget in, settings of `safe` out: what a control step may cost, or how far its actions may move.

    budget = read_budget("25ms")                                "0.05": error, in σ; "0.6x": share of the multiply-adds
    point = play(policy, pruner, calls, reference, …)           one setting, played on recorded observations
    chosen = choose(points, budget)                             the best point within it
    keep = refine(points, chosen, budget)                       the share kept at which its line meets the budget

Cost and error are of all calls, keyframes in. A cheaper setting is not always worse, so the frontier is what is left
when every point that another one beats in both is taken out.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from safe_pruner_jax.analysis import deviation
from safe_pruner_jax.analysis.calibrate import command
from safe_pruner_jax.analysis.episodes import Call
from safe_pruner_jax.analysis.rows import Row, rounded
from safe_pruner_jax.figures.theme import QUIET, Table, colour, legend, markdown, panels
from safe_pruner_jax.policy.policy import Policy

NEAR = 0.1
"""A played proposal may miss its budget by this share of it."""

PROPOSED = ("keep", "queries", "fuse", "threshold", "cut", "late_layers", "late_steps", "soft")
"""Choices of `safe` that a calibration settles, or was measured with."""

_AIM = 0.97

Kind = Literal["ms", "flops", "error"]

_UNIT = {"ms": "ms", "flops": "× of the multiply-adds", "error": "σ"}


class Budget(NamedTuple):
    """What may be spent: milliseconds per call, a share of the multiply-adds of the full step, or an error in σ."""

    kind: Kind
    value: float

    def __str__(self) -> str:
        return f"{self.value:g} {_UNIT[self.kind]}"


def read_budget(text: str) -> Budget:
    """A budget from the command line.

    Raises:
      ValueError: none of the three forms, or not above zero.

    >>> read_budget("25ms"), read_budget("0.6x"), read_budget("0.05")
    (Budget(kind='ms', value=25.0), Budget(kind='flops', value=0.6), Budget(kind='error', value=0.05))
    """
    kind: Kind = "ms" if text.endswith("ms") else "flops" if text.endswith("x") else "error"
    try:
        value = float(text.removesuffix("ms").removesuffix("x"))
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf") or (kind == "flops" and value >= 1):
        forms = "25ms, 0.05 (error of the actions in standard deviations) or 0.6x (of the multiply-adds)"
        raise ValueError(f"budget: expected {forms}, got {text}")
    return Budget(kind, value)


def play(policy: Policy, calls: Iterable[Call], reference: np.ndarray, costs: tuple[float, float]) -> Row:
    """One setting on one episode.

    Args:
      policy: with the pruner.
      calls: of the episode.
      reference: [calls, replan, n] actions of the same policy with every token (`deviation.actions_of`).
      costs: multiply-adds of a keyframe and of a pruned step, as shares of the full step's.

    Returns:
      Per call "errors" in σ, "ms" and "flops"; "keyframes", the numbers of the calls that ran everything.
    """
    session = policy.session()
    replies = [session.infer(call.request) for call in calls]
    actions = np.stack([reply["actions"][: reference.shape[1]] for reply in replies])
    keyframe = np.array([reply["pruning"]["keyframe"] for reply in replies])
    return {
        "errors": rounded(deviation.errors(policy, actions, reference)),
        "ms": rounded([reply["policy_timing"]["infer_ms"] for reply in replies], 3),
        "flops": rounded(np.where(keyframe, *costs)),
        "keyframes": np.flatnonzero(keyframe).tolist(),
    }


def summary(rows: Sequence[Row]) -> dict[str, float]:
    """A setting's numbers over all episodes: "error" (root mean square), "ms", "flops", "keyframes" (share).

    Milliseconds are the medians of keyframes and of pruned calls, weighted by how many there are: what a call costs
    that nothing disturbs and that compiles nothing.
    """
    together = lambda name: np.concatenate([row[name] for row in rows]).astype(np.float64)
    keyframe = np.concatenate([np.isin(np.arange(len(row["errors"])), row["keyframes"]) for row in rows])
    ms, share = together("ms"), float(keyframe.mean())
    parts = [(share, ms[keyframe]), (1 - share, ms[~keyframe])]
    return {
        "error": float(np.sqrt(np.square(together("errors")).mean())),
        "ms": float(sum(weight * np.median(part) for weight, part in parts if part.size)),
        "flops": float(together("flops").mean()),
        "keyframes": share,
    }


def best(points: Sequence[dict[str, Any]], budget: Budget) -> int | None:
    """Position of the best point within the budget: the smallest error for a cost, the smallest cost for an error."""
    within = [i for i, point in enumerate(points) if point[budget.kind] <= budget.value * (1 + 1e-9)]
    goal = "flops" if budget.kind == "error" else "error"
    return min(within, key=lambda i: (points[i][goal], points[i][budget.kind]), default=None)


def choose(points: Sequence[dict[str, Any]], budget: Budget) -> int:
    """`best`, for a budget that has to be met.

    Raises:
      ValueError: no point is within it; says what the nearest one has.
    """
    chosen = best(points, budget)
    if chosen is None:
        least = min(point[budget.kind] for point in points)
        raise ValueError(
            f"budget: expected at least {least:.4g} {_UNIT[budget.kind]}, which is the least of the settings played, "
            f"got {budget}; give more, or smaller --keeps"
        )
    return chosen


def refine(points: Sequence[dict[str, Any]], chosen: int, budget: Budget) -> float:
    """The share kept at which the line of the chosen point's γ meets the budget, between the shares that were played.

    Cost grows with what is kept and error falls, both not quite evenly: the line is made monotone first. It is met a
    little before the budget (`_AIM`), so that what is played stays within.
    """
    line = sorted((p for p in points if p["share"] == points[chosen]["share"]), key=lambda p: p["keep"])
    keeps, values = [p["keep"] for p in line], np.array([p[budget.kind] for p in line])
    goal = _AIM * budget.value
    if budget.kind == "error":
        values = np.minimum.accumulate(values)
        return float(np.interp(goal, values[::-1], keeps[::-1]))
    return float(np.interp(goal, np.maximum.accumulate(values), keeps))


def frontier(points: Sequence[dict[str, Any]], kind: Kind) -> list[int]:
    """Positions of the points that no other beats in cost and error, the cheapest first.

    Args:
      points: with "error" and the costs.
      kind: the cost; of an error budget it is the multiply-adds.
    """
    cost = "flops" if kind == "error" else kind
    order = sorted(range(len(points)), key=lambda i: (points[i][cost], points[i]["error"]))
    front, best = [], float("inf")
    for i in order:
        if points[i]["error"] < best:
            front.append(i)
            best = points[i]["error"]
    return front


def neighbours(points: Sequence[dict[str, Any]], chosen: int, kind: Kind) -> dict[str, dict[str, Any] | None]:
    """The next cheaper and the next dearer points of the frontier; None at its ends."""
    cost, line = "flops" if kind == "error" else kind, frontier(points, kind)
    price = points[chosen][cost]
    cheaper = [i for i in line if points[i][cost] < price and i != chosen]
    dearer = [i for i in line if points[i][cost] > price and i != chosen]
    return {"cheaper": points[cheaper[-1]] if cheaper else None, "dearer": points[dearer[0]] if dearer else None}


def table(points: Sequence[dict[str, Any]], chosen: int, budget: Budget) -> str:
    """Every setting played, the cheapest first, the chosen one marked; what its neighbours would change."""
    cost = "flops" if budget.kind == "error" else budget.kind
    point, line = points[chosen], set(frontier(points, budget.kind))
    rows = [
        [
            "**chosen**" if i == chosen else "frontier" if i in line else "",
            f"{p['keep']:.1%}",
            f"{p['threshold']:.4f}",
            f"{p['keyframes']:.1%}",
            f"{p['flops']:.3f}×",
            f"{p['ms']:.2f}",
            f"{p['error']:.4f}",
        ]
        for i, p in sorted(enumerate(points), key=lambda item: item[1][cost])
    ]
    text = markdown(["", "keep", "γ", "keyframes", "multiply-adds", "ms per call", "error, σ"], rows)
    text += f"\nBudget {budget}; played: {point[budget.kind]:.4g} {_UNIT[budget.kind]}.\n"
    for name, other in neighbours(points, chosen, budget.kind).items():
        if other is not None:
            text += f"Next {name}: keep {other['keep']:.1%}, γ {other['threshold']:.4f}: "
            text += f"{other[cost] / point[cost] - 1:+.0%} cost, error {other['error']:.4f} for {point['error']:.4f}.\n"
    choices = {name: point[name] for name in PROPOSED if name in point}
    return Table(text + f"Proposed: `{command(choices)}`.\n")


def figure(points: Sequence[dict[str, Any]], chosen: int, budget: Budget) -> Figure:
    """Error against cost, one line per γ, the frontier, the chosen point and its neighbours, and the budget."""
    cost = "flops" if budget.kind == "error" else budget.kind
    drawn, axes = panels(1, width=6.4, height=4.2)
    ax = axes[0, 0]
    lines: dict[float, list[dict[str, Any]]] = defaultdict(list)
    for point in points:
        lines[point["share"]].append(point)
    for number, (share, curve) in enumerate(sorted(lines.items())):
        curve.sort(key=lambda p: p[cost])
        x, y = [p[cost] for p in curve], [p["error"] for p in curve]
        ax.plot(x, y, marker="o", ms=4, lw=1, color=colour(number), label=f"γ at {share:.0%} of κ")
    best = [points[i] for i in frontier(points, budget.kind)]
    ax.plot([p[cost] for p in best], [p["error"] for p in best], color=QUIET, lw=4, alpha=0.35, label="frontier")
    ax.plot(points[chosen][cost], points[chosen]["error"], "*", ms=14, color="#222222", label="chosen")
    point = points[chosen]
    for other in neighbours(points, chosen, budget.kind).values():
        if other is not None:
            ax.plot(other[cost], other["error"], "o", ms=10, mfc="none", color="#222222")
            note = f"{other[cost] / point[cost] - 1:+.0%} cost\n{other['error'] - point['error']:+.3f} σ"
            ax.annotate(note, (other[cost], other["error"]), (8, 8), textcoords="offset points", fontsize=8)
    limit = ax.axhline if budget.kind == "error" else ax.axvline
    limit(budget.value, color="#222222", lw=1, ls="--", label=f"budget {budget}")
    ax.set(xlabel=f"cost of a call, {_UNIT[cost]}", ylabel="error of the executed actions, σ", ylim=(0, None))
    legend(drawn, [ax], columns=3)
    return drawn
