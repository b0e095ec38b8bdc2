"""SparseVLM: the prompt words that matter rate the image, in three stages (Zhang et al., ICML 2025).

raters   prompt tokens j with mean_v softmax_j(z_v · e_j) above the average of all j          (Section 3.2)
score    head-mean attention of the raters to a visual token, in the layer before the cut
v1       drops the rest, but recycles: the best 30 % of the dropped are clustered (density peaks) into a tenth as
         many tokens, each the mean of its cluster                                            (Section 3.4)
v2       drops the rest
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from safe_pruner_jax.arrays import Array
from safe_pruner_jax.pruners import checks
from safe_pruner_jax.pruners.base import (
    Capture,
    Cut,
    Evidence,
    Later,
    Plan,
    Pruner,
    Selection,
    State,
    finite,
    stateless,
)
from safe_pruner_jax.tokens import best, budget, table

PUBLISHED = {"v1": (300, 200, 110), "v2": (300, 200, 118)}
"""Tokens of 576 kept at the three stages for an average of 192 (authors' code, `score.py`)."""


def sparsevlm(
    *, keep: float = 0.2, layers: tuple[int, ...] = (2, 6, 15), version: Literal["v1", "v2"] = "v1"
) -> Pruner:
    """SparseVLM on π0.5.

    Stage i keeps keep · (1.56, 1.04, 0.57)[i] of the tokens, the published proportions (192 of 576 on average);
    keep = 1 keeps everything.

    Deviations from the paper: the published budgets instead of the rank of the attention matrix, since shapes are
    static; merged tokens count towards the budget and take the slot and position of their cluster's centre; equal
    densities are told apart by slot, not by noise. Positions are kept in both versions (the authors' v1 renumbers).
    Of v2 the corrections of the attention (division by a rotary bias, choice of heads) are left out.

    Args:
      keep: average share of the alive visual tokens in (0, 1].
      layers: three layers of a 32-layer model whose attention is looked at; scaled to the model's depth.
      version: "v1" recycles dropped tokens, "v2" does not.

    References:
      "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference", Sections 3.2 to 3.4.

    Example:
      >>> [round(cut.keep, 2) for cut in sparsevlm(keep=0.3).plan.cuts]
      [0.47, 0.31, 0.17]
    """
    layers = tuple(layers)
    checks.one_of(tuple(PUBLISHED), "version", version)
    checks.require(len(layers) == 3, "layers", "three ascending layers of 0 to 30", layers)
    checks.ascending(layers, 0, 30)
    checks.share(keep)
    kept = tuple(1.0 if keep == 1 else min(1.0, keep * m / 192) for m in PUBLISHED[version])
    rows = (Capture(-1, "each", over="all"),)
    compares = []
    for a, b in zip((1.0, *kept), kept, strict=False):
        recycled = ((0.3 * (a - b),) * 2,) if version == "v1" and a > b else ()
        compares.append((("visual", "text"), *recycled))
    plan = Plan(
        Cut(layers[0] + 1, kept[0]),
        capture=rows,
        later=tuple(Later(l + 1, k, rows, c) for l, k, c in zip(layers[1:], kept[1:], compares[1:], strict=True)),
        depth=32,
        compares=compares[0],
    )

    def choose(e: Evidence, stage: int) -> Selection:
        n = e.alive.shape[0]
        (attention,) = e.saliency
        chosen = raters(e.visual, e.text, e.alive, e.text_alive)
        rates = chosen.astype(jnp.float32)
        score = (rates[:, None] * attention).sum(0) / jnp.maximum(rates.sum(), 1)
        entering = lambda m: budget(kept[stage - 1], m) if stage else m
        staying = lambda m: budget(kept[stage], m)
        count = table(staying, n)[e.alive.sum()]
        if version == "v2" or staying(n) == entering(n):
            index, alive = best(score, e.running, staying(n), count)
            rows = None
        else:
            score, hidden = recycle(score, e.hidden, e.running, e.alive, entering, staying)
            index, alive = best(score, e.running, staying(n), count)
            rows = hidden[index]
        if version == "v1" and rows is None:
            rows = e.hidden[index]
        return Selection(index, alive, ~finite(attention, e.visual), score, jnp.array(jnp.nan), rows)

    def step(state: State, e: Evidence) -> tuple[State, Selection]:
        return state, choose(e, 0)

    def later(state: State, e: Evidence, i: int) -> tuple[State, Selection]:
        return state, choose(e, i + 1)

    return Pruner("sparsevlm", plan, stateless, step, later)


def raters(visual: Array, text: Array, alive: Array, text_alive: Array) -> Array:
    """[T] bool, the prompt tokens that rate: mean relevance above the average of all alive ones; all if none is."""
    logits = jnp.matmul(visual.astype(jnp.float32), text.astype(jnp.float32).T, precision=jax.lax.Precision.HIGHEST)
    relevance = jax.nn.softmax(jnp.where(text_alive, logits, jnp.finfo(jnp.float32).min), axis=-1)
    count = lambda mask: jnp.maximum(mask.sum(), 1).astype(jnp.float32)
    relevance = (alive[:, None].astype(jnp.float32) * relevance).sum(0) / count(alive)
    average = relevance.sum(where=text_alive) / count(text_alive)
    above = text_alive & (relevance > average)
    return jnp.where(above.any(), above, text_alive)


def split(entering: int, staying: int) -> tuple[int, int, int]:
    """How `staying` slots are filled from `entering` tokens: kept ones, candidates of recycling, merged tokens.

    Of D dropped tokens int(0.3 D) + 1 are candidates and a tenth of these, rounded down, plus one are merged tokens.

    >>> split(512, 160)
    (149, 109, 11)
    """
    if entering <= staying:
        return staying, 0, 0
    for kept in range(staying - 1, -1, -1):
        candidates = int(0.3 * (entering - kept)) + 1
        if kept + candidates // 10 + 1 <= staying:
            return kept, candidates, staying - kept
    return staying, 0, 0


def recycle(
    score: Array,
    hidden: Array,
    running: Array,
    alive: Array,
    entering: Callable[[int], int],
    staying: Callable[[int], int],
) -> tuple[Array, Array]:
    """Recycling of one stage.

    Args:
      score: [n] rating, hidden: [n, d] rows, running: [n] bool, alive: [n] bool.
      entering, staying: number of alive tokens → tokens before and after this stage.

    Returns:
      [n] score that puts kept tokens first, then the centres of clusters; [n, d] rows with merged centres.
    """
    n = score.shape[0]
    splits = [split(entering(m), staying(m)) for m in range(n + 1)]
    kept, candidates, merged = (table(lambda m, j=j: splits[m][j], n)[alive.sum()] for j in range(3))
    score = jnp.where(running, score, 0.0)
    order = jnp.argsort(jnp.where(running, -score, jnp.inf), stable=True)
    rank = jnp.zeros(n, jnp.int32).at[order].set(jnp.arange(n, dtype=jnp.int32))
    m = jnp.arange(max(c for _, c, _ in splits))
    slot = jnp.take(order, kept + m, mode="clip")
    valid = (m < candidates) & running[slot]
    x = jnp.where(valid[:, None], hidden[slot], 0).astype(jnp.float32)
    centre, mean = cluster(x, valid, merged)
    slots = jnp.where(centre, slot, n)
    hidden = hidden.at[slots].set(mean.astype(hidden.dtype), mode="drop")
    centres = jnp.zeros(n, bool).at[slots].set(True, mode="drop")
    first = running & (rank < kept)
    return score + 2.0 * first.astype(jnp.float32) + centres.astype(jnp.float32), hidden


def cluster(x: Array, valid: Array, count: Array) -> tuple[Array, Array]:
    """Density-peak clustering: rows x [m, d] float32, valid [m] bool → `count` clusters.

    Density is exp(-mean squared distance to the `count` nearest rows, itself included), distance is Euclidean over
    √d; a centre is dense and far from any denser row. Every row joins its nearest centre.

    Returns:
      [m] bool centres, and [m, d] the mean of the cluster of every centre.
    """
    m, d = x.shape
    square = (x * x).sum(-1)
    product = jnp.matmul(x, x.T, precision=jax.lax.Precision.HIGHEST)
    distance = jnp.sqrt(jnp.maximum(square[:, None] + square[None, :] - 2 * product, 0.0) / d)
    # symmetric to the last bit: mutual neighbours are equally dense, and the first of them counts as denser
    distance = jnp.where(jnp.eye(m, dtype=bool), 0.0, jnp.minimum(distance, distance.T))
    pair = valid[:, None] & valid[None, :]
    near = jnp.sort(jnp.where(pair, distance, jnp.inf), axis=-1)
    near = jnp.where((jnp.arange(m)[None] < count) & jnp.isfinite(near), near, 0.0)
    density = jnp.exp(-(near**2).sum(-1) / jnp.maximum(count, 1).astype(jnp.float32))
    first = jnp.arange(m)
    denser = (density[None, :] > density[:, None]) | (
        (density[None, :] == density[:, None]) & (first[None, :] < first[:, None])
    )
    furthest = jnp.where(pair, distance, 0.0).max()
    to_denser = jnp.where(pair & denser, distance, furthest).min(-1)
    peak = jnp.where(valid, to_denser * density, -1.0)
    order = jnp.argsort(-peak, stable=True)
    centre = valid & (jnp.zeros(m, jnp.int32).at[order].set(jnp.arange(m, dtype=jnp.int32)) < count)
    home = jnp.where(centre, first, jnp.argmin(jnp.where(centre[None, :], distance, jnp.inf), axis=-1))
    members = jnp.zeros(m).at[home].add(valid.astype(jnp.float32))
    total = jnp.zeros_like(x).at[home].add(jnp.where(valid[:, None], x, 0.0))
    return centre, total / jnp.maximum(members, 1.0)[:, None]
