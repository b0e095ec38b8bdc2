"""How far pruning moves the actions, on recorded observations.

    rows = measure(policy, pruner, calls, reference)     one episode of one method
    table(rows), figure(rows)

Every method is asked the same requests with the same noise, in a session of its own, so keyframes, forecasts and their
age are those of a robot. The error of a call is the root mean square over the executed steps and the motion commands of
(a - a_full) / σ, with σ the standard deviation of each command in the checkpoint's norm statistics; the gripper, a
switch, is counted by how often it is told otherwise. What the errors lead to is not in it: nothing is executed.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib.figure import Figure

from safe_pruner_jax.analysis import cost
from safe_pruner_jax.analysis.episodes import Call
from safe_pruner_jax.analysis.rows import Row, rounded
from safe_pruner_jax.evaluation.rollout import ARM
from safe_pruner_jax.figures.theme import form, grid, legend, look, markdown
from safe_pruner_jax.policy.policy import Policy


def actions_of(policy: Policy, calls: Iterable[Call], replan: int) -> tuple[np.ndarray, list[dict]]:
    """What one session answers: the executed actions [calls, replan, 7], and its `pruning` dictionaries.

    Raises:
      ValueError: no calls.
    """
    session = policy.session()
    replies = [session.infer(call.request) for call in calls]
    if not replies:
        raise ValueError("episode: expected at least one call, got none")
    return np.stack([reply["actions"][:replan] for reply in replies]), [reply["pruning"] for reply in replies]


def errors(policy: Policy, actions: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Error of each call [calls], in standard deviations of the commands.

    Args:
      policy: whose statistics these are.
      actions, reference: [calls, steps, 7], executed and of the same policy with every token.
    """
    sigma = policy.transform.stats["actions"].std[:ARM]
    error = (actions - reference)[..., :ARM] / np.maximum(sigma, 1e-6)
    return np.sqrt(np.square(error).mean((1, 2)))


def measure(policy: Policy, calls: Iterable[Call], reference: np.ndarray) -> Row:
    """One method on one episode.

    Args:
      policy: with the method.
      calls: of the episode.
      reference: [calls, replan, 7] actions of the same policy with every token (`actions_of`).

    Returns:
      "calls"; "errors" per call, in standard deviations; "keyframes", the calls that ran every token; "kept", tokens
      after the last cut, and "flops", multiply-adds as a share of the full step's, means over the calls; "switched",
      steps at which the gripper is told otherwise; "steps".
    """
    calls = list(calls)
    actions, decisions = actions_of(policy, calls, reference.shape[1])
    whole, pruned = cost.shares(policy, calls[0].request)
    return {
        "calls": len(decisions),
        "errors": rounded(errors(policy, actions, reference)),
        "keyframes": [t for t, pruning in enumerate(decisions) if pruning["keyframe"]],
        "kept": float(np.mean([pruning["kept"] for pruning in decisions])),
        "flops": float(np.mean([whole if pruning["keyframe"] else pruned for pruning in decisions])),
        "switched": int((np.sign(actions[..., ARM]) != np.sign(reference[..., ARM])).sum()),
        "steps": int(reference.shape[0] * reference.shape[1]),
    }


def summary(rows: Sequence[Row]) -> dict[tuple[str, float], dict[str, float | None]]:
    """(method, keep) → its numbers over all episodes (`table`); "pruned" and "p90" are None without a pruned call,
    "flops" in rows that were measured before it was."""
    groups: dict[tuple[str, float], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["method"], row["keep"]].append(row)
    summaries = {}
    for key, group in groups.items():
        errors = np.concatenate([row["errors"] for row in group])
        keyframe = np.concatenate([np.isin(np.arange(row["calls"]), row["keyframes"]) for row in group])
        total = lambda name, group=group: sum(row[name] for row in group)
        mean = lambda name, group=group: (
            sum(row[name] * row["calls"] for row in group) / sum(row["calls"] for row in group)
        )
        rms = lambda e: float(np.sqrt(np.square(e).mean())) if e.size else None
        summaries[key] = {
            "calls": len(errors),
            "kept": mean("kept"),
            "flops": mean("flops") if all("flops" in row for row in group) else None,
            "keyframes": float(keyframe.mean()),
            "rms": rms(errors),
            "pruned": rms(errors[~keyframe]),
            "p90": float(np.quantile(errors[~keyframe], 0.9)) if (~keyframe).any() else None,
            "switched": total("switched") / total("steps"),
        }
    return summaries


def by_call(rows: Sequence[Row]) -> dict[tuple[str, float], dict[int, float]]:
    """(method, keep) → number of the call in its episode, from 0 → root mean square error of the pruned ones."""
    groups: dict[tuple[str, float], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        for call, error in enumerate(row["errors"]):
            if call not in row["keyframes"]:
                groups[row["method"], row["keep"]][call].append(error)
    rms = lambda errors: float(np.sqrt(np.square(errors).mean()))
    return {key: {call: rms(errors) for call, errors in sorted(calls.items())} for key, calls in groups.items()}


def table(rows: Sequence[Row]) -> str:
    """Every method at every share kept; errors in standard deviations of the commands."""
    columns = [
        "method",
        "keep",
        "kept tokens",
        "keyframes",
        "multiply-adds",
        "error, all calls",
        "pruned calls",
        "90 %",
        "gripper",
    ]
    lines = [
        [
            method,
            f"{keep:.0%}",
            f"{s['kept']:.1f}",
            f"{s['keyframes']:.1%}",
            form(s["flops"], "{:.3f}×"),
            f"{s['rms']:.3f}",
            form(s["pruned"], "{:.3f}"),
            form(s["p90"], "{:.3f}"),
            f"{s['switched']:.2%}",
        ]
        for (method, keep), s in sorted(summary(rows).items(), key=lambda item: (-item[0][1], item[1]["rms"]))
    ]
    return markdown(columns, lines)


def figure(rows: Sequence[Row]) -> Figure:
    """Error over all calls against the tokens that all calls keep on average, one line per method; and the error of
    pruned calls along the episode, at the smallest share kept."""
    drawn, (kept, along) = grid(2, height=4.0)
    lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for (method, _), s in summary(rows).items():
        lines[method].append((s["kept"], s["rms"]))
    least, calls = min(row["keep"] for row in rows), by_call(rows)
    for number, (method, points) in enumerate(lines.items()):
        style = look(number)
        kept.plot(*zip(*sorted(points), strict=True), label=method, **style)
        if pruned := calls.get((method, least)):
            along.plot(list(pruned), list(pruned.values()), **style)
    kept.set(xlabel="visual tokens kept, mean over all calls", ylabel="error of the actions, σ", ylim=(0, None))
    legend(drawn, [kept], columns=2)
    along.set(xlabel="call of the episode", ylabel=f"the same, pruned calls at {least:.0%} kept", ylim=(0, None))
    return drawn
