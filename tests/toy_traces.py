"""Traces that no policy made, whose answers are known."""

import jax
import numpy as np

from safe_pruner_jax.analysis.trace import Trace
from safe_pruner_jax.libero.demonstrations import subtasks
from safe_pruner_jax.tokens import PrefixLayout


def synthetic(calls: int = 12, *, n: int = 16, depth: int = 5, seed: int = 0, still: bool = False, shift: int = 0):
    """A trace of random saliencies; `still` repeats the first call, `shift` moves tokens along with their saliency."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int, probability: bool = True) -> np.ndarray:
        a = rng.random((1 if still else calls, *shape, n)) if probability else rng.normal(size=(1, *shape, n))
        a = np.repeat(a, calls // len(a), axis=0).astype(np.float32)
        return a / a.sum(-1, keepdims=True) if probability else a

    move = lambda a: np.stack([np.roll(a[t], t * shift, -1) for t in range(calls)])
    last = move(draw(depth - 1))
    own = {"expert": move(draw(2, depth)), "text": last / 2, "last": move(draw(depth - 1)), "all": last / 3}
    return Trace(
        layout=PrefixLayout(("a", "b"), n // 2, 4),
        images=[{}] * calls,
        subtask=subtasks([-1] * (calls // 2) + [1] * (calls - calls // 2)),
        visual=np.swapaxes(move(draw(8, probability=False)), 1, 2),
        alive=np.ones((calls, n), bool),
        expert=move(draw(2, depth)),
        text=move(draw(depth - 1)),
        last=last,
        everyone=last,
        probabilities=own,
        hidden=np.zeros((calls, 3, n, 2), np.float32),
        actions=np.zeros((calls, 3, 4), np.float32),
        keys=jax.vmap(jax.random.key)(np.arange(calls)),
    )
