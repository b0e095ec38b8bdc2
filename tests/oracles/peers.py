"""Parts of the published methods, written slowly: loops in float64."""

import numpy as np


def slow_max_min(z, candidates, k, neighbour):
    """Algorithm 1 of VLA-Pruner: the picks, in order."""
    z = {v: np.asarray(z[v], np.float64) / np.linalg.norm(np.asarray(z[v], np.float64)) for v in candidates}
    distance = lambda a, b: 1 - float(z[a] @ z[b])
    first = {v: sorted(distance(v, u) for u in candidates if u != v)[neighbour - 1] for v in candidates}
    picks = [max(candidates, key=lambda v: (first[v], -v))]
    while len(picks) < min(k, len(candidates)):
        rest = [v for v in candidates if v not in picks]
        picks.append(max(rest, key=lambda v: (min(distance(v, u) for u in picks), -v)))
    return picks


def slow_updated(importance, heads, entropy, running, beta=0.2, slope=0.05):
    """SpecPrune-VLA, Eq. 5-9, with the ranks of every head."""
    weights = []
    for attention in heads:
        order = sorted(np.flatnonzero(running), key=lambda v: (-attention[v], v))
        sigma = {v: 1 / (1 + np.exp(slope * r)) for r, v in enumerate(order)}
        weights.append([sigma.get(v, 0) / sum(sigma.values()) for v in range(len(running))])
    return (1 - beta) * importance + beta * np.mean(weights, axis=0) / (entropy + 1e-6)
