"""Which prefix slots are alive, how attention becomes saliency, and how tokens are chosen and gathered.

Three worked instances. LIBERO has two cameras of three and a prompt of 23 tokens: the layout is
`PrefixLayout(("base_0_rgb", "left_wrist_0_rgb"), 256, 32)`, 544 slots instead of openpi's 968. At
`keep=0.2` the budget is `round(0.2 · 512) = 102` visual tokens. `top_k` returns their slots in ascending
order, so positions stay monotone after the gather.
"""

import contextlib
import contextvars
import numbers
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from safe_pruner_jax.arrays import Array

PROMPT_LENGTHS = (16, 32, 48, 64, 96, 128, 200)
"""Static prompt lengths a program may be compiled for; a prompt takes the smallest that holds it."""


@dataclass(frozen=True)
class PrefixLayout:
    """The static shape of a prefix: the cameras that are encoded and the prompt slots.

    Args:
      cameras: names of the encoded cameras, in openpi's order; at least one.
      tokens_per_camera: visual tokens of one camera.
      text: prompt slots T.
    """

    cameras: tuple[str, ...]
    tokens_per_camera: int
    text: int

    @property
    def visual(self) -> int:
        """Visual token slots n."""
        return len(self.cameras) * self.tokens_per_camera

    @property
    def slots(self) -> int:
        """All prefix slots P."""
        return self.visual + self.text


def smallest_layout(
    masks: Mapping[str, bool],
    prompt_len: int,
    *,
    cameras: tuple[str, ...],
    tokens_per_camera: int,
    max_token_len: int,
    prompt_lengths: tuple[int, ...] = PROMPT_LENGTHS,
) -> PrefixLayout:
    """The layout without dead tokens: alive cameras only, prompt at the smallest static length.

    A scene in which every camera is masked keeps the first one (masked), so that no shape is empty.

    Args:
      masks: camera name → is it real.
      prompt_len: alive prompt tokens.
      cameras: all cameras of the model, in order.
      tokens_per_camera: visual tokens of one camera.
      max_token_len: prompt slots openpi pads to; an upper bound that is always available.
      prompt_lengths: the static lengths to choose from.

    Returns:
      The layout.

    Raises:
      ValueError: the prompt is longer than `max_token_len`.

    >>> smallest_layout({"a": True, "b": False}, 20, cameras=("a", "b"), tokens_per_camera=256, max_token_len=200)
    PrefixLayout(cameras=('a',), tokens_per_camera=256, text=32)
    """
    if prompt_len > max_token_len:
        raise ValueError(f"expected a prompt of at most {max_token_len} tokens, got {prompt_len}; shorten it")
    alive = tuple(c for c in cameras if masks.get(c, False)) or cameras[:1]
    lengths = sorted({t for t in prompt_lengths if t < max_token_len} | {max_token_len})
    text = next(t for t in lengths if t >= prompt_len)
    return PrefixLayout(alive, tokens_per_camera, text)


def saliency(logits: Array, rows: Array, alive: Array, *, over: str = "visual") -> Array:
    """S^ℓ[v]: attention that query rows pay to visual tokens (SAFE-Pruner, Eq. 1-2).

        S^ℓ[v] = mean over heads and over rows r of softmax_v(q_r · k_v / √H)

    Args:
      logits: [..., R, P] float32 scaled attention logits, masked keys hugely negative; leading axes are
        heads and are averaged. The first n keys are the visual tokens.
      rows: [R] bool, which rows count.
      alive: [n] bool, alive visual tokens.
      over: "visual" normalises over the alive visual tokens (Eq. 1: S sums to 1); "all" keeps the model's
        own probabilities over all keys (FastV).

    Returns:
      [n] float32; dead tokens have 0. Without alive rows or tokens everything is 0.
    """
    heads = visual_attention(logits, alive, over)
    weight = rows.astype(jnp.float32)
    s = (weight[:, None] * heads).sum(0) / jnp.maximum(weight.sum(), 1.0)
    return jnp.where(alive, s, 0.0)


def visual_attention(logits: Array, alive: Array, over: str) -> Array:
    """Head-mean attention of every row to the visual tokens, arguments as in `saliency`: [R, n] float32."""
    n = alive.shape[0]
    logits = logits.astype(jnp.float32)
    if over == "visual":
        # a huge number, not -inf: with no token alive the row stays finite, and its sum over rows is zeroed later
        probs = jax.nn.softmax(jnp.where(alive, logits[..., :n], jnp.finfo(jnp.float32).min), axis=-1)
    else:
        probs = jax.nn.softmax(logits, axis=-1)[..., :n]
    return probs.reshape(-1, *probs.shape[-2:]).mean(0)


def budget(keep: float, n: int) -> int:
    """Number of visual tokens kept of `n`: a share is rounded (half to even), a count is taken as it is.

    >>> budget(0.2, 512), budget(64, 512), budget(1.0, 512)
    (102, 64, 512)
    """
    return min(n, round(keep * n) if keep <= 1 else int(keep))


def check_keep(keep: float) -> float:
    """A share of the alive visual tokens in (0, 1], or a whole number of at least 2 tokens; raises ValueError."""
    number = isinstance(keep, numbers.Real) and not isinstance(keep, bool)
    if not (number and (0 < keep <= 1 or (keep >= 2 and float(keep).is_integer()))):
        raise ValueError(
            f"keep: expected a share of the visual tokens in (0, 1] or a whole number of tokens >= 2, got {keep!r}; "
            "use for example keep=0.2"
        )
    return keep


def top_k(
    score: Array, alive: Array, keep: float, *, camera: Array | None = None, per_camera: int = 0
) -> tuple[Array, Array]:
    """The best tokens of one robot, as a static-shape selection.

    Args:
      score: [n] float32, higher is better; NaN counts as the lowest. Equal scores: the lower index wins.
      alive: [n] bool; a dead token is chosen only to fill slots when no alive one is left, and is marked dead.
      keep: share or count, see `check_keep`; the budget is taken of the *alive* tokens.
      camera: [n] int32 camera of each token, needed when `per_camera` is used.
      per_camera: at least so many tokens of every camera come first.

    Returns:
      index [k] int32 ascending and unique with k = budget(keep, n), and alive [k] bool: false where a slot
      is beyond the robot's own budget or holds a dead token.
    """
    n = score.shape[0]
    k = budget(keep, n)
    if per_camera:
        score = _comparable(score, alive)
        order = jnp.argsort(-score, stable=True)
        rank = jnp.zeros(n, jnp.int32).at[order].set(jnp.arange(n, dtype=jnp.int32))
        ahead = (camera[:, None] == camera[None, :]) & (rank[None, :] < rank[:, None])
        first = (ahead.sum(1) < per_camera) & alive
        # all of the reserved tokens before all of the others, each group by score
        score = -jnp.argsort(jnp.lexsort((rank, ~first)))
    return best(score, alive, k, table(lambda m: budget(keep, m), n)[alive.sum()])


def among_the_best(score: Array, alive: Array, keep: float) -> Array:
    """[n] bool: whom `top_k` chooses."""
    index, chosen = top_k(score, alive, keep)
    return jnp.zeros(alive.shape, bool).at[index].max(chosen)


def table(f: Callable[[int], int], n: int) -> Array:
    """f(0), …, f(n) as an int32 array, to be looked up with a number of tokens that only the device knows."""
    return jnp.asarray(np.array([f(m) for m in range(n + 1)], np.int32))


def best(score: Array, alive: Array, k: int, count: Array) -> tuple[Array, Array]:
    """The `count` best tokens (int32 scalar, at most k) in k slots; score, alive and result as in `top_k`.

    Inside `counting` they are counted, else sorted; the result is the same to the last slot.
    """
    return (_by_counting if _counting.get() else _by_sorting)(_comparable(score, alive), alive, k, count)


_counting = contextvars.ContextVar("top-K by counting", default=False)


@contextlib.contextmanager
def counting(on: bool) -> Iterator[None]:
    """Inside, programs are traced with a top-K by counting, if it is on: for `Pi0Config.savings`.

    On a GPU that is a launch less than two sorts, without their stages; a CPU takes a quarter of the time to sort.
    """
    token = _counting.set(on)
    try:
        yield
    finally:
        _counting.reset(token)


def _by_sorting(score: Array, alive: Array, k: int, count: Array) -> tuple[Array, Array]:
    """`best` of a comparable score."""
    chosen = jax.lax.top_k(score, k)[1].astype(jnp.int32)
    kept = (jnp.arange(k) < count) & alive[chosen]
    # sort the slots, carrying `kept` along: slots are < n, so one integer holds both
    packed = jnp.sort(chosen * 2 + kept.astype(jnp.int32))
    return packed // 2, (packed % 2).astype(bool)


def _by_counting(score: Array, alive: Array, k: int, count: Array) -> tuple[Array, Array]:
    """`best` of a comparable score."""
    place, slots = jnp.arange(score.shape[0], dtype=jnp.int32), jnp.arange(k, dtype=jnp.int32)[:, None]
    order = jax.lax.optimization_barrier(_integer(score))  # else it is made anew for every pair
    earlier = place[None, :] < place[:, None]
    rank = (order[None, :] > order[:, None] - earlier.astype(jnp.int32)).sum(1, dtype=jnp.int32)
    upto = ((rank < k)[None, :] & ~(place[None, :] > place[:, None])).sum(1, dtype=jnp.int32)
    index = (upto[None, :] <= slots).sum(1, dtype=jnp.int32)
    kept = ((rank < count) & alive)[None, :] & (upto[None, :] == slots + 1)
    return index, kept.any(1)


def _integer(x: Array) -> Array:
    """int32 in the order of float32 x without NaN."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _comparable(score: Array, alive: Array) -> Array:
    """A score without NaN, dead tokens below everything."""
    lowest = jnp.finfo(jnp.float32).min
    score = jnp.maximum(jnp.where(jnp.isnan(score), lowest, score.astype(jnp.float32)), lowest)
    # -0.0 would sort below 0.0
    return jnp.where(alive, jnp.where(score == 0, 0.0, score), -jnp.inf)


def spread(x: Array, slots: Array, alive: Array, n: int) -> Array:
    """The inverse of a gather, for one robot: x [k, ...] back in its slots [k] of n; 0 where nothing alive [k] lies."""
    return jnp.zeros((n, *x.shape[1:]), x.dtype).at[jnp.where(alive, slots, n)].set(x, mode="drop")


def gather(x: Array, index: Array) -> Array:
    """Rows of every robot: x [B, n, ...], index [B, k] → [B, k, ...]."""
    return jax.vmap(lambda a, i: jnp.take(a, i, axis=0, mode="clip"))(x, index)
