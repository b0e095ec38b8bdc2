"""Grouped attention by loops."""

import numpy as np


def slow_attention(q, k, v, mask):
    """q [R, N, H], k, v [S, K, H], mask [R, S] → [R, N, H]."""
    R, N, H = q.shape
    out = np.zeros((R, N, H))
    for r in range(R):
        for n in range(N):
            kv = n // (N // k.shape[1])
            logits = np.array([q[r, n] @ k[s, kv] if mask[r, s] else -2.3819763e38 for s in range(len(k))])
            p = np.exp(logits - logits.max())
            out[r, n] = (p / p.sum()) @ v[:, kv]
    return out
