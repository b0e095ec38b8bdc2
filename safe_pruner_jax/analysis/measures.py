"""The numbers behind the analyses: core tokens and their loss, forecasts from any keyframe, cosine and divergence.

NumPy on saliencies of one robot; ties go to the lower index everywhere, as in `tokens.top_k`.
"""

import jax
import numpy as np

from safe_pruner_jax.analysis.trace import Trace
from safe_pruner_jax.pruners import checks, forecast
from safe_pruner_jax.tokens import budget

_partners = jax.jit(forecast.partners, static_argnames="temperature")
_unit = jax.jit(forecast.unit)


class Matches:
    """π(v) from any call of a trace to any earlier one (Algorithm 2), each computed once.

    Args:
      trace: one episode.
      tokens: [C, n, d] what is matched; None: visual tokens Z.
      soft: temperature of the correspondence, as in `safe`; 0: the most similar token.

    Raises:
      ValueError: a negative temperature.
    """

    def __init__(self, trace: Trace, tokens: np.ndarray | None = None, soft: float = 0.0):
        checks.at_least(0, "soft", "a temperature of at least 0", soft)
        rows = zip(trace.visual if tokens is None else tokens, trace.alive, strict=True)
        self._unit = [_unit(np.where(a[:, None], z, 0)) for z, a in rows]
        self._alive, self._soft, self._cache = trace.alive, soft, {}

    def __call__(self, t: int, reference: int) -> np.ndarray:
        """[n] int32: for each token of call t the most similar alive one of call `reference`; soft: [n, n] weights."""
        if (t, reference) not in self._cache:
            pair = self._unit[t], self._unit[reference], self._alive[reference]
            self._cache[t, reference] = np.asarray(_partners(*pair, temperature=self._soft)[0])
        return self._cache[t, reference]

    def forecast(self, s: np.ndarray, t: int, reference: int) -> np.ndarray:
        """Ŝ of call t: s [..., n] of call `reference`, transferred; dead tokens 0."""
        match = self(t, reference)
        carried = s @ match.T if self._soft else s[..., match]
        return np.where(self._alive[t], carried, 0.0)


def top(s: np.ndarray, alive: np.ndarray, share: float) -> np.ndarray:
    """[..., n] bool: the share (or number) of alive tokens with the highest s [..., n]; at least one."""
    n = int(alive.sum())
    score = np.where(alive, s, -np.inf)
    order = np.argsort(-score, axis=-1, kind="stable")[..., : max(1, budget(share, n))]
    chosen = np.zeros(s.shape, bool)
    np.put_along_axis(chosen, order, True, axis=-1)
    return chosen & alive


def loss_rate(core: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Share of the core tokens [..., n] bool that are not kept [n] bool (SAFE-Pruner, Fig. 2b): [...]."""
    return (core & ~kept).sum(-1) / core.sum(-1)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine similarity of two vectors; NaN if one is zero."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    norm = np.sqrt((a * a).sum()) * np.sqrt((b * b).sum())
    return float((a * b).sum() / norm) if norm > 0 else float("nan")


def divergence(truth: np.ndarray, forecast: np.ndarray) -> float:
    """KL(truth ‖ forecast) in nats, both rescaled to sum 1 first: a transfer does not conserve the sum.

    Entries below 1e-12 of the forecast count as 1e-12, so that one token without mass does not make it infinite.
    """
    p, q = (np.asarray(x, np.float64) / max(float(np.sum(x)), 1e-300) for x in (truth, forecast))
    some = p > 0
    return float((p[some] * np.log(p[some] / np.maximum(q[some], 1e-12))).sum())


def references(subtask: np.ndarray, every: int) -> np.ndarray:
    """The keyframe each call looks back to, when every subtask starts with one and none is older than `every` calls.

    Args:
      subtask: [C] numbers of the subtasks.
      every: calls between keyframes within a subtask, at least 1.

    Returns:
      [C] int: the reference; a keyframe is its own.

    >>> references(np.array([0, 0, 0, 0, 1, 1]), 3)
    array([0, 0, 0, 3, 4, 4])
    """
    if every < 1:
        raise ValueError(f"every: expected at least 1 call between keyframes, got {every}")
    keyframes, last = [], 0
    for t, number in enumerate(subtask):
        if t == 0 or number != subtask[t - 1] or t - last >= every:
            last = t
        keyframes.append(last)
    return np.array(keyframes)


def separation(within: np.ndarray, across: np.ndarray) -> float | None:
    """Probability that κ across a boundary lies below κ within a subtask, ties half: the area under the ROC curve.

    Args:
      within, across: values of κ.

    Returns:
      1 where a threshold can tell them apart without error, 0.5 where κ knows nothing; None if one is empty.
    """
    if not len(within) or not len(across):
        return None
    ordered = np.sort(within)
    above = len(ordered) - np.searchsorted(ordered, across, side="right")
    equal = np.searchsorted(ordered, across, side="right") - np.searchsorted(ordered, across, side="left")
    return float((above + 0.5 * equal).mean() / len(ordered))
