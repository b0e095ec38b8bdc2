"""Baselines that a reviewer asks for: what do choosing, looking and remembering gain over not doing so?

    baseline/grid        every so many tokens, whatever they show
    baseline/camera      all of one camera dropped
    baseline/prior       the same slots always: those that late layers looked at on average in calibration episodes
    baseline/one_token   one token for the whole scene, the limit of a sampler of K tokens
    random --pruner.warm_start 3 is in the table of pruners

Known by name (`factory`, `openpi analyze actions --methods`, openpi sweep) and not listed by the command line.
"""

from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from safe_pruner_jax.arrays import Array
from safe_pruner_jax.pruners.base import (
    Capture,
    Cut,
    Evidence,
    Plan,
    Pruner,
    Selection,
    State,
    check_layer,
    finite,
    stateless,
    whole,
)
from safe_pruner_jax.pruners.checks import require
from safe_pruner_jax.pruners.full_steps import with_full_steps
from safe_pruner_jax.tokens import top_k

BITS = 5
"""A camera has at most 2^BITS tokens in a row."""


def grid(*, keep: float = 0.2, cut: int = 3) -> Pruner:
    """Tokens on a regular grid, the same in every camera: the first K in the order of Bayer's matrix.

    Args:
      keep: share of the alive visual tokens in (0, 1], or a number of tokens; a quarter is every second row and column.
      cut: layer index before which tokens are dropped, 1 ≤ cut < L.
    """
    return _stateless("baseline/grid", Plan(Cut(check_layer(cut), keep)), lambda e: evenly(e.camera), keep)


def camera(*, keep: float = 0.5, cut: int = 3, dropped: int = 1) -> Pruner:
    """The tokens of one camera are dropped first; what else has to leave, leaves on a grid.

    Args:
      keep: share of the alive visual tokens in (0, 1], or a number of tokens; 0.5 is one camera of two.
      cut: layer index before which tokens are dropped, 1 ≤ cut < L.
      dropped: place of the camera among the encoded ones; 1 is LIBERO's wrist.
    """
    require(whole(dropped, 0), "dropped", "the place of a camera, 0 or more", dropped)
    score = lambda e: (e.camera != dropped) + evenly(e.camera)
    return _stateless("baseline/camera", Plan(Cut(check_layer(cut), keep)), score, keep)


def prior(*, keep: float = 0.2, cut: int = 3, map: str = "") -> Pruner:
    """Always the same slots: those with the highest mean late saliency in calibration episodes.

    Args:
      keep: share of the alive visual tokens in (0, 1], or a number of tokens.
      cut: layer index before which tokens are dropped, 1 ≤ cut < L.
      map: .npy file of [n] float32, such as the prior.npy that `openpi analyze controls` leaves.
    """
    require(Path(map).is_file(), "map", "a .npy file from `openpi analyze controls`", map)
    mean = np.load(map)

    def score(e: Evidence) -> Array:
        if mean.shape != e.alive.shape:
            raise ValueError(f"map: expected one value for each of {e.alive.shape[0]} slots, got {mean.shape} in {map}")
        return jnp.asarray(mean, jnp.float32)

    return _stateless("baseline/prior", Plan(Cut(check_layer(cut), keep)), score, keep)


def one_token(*, keep: float = 2, cut: int = 3) -> Pruner:
    """One token for the scene: the mean of the hidden rows by the attention of all rows, in the slot of the best.

    GridS samples K tokens with trained weights and reports π0.5 near its full success at a few; this is K = 1 without
    training, the floor of every method that keeps something.

    Args:
      keep: not looked at; it is there so that the baseline can stand beside others in a table.
      cut: layer index before which tokens are merged, 1 ≤ cut < L.
    """
    plan = Plan(Cut(check_layer(cut), 2), capture=(Capture(cut - 1, "all"),))

    def step(state: State, e: Evidence) -> tuple[State, Selection]:
        (score,) = e.saliency
        hidden = jnp.where(e.alive[:, None], e.hidden, 0).astype(jnp.float32)
        weight = jnp.where(e.alive, score, 0.0)
        mean = (weight[:, None] * hidden).sum(0) / jnp.maximum(weight.sum(), 1e-30)
        index, _ = top_k(score, e.alive, 2)
        first = index == jnp.argmax(jnp.where(e.alive, score, -jnp.inf))
        rows = jnp.broadcast_to(mean, (2, *mean.shape)).astype(e.hidden.dtype)
        return state, Selection(
            index, first & e.alive[index], ~finite(score, e.visual), score, jnp.array(jnp.nan), rows
        )

    return Pruner("baseline/one_token", plan, stateless, step)


def evenly(camera: Array) -> Array:
    """[n] float32 below 1, high first: Bayer's order of each camera's tokens, which lie row by row in a square.

    The best quarter is every second row and column, the best sixteenth every fourth, and in between half of those
    places is filled evenly too.
    """
    same = camera[:, None] == camera[None, :]
    side = jnp.round(jnp.sqrt(same.sum(1))).astype(jnp.int32)
    slot = (same & (jnp.arange(camera.shape[0])[None, :] < jnp.arange(camera.shape[0])[:, None])).sum(1)
    x, y = slot % side, slot // side
    bit = lambda a, b: (a >> b) & 1
    digits = [(2 * bit(x ^ y, b) + bit(y, b)) << (2 * (BITS - 1 - b)) for b in range(BITS)]
    rank = jnp.stack(digits).sum(0)
    return 1.0 - (rank + 1) / 4.0**BITS


def _stateless(name: str, plan: Plan, score: Callable[[Evidence], Array], keep: float) -> Pruner:
    def step(state: State, e: Evidence) -> tuple[State, Selection]:
        s = jnp.where(e.alive, score(e), 0.0)
        index, alive = top_k(s, e.alive, keep)
        return state, Selection(index, alive, ~finite(e.visual), s, jnp.array(jnp.nan))

    return Pruner(name, plan, stateless, step)


BASELINES = {f"baseline/{f.__name__}": with_full_steps(f) for f in (grid, camera, prior, one_token)}
"""baseline/NAME → factory."""
