"""Saliency (Eq. 1-2), budgets and top-K of SAFE-Pruner by loops."""

import math

import numpy as np


def slow_softmax(logits):
    top = max(logits)
    e = [math.exp(x - top) for x in logits]
    return [x / sum(e) for x in e]


def slow_saliency(logits, rows, alive, over):
    """Eq. 1-2 by loops: logits [heads, R, P]; dead keys do not exist."""
    logits = np.asarray(logits, np.float64)
    n, (heads, queries, keys) = len(alive), logits.shape
    exists = [v for v in range(keys) if (alive[v] if v < n else over == "all")]
    s = np.zeros(n)
    count = sum(rows)
    if not exists or not count:
        return s
    for h in range(heads):
        for r in range(queries):
            if rows[r]:
                a = slow_softmax([logits[h, r, v] for v in exists])
                for v, p in zip(exists, a, strict=True):
                    if v < n:
                        s[v] += p / (heads * count)
    return s


def slow_budget(keep, n):
    """Share: the nearest whole number, halves to the even one. Count: itself, at most n."""
    if keep > 1:
        return min(int(keep), n)
    whole, rest = divmod(keep * n, 1)
    return int(whole) + (rest > 0.5 or (rest == 0.5 and whole % 2 == 1))


def slow_top_k(score, alive, keep, camera=None, per_camera=0):
    """Eq. 5's top-K by repeated search: alive tokens only, NaN worst, the lower index of equal ones."""

    def best(candidates, count):
        order = []
        while candidates and len(order) < count:
            winner = None
            for v in candidates:  # ascending: a later one must be strictly better
                if winner is None or value(v) > value(winner):
                    winner = v
            candidates = [v for v in candidates if v != winner]
            order.append(winner)
        return order

    value = lambda v: -math.inf if math.isnan(score[v]) else score[v]
    living = [v for v in range(len(score)) if alive[v]]
    reserved = []
    for c in sorted({int(c) for c in camera}) if per_camera else []:
        reserved += best([v for v in living if camera[v] == c], per_camera)
    order = best(sorted(reserved), len(reserved))
    order += best([v for v in living if v not in reserved], len(living))
    return sorted(order[: slow_budget(keep, len(living))])
