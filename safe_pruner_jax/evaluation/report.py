"""From records to a table: every method against a baseline, under equal conditions only.

    text = markdown(summarise(read_records(path) for each path, baseline="full"))

Two rules. Episodes count together only if their configurations agree; methods are compared only if all else does
(policy, checkpoint, precision, simulator, protocol). And an error is neither a success nor a failure: it is left out of
rates and pairs, and stands in a column of its own.
"""

import csv
import inspect
import io
import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, median
from typing import Any

from safe_pruner_jax.evaluation.records import Record, latest
from safe_pruner_jax.libero.suites import perturbation
from safe_pruner_jax.policy.identity import METHOD
from safe_pruner_jax.pruners import PRUNERS

ALL = "all"
"""The row over all suites of a method."""


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    """One method on one suite, on all of one perturbation (`all: position`), or on `ALL` of them.

    Args:
      conditions: what all rows of a table have in common, from the configuration.
      method: the pruner and its choices, but for `keep` and what is the factory's default.
      keep: share of the visual tokens that the method was told to keep, 1 without a cut; None if unknown. Methods with
        several cuts mean different things by it: see `kept` and the FLOPs.
      episodes, errors: how many, errors included.
      success: share of the episodes without error, Wilson's interval; None without any.
      difference: success minus the baseline's over `pairs` episodes without error on either side, Newcombe's interval.
      kept, keyframes, paper_flops, exact_flops: means over the episodes' calls: tokens, share of calls, multiply-adds.
      paper_ratio, exact_ratio: to the baseline's.
      ms: of a typical call, see `typical_ms`.
      ms_ratio: to the baseline's; None unless both ran on one device.
      jump: of actions where a chunk begins, relative to a step inside; median over the episodes.
    """

    conditions: Mapping[str, Any]
    method: str
    keep: float | None
    suite: str
    episodes: int
    errors: int
    success: Estimate | None
    difference: Estimate | None
    pairs: int
    kept: float | None
    keyframes: float | None
    paper_flops: float | None
    paper_ratio: float | None
    exact_flops: float | None
    exact_ratio: float | None
    ms: float | None
    ms_ratio: float | None
    jump: float | None


# --- statistics --------------------------------------------------------------------------------------------


def _z(level: float) -> float:
    return NormalDist().inv_cdf(0.5 + level / 2)


def wilson(successes: int, n: int, level: float = 0.95) -> Estimate:
    """A proportion and its Wilson score interval (Wilson 1927; Newcombe 1998, Stat. Med. 17:857, method 3).

    >>> e = wilson(81, 263)
    >>> f"{e.value:.3f} {e.low:.4f} {e.high:.4f}"
    '0.308 0.2553 0.3662'
    """
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"expected 0 ≤ successes ≤ n and n ≥ 1, got {successes} of {n}")
    z, p = _z(level), successes / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((middle + sign * half) / (1 + z * z / n) for sign in (-1, 1))
    return Estimate(p, 0.0 if successes == 0 else low, 1.0 if successes == n else high)


def paired_difference(both: int, first: int, second: int, neither: int, level: float = 0.95) -> Estimate:
    """Difference of two success rates over the same episodes (Newcombe 1998, Stat. Med. 17:2635, method 10).

    Two Wilson intervals squared and added, with the correlation of the pairs taken into account. Unlike a bootstrap
    over pairs it keeps a width where the methods never disagree.

    Args:
      both, neither: pairs in which both succeed, or none.
      first, second: pairs in which only that one does.
      level: of the interval.

    Returns:
      p₁ - p₂.

    >>> e = paired_difference(36, 12, 2, 0)
    >>> f"{e.value:.4f} {e.low:.4f} {e.high:.4f}"
    '0.2000 0.0569 0.3404'
    """
    n = both + first + second + neither
    one, two = wilson(both + first, n, level), wilson(both + second, n, level)
    margins = (both + first) * (second + neither) * (both + second) * (first + neither)
    product = both * neither - first * second
    if product > 0:
        product = max(product - n / 2, 0)  # Newcombe's continuity correction
    phi = product / math.sqrt(margins) if margins else 0.0
    half = lambda a, b: math.sqrt(max(0.0, a * a - 2 * phi * a * b + b * b))
    value = (first - second) / n
    return Estimate(
        value,
        value - half(one.value - one.low, two.high - two.value),
        value + half(one.high - one.value, two.value - two.low),
    )


def mcnemar(first: int, second: int) -> float:
    """Exact two-sided p of McNemar's test: of the episodes in which one of two methods succeeds, how many each has.

    >>> f"{mcnemar(12, 2):.4f}", mcnemar(0, 0)
    ('0.0129', 1.0)
    """
    n = first + second
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(min(first, second) + 1)) / 2**n)


def typical_ms(record: Record) -> float | None:
    """Milliseconds per call of an episode: its medians for keyframes and pruned calls, weighted by how many it had."""
    weights = {"keyframe": record.keyframes, "pruned": record.calls - record.keyframes}
    used = {kind: count for kind, count in weights.items() if count}
    if not used or any(not record.infer_ms.get(kind) for kind in used):
        return None
    return sum(count * record.infer_ms[kind]["p50"] for kind, count in used.items()) / record.calls


# --- rows --------------------------------------------------------------------------------------------------


def method_label(configuration: Mapping[str, Any]) -> str:
    """The pruner's name and those choices, but for `keep`, that are not its factory's defaults.

    >>> method_label({"pruner": "safe", "choices": {"keep": 0.2, "fuse": 0.0, "cut": 3}})
    'safe fuse=0.0'
    """
    name, choices = configuration["pruner"], configuration["choices"]
    usual = _defaults(name)
    chosen = {k: v for k, v in choices.items() if k != "keep" and not (k in usual and usual[k] == v)}
    return " ".join([name, *(f"{k}={v}" for k, v in chosen.items()), *(["rtc"] if configuration.get("rtc") else [])])


def _defaults(name: str) -> dict[str, Any]:
    """A factory's defaults as JSON has them; none of a pruner of another package."""
    parameters = inspect.signature(PRUNERS[name]).parameters if name in PRUNERS else {}
    return {key: json.loads(json.dumps(p.default)) for key, p in parameters.items()}


def summarise(records: Iterable[Record], baseline: str = "full") -> list[Row]:
    """The rows of all tables: conditions after conditions, the baseline first, then by method and falling ratio.

    Args:
      records: of any number of files; of an episode recorded twice the last one counts.
      baseline: label of the method that the others are compared to, see `method_label`; the pruner's name is enough
        where only one of its variants was played. A baseline of several ratios is compared at the same ratio.

    Raises:
      ValueError: no records, or no such method among them; without `full` there are just no differences.
    """
    by_condition: dict[str, dict[str, list[Record]]] = {}
    for record in latest(records):
        c = record.configuration
        conditions = json.dumps({k: v for k, v in c.items() if k not in METHOD}, sort_keys=True)
        method = json.dumps([c.get(name) for name in METHOD], sort_keys=True)
        by_condition.setdefault(conditions, {}).setdefault(method, []).append(record)
    if not by_condition:
        raise ValueError("no records: the files hold no finished episode")
    label = lambda group: method_label(group[0].configuration)
    labels = {label(g) for methods in by_condition.values() for g in methods.values()}
    variants = [name for name in labels if name.split()[0] == baseline]
    if baseline not in labels and len(variants) == 1:
        (baseline,) = variants
    if baseline not in {*labels, "full"}:
        raise ValueError(f"baseline: expected one of {', '.join(sorted(labels))}, got {baseline!r}")
    rows = []
    for conditions, methods in by_condition.items():
        groups = list(methods.values())
        bases = {_keep(g): g for g in groups if label(g) == baseline}
        for group in sorted(groups, key=lambda g: (label(g) != baseline, label(g), -(_keep(g) or 0))):
            base = next(iter(bases.values())) if len(bases) == 1 else bases.get(_keep(group), [])
            for name, suites in _groups(r.suite for r in group):
                chosen = [[r for r in g if r.suite in suites] for g in (group, base)]
                rows.append(_row(json.loads(conditions), name, *chosen))
    return rows


def _groups(suites: Iterable[str]) -> list[tuple[str, set[str]]]:
    """Names of rows and the suites they count: each, every perturbation with several suites, and `ALL`."""
    played = sorted(set(suites), key=lambda suite: (perturbation(suite) != "standard", perturbation(suite), suite))
    groups: list[tuple[str, set[str]]] = []
    for kind, members in itertools.groupby(played, perturbation):
        names = list(members)
        groups += [(name, {name}) for name in names]
        groups += [(f"{ALL}: {kind}", set(names))] if len(names) > 1 and len(names) < len(played) else []
    return groups + ([(ALL, set(played))] if len(played) > 1 else [])


def _row(conditions: Mapping[str, Any], suite: str, group: Sequence[Record], base: Sequence[Record]) -> Row:
    played = [r for r in group if r.outcome != "error"]
    wins = sum(r.outcome == "success" for r in played)
    is_baseline = bool(base) and group[0].configuration == base[0].configuration
    difference, pairs = compare(played, base)
    # the cost of episodes that both have: suites and prompts differ, and an episode that fails is longer
    shared = [r for r in base if r.key in {g.key for g in group}]
    ours = [r for r in group if r.key in {b.key for b in shared}]
    devices = {r.device for r in (*ours, *shared)}
    ratio = lambda of: _ratio(of(ours), of(shared))
    mean = lambda name: lambda rs: _mean(rs, lambda r: getattr(r, name))
    ms = lambda rs: _typical(rs)
    return Row(
        conditions=conditions,
        method=method_label(group[0].configuration),
        keep=_keep(group),
        suite=suite,
        episodes=len(group),
        errors=len(group) - len(played),
        success=wilson(wins, len(played)) if played else None,
        difference=None if is_baseline else difference,
        pairs=0 if is_baseline else pairs,
        kept=mean("kept")(group),
        keyframes=_mean(group, lambda r: r.keyframes / r.calls if r.calls else None),
        paper_flops=mean("paper_flops")(group),
        paper_ratio=ratio(mean("paper_flops")),
        exact_flops=mean("exact_flops")(group),
        exact_ratio=ratio(mean("exact_flops")),
        ms=ms(group),
        ms_ratio=ratio(ms) if len(devices) == 1 else None,
        jump=_median(_ratio(r.jump["border"], r.jump["inside"]) for r in group if r.jump),
    )


def contingency(group: Iterable[Record], base: Iterable[Record]) -> tuple[int, int, int, int]:
    """Episodes that both played without error: solved by both, by the group alone, by the other alone, by neither."""
    theirs = {r.key: r.outcome == "success" for r in base if r.outcome != "error"}
    pairs = [(r.outcome == "success", theirs[r.key]) for r in group if r.outcome != "error" and r.key in theirs]
    both, first, second, neither = (pairs.count(pair) for pair in itertools.product((True, False), repeat=2))
    return both, first, second, neither


def compare(group: Iterable[Record], base: Iterable[Record]) -> tuple[Estimate | None, int]:
    """Success of a group minus that of another, and over how many pairs."""
    table = contingency(group, base)
    return paired_difference(*table) if any(table) else None, sum(table)


def _keep(group: Sequence[Record]) -> float | None:
    c = group[0].configuration
    if not c["plan"]:
        return None
    if c["plan"].get("cut") is None:
        return 1.0
    keep = {"keep": c["plan"]["cut"]["keep"], **_defaults(c["pruner"]), **c["choices"]}["keep"]
    alive = next((r.alive for r in group if r.alive), None)
    return keep if keep <= 1 else keep / alive if alive else None


def _mean(records: Iterable[Record], value: Callable[[Record], float | None]) -> float | None:
    """Mean over the episodes that have it (one that ended before its first call has none)."""
    values = [v for v in map(value, records) if v is not None]
    return fmean(values) if values else None


def _typical(records: Iterable[Record]) -> float | None:
    return _median(map(typical_ms, records))


def _median(values: Iterable[float | None]) -> float | None:
    defined = [v for v in values if v is not None]
    return median(defined) if defined else None


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


# --- tables ------------------------------------------------------------------------------------------------


def markdown(rows: Sequence[Row], baseline: str = "full") -> str:
    """One table per conditions, under a line that says which."""
    header = ["method", "keep", "suite", "episodes", "errors", "success [95 %]", f"Δ to {baseline}, points [95 %]"]
    header += ["pairs", "kept tokens", "keyframes", "paper GFLOPs", "exact GFLOPs", "ms", f"ms / {baseline}", "jump"]
    parts = []
    for conditions in _unique(row.conditions for row in rows):
        table = [header, ["---"] * 3 + ["---:"] * (len(header) - 3)]
        table += [_cells(row) for row in rows if row.conditions == conditions]
        parts.append(f"{_sentence(conditions)}\n\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in table))
    return "\n\n".join([*parts, NOTE, *_remarks(rows)]) + "\n"


NOTE = """\
Success: share of the episodes without error, Wilson interval. Δ: over the pairs (same suite, task and trial) without \
error on either side, Newcombe's paired interval. FLOPs: multiply-adds per policy call, in brackets the ratio over \
shared episodes. ms: a typical call, the episode's median per kind of call weighted by their numbers, median over \
episodes; the ratio only where all ran on one device. jump: L2 distance of the arm's actions where a new chunk begins, \
over that of a typical step inside chunks."""


def _remarks(rows: Sequence[Row]) -> list[str]:
    """What a reader would otherwise take for a result: a method that was told to prune and hardly did."""
    idle = [r for r in rows if (r.keep or 1) < 1 and (r.keyframes or 0) > 0.5]
    remark = (
        "{0.method}, keep {0.keep:g}, {0.suite}: {0.keyframes:.0%} of the calls were keyframes, which prune nothing"
    )
    remedy = "; `openpi analyze calibrate` finds a γ for this policy"
    return [f"{remark.format(row)}{remedy if row.method.split()[0] == 'safe' else ''}." for row in idle]


def _cells(row: Row) -> list[str]:
    text = lambda value, form: "–" if value is None else form.format(value)
    span = lambda e, form: "–" if e is None else f"{form} [{form}, {form}]".format(*(100 * v for v in _parts(e)))
    flops = lambda value, ratio: "–" if value is None else f"{value / 1e9:.4g}" + text(ratio, " ({:.3f})")
    return [
        row.method,
        text(None if row.keep is None else 100 * row.keep, "{:.4g} %"),
        row.suite,
        str(row.episodes),
        str(row.errors),
        span(row.success, "{:.1f}") + ("" if row.success is None else " %"),
        span(row.difference, "{:+.1f}"),
        str(row.pairs) if row.pairs else "–",
        text(row.kept, "{:.1f}"),
        text(None if row.keyframes is None else 100 * row.keyframes, "{:.1f} %"),
        flops(row.paper_flops, row.paper_ratio),
        flops(row.exact_flops, row.exact_ratio),
        text(row.ms, "{:.1f}"),
        text(row.ms_ratio, "{:.3f}"),
        text(row.jump, "{:.2f}"),
    ]


def _parts(e: Estimate) -> tuple[float, float, float]:
    return e.value, e.low, e.high


def _sentence(c: Mapping[str, Any]) -> str:
    steps = f", at most {c['max_steps']} steps" if c["max_steps"] else ""
    delay = f", used {c['delay']} steps after their observation" if c.get("delay") else ""
    noise = f"{c['noise']}, temperature {c['temperature']:g}" if c.get("temperature", 1) else "none"
    simulator = ", ".join(f"{k} {v}" for k, v in c["simulator"].items())
    return (
        f"Policy {c['policy']}, checkpoint {c['checkpoint']}, {c['precision']}, {c['num_steps']} denoise steps, "
        f"{c['replan']} actions per call{steps}{delay}; noise: {noise}; {simulator}."
    )


def _unique(items: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    unique: list[Mapping[str, Any]] = []
    for item in items:
        if item not in unique:
            unique.append(item)
    return unique


def table_csv(rows: Sequence[Row]) -> str:
    """The same numbers, unrounded and with a column for every condition that is not a mapping."""
    out = io.StringIO()
    writer = None
    for row in rows:
        flat = {k: v for k, v in row.conditions.items() if not isinstance(v, (Mapping, list))}
        for name, value in vars(row).items():
            if name in ("success", "difference"):
                numbers = _parts(value) if value else (None,) * 3
                flat |= dict(zip((name, f"{name}_low", f"{name}_high"), numbers, strict=True))
            elif name != "conditions":
                flat[name] = value
        if writer is None:
            writer = csv.DictWriter(out, list(flat), lineterminator="\n")
            writer.writeheader()
        writer.writerow(flat)
    return out.getvalue()
