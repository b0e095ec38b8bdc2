"""Does the forecast work, and if it does not, which half of it? Scores that differ in their late saliency alone.

    shallow        none: the shallow saliency by itself
    same slot      that of the last keyframe, slot by slot: memory without matching
    prior          the mean of other episodes, slot by slot: neither memory nor matching
    matched Z      that of the last keyframe by correspondence: what `safe` does
    matched hidden the same with features="hidden"
    oracle         that of this very call: what no forecast can know

    oracle no better than shallow          the target is wrong: knowing late saliency does not help
    matched no better than the prior       matching is broken: what it carries over, any episode would have told
    else                                   the forecast works

Judged by the actions: every call is pruned by every score, and compared with its full pass. Everything is crossed over
the layer of the cut, the keys that saliency is normalised over, and whose late saliency it is (`TARGETS`).
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import NamedTuple

import jax
import numpy as np
from matplotlib.figure import Figure

from safe_pruner_jax.analysis.measures import Matches, cosine, loss_rate, references, top
from safe_pruner_jax.analysis.rows import Row, rounded
from safe_pruner_jax.analysis.trace import Trace
from safe_pruner_jax.engine.engine import Engine
from safe_pruner_jax.evaluation.rollout import ARM
from safe_pruner_jax.figures.theme import MARKERS, colour, form, legend, markdown, panels
from safe_pruner_jax.policy.policy import Policy
from safe_pruner_jax.pruners import Capture, make
from safe_pruner_jax.pruners.forecast import fuse as fused

CONTROLS = ("shallow", "same slot", "prior", "matched Z", "matched hidden", "oracle")
TARGETS = ("paper", "expert", "prefix")
"""Whose late saliency: L_d of the paper, {0, L-2, L-1} of the expert; all expert layers behind the cut, or all prefix
layers behind it with the prompt's rows ("the final two backbone layers" read literally)."""

Act = Callable[[Trace, int, int, np.ndarray], np.ndarray]
"""(trace, call, cut, kept slots [B, K]) → normalised actions [B, A, action_dim] that each choice of tokens leads to."""


class Cell(NamedTuple):
    """One crossing: layer of the cut, keys of the normalisation, and target."""

    cut: int
    over: str
    target: str


def cells(cuts: Sequence[int]) -> Iterator[Cell]:
    """All of them."""
    return (Cell(cut, over, target) for cut in cuts for over in ("visual", "all") for target in TARGETS)


def late_map(trace: Trace, cell: Cell, steps: str = "half") -> np.ndarray:
    """[C, n] the late saliency of every call, mean over the layers of the target (Eq. 4)."""
    if cell.target == "prefix":
        behind = range(cell.cut, trace.depth - 1)
        return np.mean([trace.captured(Capture(l, "text", cell.over)) for l in behind], axis=0)
    late = trace.late(steps, cell.over)
    return late[:, [0, -2, -1] if cell.target == "paper" else slice(cell.cut, None)].mean(1)


def maps(trace: Trace, cuts: Sequence[int], steps: str = "half") -> list[Row]:
    """What an episode contributes to the prior of the others: its mean late saliency, one row per cell."""
    mean = lambda cell: rounded(late_map(trace, cell, steps).mean(0), 8)
    return [cell._asdict() | {"calls": len(trace), "map": mean(cell)} for cell in cells(cuts)]


def priors(rows: Sequence[Row], without: str | None = None) -> dict[Cell, np.ndarray]:
    """Mean of the `maps` of all episodes but one, weighed by calls.

    Raises:
      ValueError: there is no other episode.
    """
    groups: dict[Cell, list[Row]] = defaultdict(list)
    for row in rows:
        if row["part"] != without:
            groups[Cell(row["cut"], row["over"], row["target"])].append(row)
    if not groups:
        raise ValueError("data: expected at least two episodes, since the prior is that of the others; give more")
    column = lambda group, key: [row[key] for row in group]
    mean = lambda group: np.average(column(group, "map"), axis=0, weights=column(group, "calls"))
    return {cell: mean(group) for cell, group in groups.items()}


class Acting:
    """The policy, pruned to tokens that somebody else has chosen.

    Args:
      policy: its model acts; its pruner plays no part.
      keep: share of the tokens kept.
    """

    def __init__(self, policy: Policy, keep: float):
        engine = policy.engine
        self._engine = cache(lambda cut: Engine(engine.weights, engine.config, make("random", keep=keep, cut=cut)))

    def __call__(self, trace: Trace, t: int, cut: int, kept: np.ndarray) -> np.ndarray:
        """See `Act`."""
        engine = self._engine(cut)
        control = engine.init((0,), len(trace.layout.cameras))
        carry = engine.shallow(engine.weights, control, *jax.device_put((trace.inputs[t], trace.noise[t][None])))
        carry = jax.tree.map(lambda a: a[np.zeros(len(kept), np.int32)], carry)
        chosen = jax.device_put((kept.astype(np.int32), trace.alive[t][kept]))
        selection = carry.selection.replace(index=chosen[0], alive=chosen[1])
        actions, _ = engine.second[True](engine.weights, carry.replace(selection=selection))
        return np.asarray(actions)


def measure(
    trace: Trace,
    prior: Mapping[Cell, np.ndarray],
    act: Act,
    *,
    cuts: Sequence[int] = (1, 2, 3),
    keep: float = 0.2,
    fuse: float = 0.5,
    queries: str = "text",
    late_steps: str = "half",
    every: int = 10,
    executed: int = 5,
) -> list[Row]:
    """All controls on one episode.

    Args:
      trace: of the episode.
      prior: late saliency of other episodes, from `priors`.
      act: what a choice of tokens leads to, `Acting` of the trace's policy.
      cuts: layers before which tokens are dropped.
      keep: share kept.
      fuse: λ of all scores but "shallow".
      queries: rows of the shallow saliency.
      late_steps: as in `safe`.
      every: calls between keyframes within a subtask, see `measures.references`; the same for all controls.
      executed: actions of a chunk that are compared.

    Returns:
      One row per cell and control, with a value per pruned call in each of "cosine" (of the late saliency that the
      score uses to the true one), "loss" (share of the core tokens of the expert's layers behind the cut that is
      dropped) and "errors" (root mean square of the arm's executed commands against the full pass, normalised units).
    """
    reference = references(trace.subtask, every)
    values_of: dict[tuple[Cell, str], list[tuple[float, float, float]]] = defaultdict(list)
    for cut in cuts:
        match = {"Z": Matches(trace), "hidden": Matches(trace, trace.hidden[:, cut - 1])}
        late_of = {c: late_map(trace, c, late_steps) for c in cells([cut])}
        cores = trace.late(late_steps)[:, cut:]
        for t in np.flatnonzero(reference != np.arange(len(trace))):
            labels: list[tuple[Cell, str, float]] = []
            scores: list[np.ndarray] = []
            for cell, late in late_of.items():
                shallow = trace.captured(Capture(cut - 1, queries, cell.over))[t]
                for control, s in _late(late, t, reference[t], prior[cell], match).items():
                    labels.append((cell, control, cosine(late[t], s)))
                    scores.append(shallow if control == "shallow" else fused(shallow, s[None], fuse))
                labels.append((cell, "shallow", cosine(late[t], shallow)))
                scores.append(shallow)
            chosen = top(np.stack(scores), trace.alive[t], keep)
            core = top(cores[t], trace.alive[t], 0.1)
            actions = act(trace, int(t), cut, np.stack([np.flatnonzero(c) for c in chosen]))
            error = (actions - trace.actions[t])[:, :executed, :ARM]
            for (cell, control, alike), kept, e in zip(labels, chosen, error, strict=True):
                values_of[cell, control].append((alike, loss_rate(core, kept).mean(), np.sqrt(np.square(e).mean())))
    names = ("cosine", "loss", "errors")
    column = lambda values: {name: rounded(v) for name, v in zip(names, zip(*values, strict=True), strict=True)}
    return [cell._asdict() | {"control": control} | column(values) for (cell, control), values in values_of.items()]


def _late(late: np.ndarray, t: int, r: int, prior: np.ndarray, match: Mapping[str, Matches]) -> dict[str, np.ndarray]:
    """{control: [n] late saliency that its score uses} at call t with keyframe r."""
    matched = {f"matched {name}": m.forecast(late[r], t, r) for name, m in match.items()}
    return {"same slot": late[r], "prior": np.asarray(prior), **matched, "oracle": late[t]}


class Gain(NamedTuple):
    """By how much an error is smaller than another: mean over the calls and 95 % interval."""

    mean: float
    low: float
    high: float


def gain(of: np.ndarray, over: np.ndarray, parts: Sequence[str]) -> Gain:
    """Paired bootstrap of `over` - `of` [calls] over episodes, or over calls where there are fewer than five."""
    names, rng = sorted(set(parts)), np.random.default_rng(0)
    difference = np.asarray(over, np.float64) - np.asarray(of, np.float64)
    groups = [[d] for d in difference]
    if len(names) >= 5:
        groups = [difference[np.asarray(parts) == name] for name in names]
    total, count = np.array([np.sum(g) for g in groups]), np.array([len(g) for g in groups])
    draw = rng.integers(0, len(groups), (2000, len(groups)))
    means = total[draw].sum(1) / count[draw].sum(1)
    return Gain(float(difference.mean()), *(float(q) for q in np.quantile(means, (0.025, 0.975))))


class Verdict(NamedTuple):
    """One of "target wrong", "matching broken" and "forecast works", and why."""

    word: str
    why: str


def verdict(errors: Mapping[str, np.ndarray], parts: Sequence[str], matched: str = "matched Z") -> Verdict:
    """What the errors of the controls [calls] say of a forecast; a difference counts beyond its 95 % interval."""
    mean = {name: float(np.mean(e)) for name, e in errors.items()}
    ahead = lambda name, of: gain(errors[name], errors[of], parts).low > 0
    if not ahead("oracle", "shallow"):
        why = f"error {mean['oracle']:.3f} with the late saliency of the call itself, {mean['shallow']:.3f} without any"
        return Verdict("target wrong", why)
    if not (ahead(matched, "prior") and ahead(matched, "shallow")):
        why = f"error {mean[matched]:.3f} matched, {mean['prior']:.3f} with the mean of other episodes, "
        why += f"{mean['shallow']:.3f} shallow; {mean['oracle']:.3f} would be possible"
        return Verdict("matching broken", why)
    share = (mean["shallow"] - mean[matched]) / (mean["shallow"] - mean["oracle"])
    why = f"{share:.0%} of what the oracle gains: error {mean['shallow']:.3f} shallow, {mean['prior']:.3f} prior, "
    return Verdict("forecast works", f"{why}{mean[matched]:.3f} matched, {mean['oracle']:.3f} oracle")


Errors = dict[Cell, dict[str, np.ndarray]]


def collected(rows: Sequence[Row], key: str = "errors") -> tuple[Errors, list[str]]:
    """{cell: {control: values of all calls}}, and the episode of every call."""
    cells_of: dict[Cell, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    parts: list[str] = []
    first = next(Cell(r["cut"], r["over"], r["target"]) for r in rows)
    for row in rows:
        cell = Cell(row["cut"], row["over"], row["target"])
        cells_of[cell][row["control"]] += row[key]
        if (cell, row["control"]) == (first, "oracle"):
            parts += [row["part"]] * len(row[key])
    asarray = lambda controls: {name: np.array(v, np.float64) for name, v in controls.items()}
    return {cell: asarray(controls) for cell, controls in cells_of.items()}, parts


def table(rows: Sequence[Row]) -> str:
    """Mean error of every control in every cell, and the verdict on either kind of features."""
    errors, parts = collected(rows)
    lines = []
    for cell, controls in errors.items():
        words = [verdict(controls, parts, f"matched {features}").word for features in ("Z", "hidden")]
        numbers = [form(float(controls[name].mean()), "{:.4f}") for name in CONTROLS]
        lines.append([f"cut {cell.cut}, over {cell.over}, {cell.target}", *numbers, *words])
    head = ["error of the actions", *CONTROLS, "verdict, Z", "verdict, hidden"]
    return markdown(head, lines) + f"\n{sentence(rows)}\n"


def sentence(rows: Sequence[Row]) -> str:
    """The verdict on `safe` as the paper describes it, at the deepest cut there is."""
    errors, parts = collected(rows)
    cell = Cell(max(cell.cut for cell in errors), "visual", "paper")
    word, why = verdict(errors[cell], parts)
    counted = f"{len(set(parts))} episodes, {len(parts)} pruned calls"
    return f"**{word}** for `safe` as described (cut {cell.cut}): {why}. {counted}."


def figure(rows: Sequence[Row]) -> Figure:
    """Cosine, core tokens lost and error of every control: a column per cut, a line per normalisation and target."""
    titles = {
        "cosine": "cosine to the true one",
        "loss": "core tokens lost",
        "errors": "error of the actions",
    }
    cuts = sorted({row["cut"] for row in rows})
    drawn, axes = panels(len(cuts), rows=3, width=4.6, height=2.8, sharey="row")
    for line, (key, title) in zip(axes, titles.items(), strict=True):
        by_cell, _ = collected(rows, key)
        line[0].set_ylabel(title)
        for ax, cut in zip(line, cuts, strict=True):
            for number, (cell, controls) in enumerate((c, o) for c, o in by_cell.items() if c.cut == cut):
                look = {"color": colour(number % 3), "marker": MARKERS[number % 3], "ms": 3}
                look |= {"ls": "-" if cell.over == "visual" else "--"}
                means = [np.nanmean(controls[name]) for name in CONTROLS]
                ax.plot(CONTROLS, means, label=f"{cell.over}, {cell.target}", **look)
            ax.tick_params(axis="x", labelrotation=30, labelsize=7)
            ax.set_title(f"cut before layer {cut}" if line is axes[0] else "", fontsize=9)
    legend(drawn, axes.flat, columns=3, title="saliency over, late saliency of", title_fontsize=9)
    return drawn
