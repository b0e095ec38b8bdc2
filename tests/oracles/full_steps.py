"""Which steps run everything whatever a method decides, step by step in loops."""

import numpy as np

from oracles.forecasts import slow_unit


def slow_full_steps(seen, *, warm_start=0, grippers=(), standstill=None):
    """[steps] bool; a step whose alive tokens are others than before begins anew."""
    full, begun = [], 0
    for t in range(len(seen.alive)):
        if t and (seen.alive[t] != seen.alive[t - 1]).any():
            begun = t
        age = t - begun
        everything = age < max(warm_start, 1)
        if age >= 2:
            for g in grippers:
                now, before = (seen.actions[t - k, -1, g] for k in (1, 2))
                everything |= (now > 0) != (before > 0)
        if age >= 1 and standstill is not None:
            now, before = (slow_unit(seen.visual[t - k]) for k in (0, 1))
            cosines = [float(now[v] @ before[v]) for v in range(len(now)) if seen.alive[t, v]]
            everything |= np.mean(cosines) >= standstill
        full.append(bool(everything))
    return full
