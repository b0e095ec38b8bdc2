"""SAFE-Pruner's Algorithm 1, played for one robot by loops in float64."""

import numpy as np

from oracles.forecasts import (
    slow_forecast,
    slow_fuse,
    slow_kappa,
    slow_match,
    slow_soft_forecast,
    slow_soft_match,
    slow_unit,
)
from oracles.full_steps import slow_full_steps
from oracles.peers import slow_max_min
from oracles.selection import slow_budget, slow_top_k


def algorithm_1(
    seen,
    *,
    keep=0.2,
    cut=3,
    fuse=None,
    threshold=0.92,
    match="all",
    soft=0.0,
    every=None,
    max_age=None,
    per_camera=0,
    pool=1.0,
    warm_start=1,
    grippers=(),
    late="expert",
    late_layers=None,
    features="Z",
    variant="as_described",
    **_,
):
    """Algorithm 1 for one robot by loops in float64, keyframes known by their step: what happens at each step t.

    The set of alive tokens belongs to the history: when it changes, there is no keyframe to refer to. `seen.late`
    holds the late saliency of every step, and `seen.past` that of the prefix; only that of keyframes is looked at.
    """
    released = variant == "as_released"
    weight = (1.0 if released else 0.5) if fuse is None else fuse
    keyframes, log = [], []
    everything = slow_full_steps(seen, warm_start=warm_start, grippers=grippers)
    for t in range(len(seen.alive)):
        alive, camera = seen.alive[t], seen.camera[t]
        shallow, tested = (
            np.asarray(seen.saliency[i][t], np.float64) if cut else np.zeros(len(alive)) for i in (0, -1)
        )
        if t and (seen.alive[t] != seen.alive[t - 1]).any():
            keyframes = []
        if not keyframes:
            keyframes.append(t)
            log.append({"keyframe": True, "kappa": np.nan, "age": None})
            continue
        tau = max(keyframes)  # Eq. 3
        # Algorithm 2
        tokens = seen.visual if features == "Z" else seen.hidden
        z, reference = slow_unit(tokens[t]), slow_unit(tokens[tau])
        among = camera if match == "camera" else None
        if soft:
            partners = slow_soft_match(z, reference, alive, soft, among)
            carry = lambda s, partners=partners, alive=alive: slow_soft_forecast(s, partners, alive)
        else:
            pi = slow_match(z, reference, alive, among)
            carry = lambda s, pi=pi, alive=alive: slow_forecast(s, pi, alive)
        deep = seen.late[tau] if late == "expert" else [s[tau] for s in seen.past]
        if released and 0 in (late_layers or (0, -1)):  # layer 0 of L_d is the last prompt row's
            deep = [seen.saliency[-1][tau], *deep]
        forecasts = [carry(s) for s in deep]
        if cut:
            kappa = slow_kappa(tested, carry(seen.saliency[-1][tau]))
        else:  # ours: what mattered then, does it have its like now?
            living = np.flatnonzero(alive)
            matters = {u: np.mean([s[u] for s in deep]) for u in living}
            like = {u: max(float(reference[u] @ z[v]) for v in living) for u in living}
            kappa = sum(matters[u] * like[u] for u in living) / sum(matters.values())
        # Eq. 7 and its substitutes
        age = t - tau
        keyframe = kappa < threshold if every is None else age >= every
        if max_age is not None and age >= max_age:
            keyframe = True
        keyframe |= everything[t]
        if released:
            score = np.array([shallow[v] + weight * np.mean([s[v] for s in forecasts]) for v in range(len(alive))])
        else:
            score = slow_fuse(shallow, forecasts, weight)
        margin = abs(kappa - threshold) if every is None else 1.0
        if pool > 1:
            wide = min(keep * pool, 1.0) if keep <= 1 else min(round(keep * pool), len(alive))
            candidates = sorted(slow_top_k(score, alive, wide))
            count = slow_budget(keep, int(alive.sum()))
            selected = slow_max_min(seen.visual[t], candidates, count, 2)
        else:
            selected = slow_top_k(score, alive, keep, camera, per_camera)
        log.append(
            {"keyframe": keyframe, "kappa": kappa, "score": score, "kept": set(selected), "margin": margin, "age": age}
        )
        if keyframe:
            keyframes.append(t)
    return log
