"""`openpi analyze NAME`: episodes in; rows (JSONL), a table (markdown) and a figure (PNG) out.

openpi analyze recall --data demos/libero_object/*.hdf5 --out out/analysis policy:embedded
openpi analyze calibrate --data libero:libero_object/0/0 libero:libero_object/1/0 policy:embedded
"""

import ast
import dataclasses
import functools
import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from safe_pruner_jax.analysis import calibrate, cost, deviation, forecast, kappa, overlap, recall, tune
from safe_pruner_jax.analysis.budget import read_budget
from safe_pruner_jax.analysis.rows import Row, Rows
from safe_pruner_jax.analysis.trace import Trace, Watch
from safe_pruner_jax.cli.budget import run_budget
from safe_pruner_jax.cli.recordings import (
    Analysis,
    Load,
    OnEpisodes,
    OnRequests,
    leave,
    logger,
    only_libero,
    recordings,
    replan_of,
)
from safe_pruner_jax.policy.identity import local_device
from safe_pruner_jax.policy.loading import CALIBRATION
from safe_pruner_jax.policy.policy import Policy, layout_of
from safe_pruner_jax.policy.spec import Method, check_choices, split_method
from safe_pruner_jax.pruners import PRUNERS, factory
from safe_pruner_jax.pruners.checks import require


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recall(OnEpisodes):
    """Core tokens that each score would drop, against the share kept (SAFE-Pruner, Fig. 2b).

    Args:
      keeps: shares of the visual tokens kept.
      fuses: values of λ.
      core: share of the tokens that count as core.
      every: calls between keyframes within a subtask; every subtask starts with one.
    """

    keeps: tuple[float, ...] = recall.KEEPS
    fuses: tuple[float, ...] = recall.FUSES
    core: float = 0.1
    every: int = 10

    def rows(self, trace: Trace) -> list[Row]:
        """The measurement of one episode."""
        settings = {"keeps": self.keeps, "fuses": self.fuses, "core": self.core, "every": self.every}
        return recall.measure(trace, **self.forecast(), **settings)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forecast(OnEpisodes):
    """Accuracy of forecast saliency against the age of the keyframe (SAFE-Pruner, Fig. A).

    Args:
      ages: calls from the keyframe to the forecast one, at most.
      references: calls that are keyframes: every one, or the first of the episode as in the paper.
    """

    ages: int = 10
    references: Literal["every", "first"] = "every"

    def rows(self, trace: Trace) -> list[Row]:
        """The measurement of one episode."""
        return forecast.measure(trace, **self.forecast(), ages=self.ages, references=self.references)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kappa(OnEpisodes):
    """κ, keyframes and subtask boundaries along episodes (SAFE-Pruner, Fig. 3).

    Args:
      threshold: γ; None is the default of the pruner.
    """

    threshold: float | None = None

    @property
    def gamma(self) -> float:
        """γ as it is used."""
        default = inspect.signature(PRUNERS["safe"]).parameters["threshold"].default
        return default if self.threshold is None else self.threshold

    def rows(self, trace: Trace) -> list[Row]:
        """The measurement of one episode."""
        return kappa.measure(trace, **self.forecast(), threshold=self.gamma)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Overlap(OnEpisodes):
    """How different the two sets are that VLA-Pruner combines (its Fig. 11).

    Args:
      keeps: shares of the visual tokens kept.
      window: w.
      decay: γ.
    """

    keeps: tuple[float, ...] = overlap.KEEPS
    window: int = 3
    decay: float = 0.8

    def rows(self, trace: Trace) -> list[Row]:
        """The measurement of one episode."""
        return overlap.measure(trace, cut=self.cut, keeps=self.keeps, window=self.window, decay=self.decay)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibrate(Recall):
    """Proposes queries, λ and γ for SAFE-Pruner from core-token recall and κ; writes calibrate.json as well.

    Args:
      keep: share kept at which core-token losses are compared.
      share: of the comparisons within a subtask that may fall below γ.
      ages: calls from a keyframe to the call compared with it, at most.
      budget: 25ms per call on this machine, 0.05 (error of the actions in σ) or 0.6x (of the multiply-adds): settings
        are played, and keep is proposed, too.
      budget_keeps: shares kept that are played for it.
      shares: those of the comparisons within a subtask below γ, that are played for it.
    """

    keep: float = 0.2
    share: float = 0.1
    ages: int = 10
    budget: str | None = None
    budget_keeps: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4, 0.7)
    shares: tuple[float, ...] = (0.02, 0.1, 0.3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Actions(OnRequests):
    """How far every method moves the actions, on recorded observations.

    Args:
      methods: names of pruners, with choices after a colon: safe:pool=1.5,queries=text. What is not written out is as
        `openpi serve` would have it for this policy.
      keeps: shares of the visual tokens kept.
      budget: 0.8x of the multiply-adds of the full step, keyframes included: the best setting of each method within it,
        among its choices and shares, is told as well.
    """

    methods: tuple[str, ...] = ("safe", "vla_pruner", "fastv", "random")
    keeps: tuple[float, ...] = (0.5, 0.3, 0.2, 0.1)
    budget: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost(Analysis):
    """FLOPs and measured speed-up against the pruning ratio and the pruning layer (SAFE-Pruner, Fig. B).

    Args:
      keeps: shares of the visual tokens kept.
      cuts: pruning layers ℓs, from 0 on; those beyond the model's depth are left out.
      rounds: measured rounds; 0 counts FLOPs only.
    """

    keeps: tuple[float, ...] = (0.5, 0.3, 0.2, 0.1)
    cuts: tuple[int, ...] = (1, 3, 6, 9)
    rounds: int = 15


def run_recall(args: Recall, load: Load, conditions: Mapping[str, Any]) -> None:
    """`openpi analyze recall`."""
    (rows,) = _over_episodes(args, load, conditions, recall=args)
    leave(args.out, "recall", recall.table(rows), recall.figure(rows))


def run_forecast(args: Forecast, load: Load, conditions: Mapping[str, Any]) -> None:
    """`openpi analyze forecast`."""
    (rows,) = _over_episodes(args, load, conditions, forecast=args)
    leave(args.out, "forecast", forecast.table(rows), forecast.figure(rows))


def run_kappa(args: Kappa, load: Load, conditions: Mapping[str, Any]) -> None:
    """`openpi analyze kappa`."""
    (rows,) = _over_episodes(args, load, conditions, kappa=args)
    leave(args.out, "kappa", kappa.table(rows), kappa.figure(rows, args.gamma))


def run_overlap(args: Overlap, load: Load, conditions: Mapping[str, Any]) -> None:
    """`openpi analyze overlap`."""
    (rows,) = _over_episodes(args, load, conditions, overlap=args)
    leave(args.out, "overlap", overlap.table(rows), overlap.figure(rows))


def run_calibrate(args: Calibrate, load: Load, conditions: Mapping[str, Any]) -> None:
    """`openpi analyze calibrate`: both measurements on every episode, then the rule of `calibrate`, then the budget."""
    if args.budget is not None:
        read_budget(args.budget)  # before anything is computed
        only_libero(args, "budget")
        within = lambda shares: bool(shares) and all(0 < share <= 1 for share in shares)
        require(within(args.budget_keeps), "budget_keeps", "shares in (0, 1]", args.budget_keeps)
        require(within(args.shares) and max(args.shares) < 1, "shares", "shares in (0, 1)", args.shares)
    episodes = {f.name: getattr(args, f.name) for f in dataclasses.fields(OnEpisodes)}
    same = {f.name: getattr(args, f.name) for f in dataclasses.fields(Recall)}
    both = {"recall": Recall(**same | {"keeps": tuple(sorted({*args.keeps, args.keep}))})}
    both["forecast"] = Forecast(**episodes, ages=args.ages)
    recalls, forecasts = _over_episodes(args, load, conditions, **both)
    proposal = calibrate.propose(recalls, forecasts, keep=args.keep, share=args.share)
    usual = {f.name: f.default for f in dataclasses.fields(OnEpisodes)}  # as `safe` has it
    proposal["choices"] |= {name: value for name, value in args.forecast().items() if value != usual[name]}
    (args.out / CALIBRATION).write_text(json.dumps(proposal, indent=1) + "\n", encoding="utf-8")
    leave(args.out, "calibrate", calibrate.table(proposal), calibrate.figure(forecasts, proposal))
    if args.budget is not None:
        run_budget(args, load, conditions, proposal, forecasts)
    print(f"copy {args.out / CALIBRATION} into the checkpoint's folder to make these the policy's own defaults")


def run_actions(args: Actions, load: Load, conditions: Mapping[str, Any]) -> None:
    """`openpi analyze actions`: one part of the file per episode, method and share kept."""
    only_libero(args, "actions")
    budget = read_budget(args.budget) if args.budget is not None else None
    require(budget is None or budget.kind == "flops", "budget", "a share of the multiply-adds, 0.8x", args.budget)
    # an `Actions` from the command line is a `Model` too, which knows what its checkpoint was calibrated to
    fitted = lambda name, keep: args.fit("LIBERO", _method(name, keep), replan_of(args))
    methods = [(name, keep, fitted(name, keep)) for name in args.methods for keep in args.keeps]
    policy = functools.cache(load)
    pruned = functools.cache(lambda number: policy().with_pruner(methods[number][2].make()))
    parts: list[str] = []
    with Rows(args.out / "actions.jsonl", {**conditions, "replan": replan_of(args), "driver": args.driver}) as file:
        for recording in recordings(args, policy):
            calls = functools.cache(lambda recording=recording: list(recording.calls()))
            reference = functools.cache(lambda calls=calls: deviation.actions_of(policy(), calls(), replan_of(args))[0])
            for number, (name, keep, method) in enumerate(methods):
                parts.append(f"{recording.name} | {name} | {json.dumps(method.choices, sort_keys=True)}")
                if parts[-1] not in file.finished:
                    row = deviation.measure(pruned(number), calls(), reference())
                    logger.info("%s: %s, keep %g", recording.name, name, keep)
                    file.add(parts[-1], [{"method": name, "keep": keep} | row])
        rows = [row for row in file.rows() if row["part"] in parts]
    leave(args.out, "actions", deviation.table(rows), deviation.figure(rows))
    if budget is not None:
        leave(args.out, "tune", tune.table(rows, budget.value))


def _method(text: str, keep: float) -> Method:
    """What "name" or "name:choice=value,choice=value" asks for, at a share kept."""
    name, texts = split_method(text)
    defaults = {key: parameter.default for key, parameter in inspect.signature(factory(name)).parameters.items()}
    known = [key for key in defaults if key != "keep"] if "keep" in defaults else []
    check_choices(text, name, texts if known else ("keep",), known)

    def value(text: str) -> Any:
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError):
            return text

    chosen = {key: value(text) for key, text in texts.items()}
    return Method(name, defaults | chosen | {"keep": keep}, frozenset(chosen) | {"keep"})


def run_cost(args: Cost, load: Load, conditions: Mapping[str, Any]) -> None:
    """`openpi analyze cost`: one part of the file per pruning layer."""
    policy: Policy | None = None
    settings = {**conditions, "keeps": args.keeps, "rounds": args.rounds, "device": local_device()}
    with Rows(args.out / "cost.jsonl", settings) as file:
        for cut in args.cuts:
            if (part := f"cut {cut}") in file.finished:
                continue
            policy = policy or load()
            config, weights = policy.engine.config, policy.engine.weights
            if not 0 <= cut < config.depth:
                logger.info("ℓs = %d left out: the model has %d layers", cut, config.depth)
                continue
            example, _ = policy.transform.prepare(policy.transform.example(np.random.default_rng(0)))
            if args.rounds:
                rows = cost.measure(weights, config, example, keeps=args.keeps, cut=cut, rounds=args.rounds)
            else:
                layout, steps = layout_of(example, config), len(weights.schedule.times)
                rows = [cost.closed_form(config, layout, keep, cut, steps) for keep in args.keeps]
            file.add(part, rows)
        parts = {f"cut {cut}" for cut in args.cuts}
        rows = [row for row in file.rows() if row["part"] in parts]
    if not rows:
        raise ValueError(f"cuts: expected at least one layer inside the model, got {args.cuts}")
    leave(args.out, "cost", cost.table(rows), cost.figure(rows))


def _over_episodes(args: OnEpisodes, load: Load, conditions: Mapping[str, Any], **kinds: Any) -> list[list[Row]]:
    """Rows of every kind over the episodes of `args`; each episode is watched once, and only if a file lacks it."""
    files = {}
    for name, kind in kinds.items():
        settings = {f.name: getattr(kind, f.name) for f in dataclasses.fields(kind) if f.name in _conditions(kind)}
        files[name] = Rows(args.out / f"{name}.jsonl", {**conditions, **settings, "replan": replan_of(args)})
    watch: list[Watch] = []

    def policy() -> Policy:
        watch.extend([] if watch else [Watch(load())])
        return watch[0].policy

    seen = []
    try:
        for recording in recordings(args, policy):
            seen.append(recording.name)
            missing = [name for name, file in files.items() if recording.name not in file.finished]
            if missing:
                policy()
                trace = watch[0](recording.calls())
                logger.info("%s: %d calls, %d subtasks", recording.name, len(trace), trace.subtask[-1] + 1)
                for name in missing:
                    files[name].add(recording.name, kinds[name].rows(trace))
        return [[row for row in file.rows() if row["part"] in seen] for file in files.values()]
    finally:
        for file in files.values():
            file.__exit__()


def _conditions(kind: OnEpisodes) -> set[str]:
    """Fields of a measurement that its rows depend on."""
    names = {f.name for f in dataclasses.fields(type(kind))} - {"out", "data", "limit"}
    home = next(cls for cls in (Recall, Forecast, Kappa, Overlap) if isinstance(kind, cls))
    return names & {f.name for f in dataclasses.fields(home)}


COMMANDS: dict[str, tuple[type, Callable[..., None]]] = {
    "recall": (Recall, run_recall),
    "forecast": (Forecast, run_forecast),
    "kappa": (Kappa, run_kappa),
    "overlap": (Overlap, run_overlap),
    "actions": (Actions, run_actions),
    "cost": (Cost, run_cost),
    "calibrate": (Calibrate, run_calibrate),
}
"""Name of the analysis → its arguments and what runs them: (args, load, conditions)."""
