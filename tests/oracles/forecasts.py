"""Correspondence and forecast (Algorithm 2), κ (Eq. 6) and fusion (Eq. 4-5) of SAFE-Pruner by loops."""

import math

import numpy as np


def slow_unit(z):
    """Algorithm 2, line 5; a zero row stays zero."""
    z = np.asarray(z, np.float64)
    out = np.zeros_like(z)
    for v in range(len(z)):
        norm = math.sqrt(sum(x * x for x in z[v]))
        for i in range(z.shape[1]):
            out[v, i] = z[v, i] / norm if norm else 0.0
    return out


def slow_match(z, reference, alive, camera=None):
    """Algorithm 2, lines 6-9: for each v the best u, the first of equal ones; 0 without a candidate."""
    z, reference = np.asarray(z, np.float64), np.asarray(reference, np.float64)
    pi = []
    for v in range(len(z)):
        best, winner = -math.inf, 0
        for u in range(len(reference)):
            if alive[u] and (camera is None or camera[u] == camera[v]):
                c = sum(z[v, i] * reference[u, i] for i in range(z.shape[1]))
                if c > best:
                    best, winner = c, u
        pi.append(winner)
    return np.array(pi)


def slow_forecast(s, pi, alive):
    """Algorithm 2, lines 10-14, for one layer; dead tokens have no saliency."""
    out = np.zeros(len(pi))
    for v in range(len(pi)):
        if alive[v]:
            out[v] = s[pi[v]]
    return out


def slow_soft_match(z, reference, alive, temperature, camera=None):
    """For each v its partners u and their weights: exp(cos / T), shares of 1; none without a candidate."""
    z, reference = np.asarray(z, np.float64), np.asarray(reference, np.float64)
    partners = []
    for v in range(len(z)):
        found = {}
        for u in range(len(reference)):
            if alive[u] and (camera is None or camera[u] == camera[v]):
                found[u] = math.exp(sum(z[v, i] * reference[u, i] for i in range(z.shape[1])) / temperature)
        total = sum(found.values())
        partners.append({u: weight / total for u, weight in found.items()})
    return partners


def slow_soft_forecast(s, partners, alive):
    """The mean of the partners' saliency; dead tokens have none."""
    inherited = [sum(weight * float(s[u]) for u, weight in found.items()) for found in partners]
    return np.array([x if living else 0.0 for x, living in zip(inherited, alive, strict=True)])


def slow_kappa(a, b):
    """Eq. 6."""
    dot = sum(float(x) * float(y) for x, y in zip(a, b, strict=True))
    norms = math.sqrt(sum(float(x) ** 2 for x in a)) * math.sqrt(sum(float(y) ** 2 for y in b))
    return dot / norms if norms else math.nan


def slow_fuse(s, late, weight):
    """Eq. 4-5."""
    out = []
    for v in range(len(s)):
        mean = sum(float(l[v]) for l in late) / len(late)
        out.append((1 - weight) * float(s[v]) + weight * mean)
    return np.array(out)
