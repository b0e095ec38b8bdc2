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


def slow_raters(visual, text, alive, text_alive):
    living = np.flatnonzero(text_alive)
    relevance = np.zeros(len(living))
    for v in np.flatnonzero(alive):
        logits = np.array([np.dot(visual[v].astype(np.float64), text[j].astype(np.float64)) for j in living])
        e = np.exp(logits - logits.max())
        relevance += e / e.sum()
    return {int(j) for j, r in zip(living, relevance, strict=True) if r > relevance.mean()}


def slow_cluster(x, count):
    """Density peaks: {centre: mean of its cluster}; of equal densities the first row's counts as higher."""
    m, d = x.shape
    distance = np.array([[np.linalg.norm(a - b) / np.sqrt(d) for b in x] for a in x])
    density = [np.exp(-np.mean(sorted(row)[:count] * np.array(sorted(row)[:count]))) for row in distance]
    denser = lambda j, i: (density[j], -j) > (density[i], -i)
    to_denser = [min([distance[i, j] for j in range(m) if denser(j, i)], default=distance.max()) for i in range(m)]
    centres = sorted(range(m), key=lambda i: -to_denser[i] * density[i])[:count]
    home = [i if i in centres else min(centres, key=lambda c: distance[i, c]) for i in range(m)]
    return {c: x[[i for i in range(m) if home[i] == c]].mean(0) for c in centres}


def slow_rank(score, candidates, camera, count):
    """The `count` best candidates of every camera."""
    out = set()
    for c in set(camera.tolist()):
        mine = [v for v in candidates if camera[v] == c]
        out |= set(sorted(mine, key=lambda v: (-score[v], v))[: int(count(c))])
    return out


def slow_cosine(a, b):
    a, b = a.astype(np.float64), b.astype(np.float64)
    return np.array([x @ y / np.sqrt((x @ x) * (y @ y)) for x, y in zip(a, b, strict=True)])


def slow_controller(action, fine):
    v_t, v_r = np.linalg.norm(action[:3]), np.linalg.norm(action[3:6])
    if v_t < 0.5 and v_r < 0.2 and action[2] <= 0:
        return v_t, True
    return v_t, fine and v_t < 0.5 and v_r < 0.2


def slow_shares(entropy, growth=0.55):
    share = [1 - (h - min(entropy)) / (max(entropy) - min(entropy)) for h in entropy]
    for i in range(1, len(share)):
        if share[i] > share[i - 1]:
            share[i] = share[i - 1] + growth * (share[i] - share[i - 1])
    return share
