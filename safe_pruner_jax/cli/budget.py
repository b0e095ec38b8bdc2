"""`openpi analyze calibrate --budget …`: settings of `safe` are played, the best within the budget is proposed."""

import functools
import json
from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

from safe_pruner_jax.analysis import budget, calibrate, cost, deviation
from safe_pruner_jax.analysis.budget import Budget
from safe_pruner_jax.analysis.rows import Row, Rows
from safe_pruner_jax.cli.recordings import Load, OnEpisodes, leave, logger, recordings, replan_of
from safe_pruner_jax.policy.identity import local_device
from safe_pruner_jax.policy.loading import CALIBRATION
from safe_pruner_jax.policy.policy import Policy
from safe_pruner_jax.policy.spec import Method
from safe_pruner_jax.pruners import factory, make

TRIES = 3
"""Settings between those of the grid that are played to come nearer to the budget."""

Point = dict[str, Any]


class Plays:
    """Settings of `safe`, played on the episodes of the arguments; what a file has is not played again."""

    def __init__(self, args: OnEpisodes, load: Load, file: Rows):
        self._args, self._file, self._policy = args, file, functools.cache(load)
        self._episodes = {r.name: functools.cache(lambda r=r: list(r.calls())) for r in recordings(args, self._policy)}
        self._references: dict[str, Any] = {}

    def __call__(self, choices: Mapping[str, Any], share: float) -> Point:
        """The numbers of one setting over all episodes, with its choices and the share that its γ stands for."""
        rows, pruned = [], None
        for name in self._episodes:
            part = f"{name} | {json.dumps(choices, sort_keys=True)}"
            if part not in self._file.finished:
                pruned = pruned or self._policy().with_pruner(make("safe", **choices))
                self._file.add(part, [self._play(pruned, name)])
            rows += self._file.parts[part]
        point = dict(choices) | {"share": share} | budget.summary(rows)
        report = "keep %.3f, γ %.4f: %.4f σ, %.3f× of the multiply-adds, %.2f ms"
        logger.info(report, *(point[key] for key in ("keep", "threshold", "error", "flops", "ms")))
        return point

    def _play(self, pruned: Policy, name: str) -> Row:
        calls = self._episodes[name]()
        if name not in self._references:
            self._references[name] = deviation.actions_of(self._policy(), calls, replan_of(self._args))[0]
        return budget.play(pruned, calls, self._references[name], cost.shares(pruned, calls[0].request))


def settle(plays: Plays, proposal: Mapping[str, Any], thresholds: Mapping[float, float], args: Any, b: Budget) -> Any:
    """Plays the grid of shares kept and γ, then settings between, until one is near the budget: points and the chosen.

    Raises:
      ValueError: nothing that was played is within the budget.
    """
    fixed = inherited(args) | {name: value for name, value in proposal["choices"].items() if name != "threshold"}
    grid = [(keep, share) for share in thresholds for keep in args.budget_keeps]
    points = [plays({"keep": k, "threshold": thresholds[s], **fixed}, s) for k, s in grid]
    chosen = budget.choose(points, b)
    for _ in range(TRIES):
        share, keep = points[chosen]["share"], round(budget.refine(points, chosen, b), 3)
        if abs(points[chosen][b.kind] / b.value - 1) <= budget.NEAR / 2 or any(
            (p["keep"], p["share"]) == (keep, share) for p in points
        ):
            break
        points.append(plays({"keep": keep, "threshold": thresholds[share], **fixed}, share))
        chosen = budget.choose(points, b)
    return points, chosen


def inherited(args: Any) -> dict[str, Any]:
    """Choices of `safe` that the checkpoint was calibrated to, beside those proposed here: a warm start, say."""
    defaults = {name: parameter.default for name, parameter in signature(factory("safe")).parameters.items()}
    fitted = args.fit("LIBERO", Method("safe", defaults, frozenset(budget.PROPOSED))).choices
    return {name: value for name, value in fitted.items() if value != defaults[name]}


def run_budget(
    args: Any, load: Load, conditions: Mapping[str, Any], proposal: dict[str, Any], forecasts: Sequence[Row]
) -> None:
    """Proposes, and leaves `budget.md`, `budget.png` and `calibrate.json`."""
    b = budget.read_budget(args.budget)
    queries = proposal["choices"]["queries"]
    gamma = {share: calibrate.gammas(forecasts, share)[queries]["gamma"] for share in args.shares}
    thresholds = {share: round(value, 4) for share, value in gamma.items() if value is not None}
    settings = {**conditions, "replan": replan_of(args), "driver": args.driver, "device": local_device()}
    with Rows(args.out / "budget.jsonl", settings) as file:
        points, chosen = settle(Plays(args, load, file), proposal, thresholds, args, b)
    point = points[chosen]
    choices = {key: point[key] for key in ("keep", *proposal["choices"])}
    proposal |= {"choices": choices, "keep": point["keep"], "share": point["share"]}
    proposal["budget"] = {
        "asked": args.budget,
        "kind": b.kind,
        "value": b.value,
        "played": point,
        "device": local_device(),
    }
    proposal["budget"] |= budget.neighbours(points, chosen, b.kind)
    (args.out / CALIBRATION).write_text(json.dumps(proposal, indent=1) + "\n", encoding="utf-8")
    leave(args.out, "budget", budget.table(points, chosen, b), budget.figure(points, chosen, b))
