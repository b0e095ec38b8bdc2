"""What one episode bears: how far its actions move at every share kept, and how many tokens late layers look at.

    calls = list(next(episodes("policy_records/….episode")).calls())
    rows = measure(policy, calls, keeps=(0.5, 0.3, 0.2, 0.1), choices=calibrated())
    table(rows), figure(rows), verdict(rows)
    needed(trace)                                       tokens per call that hold 90 % of the late saliency

A shortcut of `openpi analyze actions` for one episode and one method. Nothing is executed, so it says what a keep
changes and not what that leads to.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from safe_pruner_jax.analysis import deviation
from safe_pruner_jax.analysis.episodes import Call
from safe_pruner_jax.analysis.rows import Row
from safe_pruner_jax.analysis.trace import Trace
from safe_pruner_jax.arrays import Layers
from safe_pruner_jax.figures.theme import colour, form, grid, legend, look, markdown
from safe_pruner_jax.policy.policy import Policy
from safe_pruner_jax.pruners import make

LIMIT = 0.1
"""Error of the actions, in standard deviations, up to which an episode is said to bear a keep."""


def measure(
    policy: Policy, calls: Sequence[Call], *, keeps: Sequence[float], choices: Mapping[str, Any], replan: int = 5
) -> list[Row]:
    """`safe` at every share kept, against the same policy with every token.

    Args:
      policy: any; its pruner is replaced.
      calls: of one episode.
      keeps: shares of the visual tokens, in (0, 1].
      choices: of `safe`, from `loading.calibrated`.
      replan: actions executed per call.

    Returns:
      A row of `deviation.measure` per share, with "method" and "keep".
    """
    reference, _ = deviation.actions_of(policy.with_pruner(make("full")), calls, replan)
    pruned = {keep: policy.with_pruner(make("safe", keep=keep, **choices)) for keep in keeps}
    method = {"method": "safe"}
    return [method | {"keep": keep} | deviation.measure(own, calls, reference) for keep, own in pruned.items()]


def needed(trace: Trace, share: float = 0.9, layers: Layers = (0, -2, -1)) -> np.ndarray:
    """[calls] int: the fewest visual tokens that hold this share of the late saliency (Eq. 4).

    Raises:
      ValueError: a share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"share: expected a number in (0, 1], got {share!r}")
    ranked = np.sort(trace.late()[:, list(layers)].mean(1), axis=-1)[:, ::-1]
    held = np.cumsum(ranked, axis=-1) / np.maximum(ranked.sum(-1, keepdims=True), 1e-12)
    return 1 + (held < share - 1e-6).sum(-1)


def table(rows: Sequence[Row]) -> str:
    """Error of pruned and of all calls, tokens and keyframes at every share kept."""
    lines = []
    for (_, keep), s in deviation.summary(rows).items():
        (row,) = [row for row in rows if row["keep"] == keep]
        keyframes = f"{len(row['keyframes'])} of {row['calls']}"
        lines.append([f"{keep:.0%}", f"{s['kept']:.0f}", keyframes, form(s["pruned"], "{:.3f}"), f"{s['rms']:.3f}"])
    return markdown(["kept", "tokens, all calls", "keyframes", "error of pruned calls, σ", "of all calls, σ"], lines)


def verdict(rows: Sequence[Row], limit: float = LIMIT) -> str:
    """In words, the smallest share kept whose pruned calls move the actions by at most `limit` standard deviations."""
    errors = {keep: s["pruned"] for (_, keep), s in deviation.summary(rows).items()}
    fine = [keep for keep, error in errors.items() if error is not None and error <= limit]
    if not fine:
        return f"No share kept moves the actions by less than {limit:g} standard deviations: keep more, or calibrate."
    return f"This episode bears {min(fine):.0%} kept: pruned calls move the actions by {errors[min(fine)]:.3f} σ."


def figure(rows: Sequence[Row], tokens: np.ndarray) -> Figure:
    """The error along the episode at every share kept, and the tokens that late layers look at.

    Args:
      rows: from `measure`.
      tokens: [calls] from `needed`.
    """
    drawn, (errors, count) = grid(2)
    for number, row in enumerate(rows):
        pruned = [t for t in range(row["calls"]) if t not in row["keyframes"]]
        label = f"{row['keep']:.0%} kept"
        errors.plot(pruned, [row["errors"][t] for t in pruned], label=label, **look(number))
    errors.axhline(LIMIT, color="#333333", linewidth=1, linestyle=":")
    errors.set(xlabel="call", ylabel="error of the actions, σ", ylim=(0, None))
    count.plot(tokens, color=colour(0))
    count.set(xlabel="call", ylabel="tokens with 90 % of late saliency", ylim=(0, None))
    legend(drawn, [errors])
    return drawn
