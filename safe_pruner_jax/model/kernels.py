"""Pallas kernels for the action expert and the vision tower, of which XLA makes many small programs per layer.

    attention      queries over the prefix's keys and the chunk's own, softmax, and the sum of the values, in one launch
    gated_mlp      gelu(x @ gate) · (x @ up), in one launch and without the two products in memory
    layer          a whole layer of π0.5's expert in five launches, see `expert_kernels`
    vision         attention of a block of the vision tower in one launch, see `vision_kernels`

A configuration names the kernels its programs use (`Pi0Config.kernels`); the default is none, which is the XLA path.
`engine.autotune.tuned` tries each on the device against the XLA path and keeps those that compile, agree and are
faster: a kernel is never used for another reason. They are written for GPUs (Triton) and can be interpreted anywhere,
for tests.

They give no logits and have no derivative: a layer whose logits are wanted, and a guided chunk, take the XLA path.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from safe_pruner_jax.arrays import Array
from safe_pruner_jax.model.config import KERNELS
from safe_pruner_jax.model.matrix import Matrix, Scaled

Ref = Any
"""A block of an array inside a kernel; Pallas names no public type for it."""

ROWS = 16
"""Rows of a block: the least a tensor core multiplies; fewer are padded."""

KEYS = 64
"""Keys of a block; `padded` rounds a prefix up to it once, before the denoise steps."""

COLUMNS = 64
"""Columns of a block of the gated MLP, and rows of a block of its matrices."""

ATTENTION, GATED_MLP, LAYER, VISION = NAMES = KERNELS

# jax 0.5 has the same class under another name; giving one at all is what chooses Triton
TRITON = getattr(triton, "CompilerParams", None) or triton.TritonCompilerParams
TRITON = TRITON(num_warps=4, num_stages=2)

LOW = -1e30
"""Logit of a key that is not there."""


def padded(a: Array, axis: int, to: int) -> Array:
    """`a` with zeros (False) behind `axis` up to a multiple of `to`."""
    missing = -a.shape[axis] % to
    if not missing:
        return a
    return jnp.pad(a, [(0, missing if i == axis % a.ndim else 0) for i in range(a.ndim)])


_compiling = contextvars.ContextVar("compiling for a GPU that is not there", default=False)


@contextlib.contextmanager
def compiled() -> Iterator[None]:
    """Inside, kernels are compiled although this machine has a CPU only: `openpi bench --compile-for`."""
    token = _compiling.set(True)
    try:
        yield
    finally:
        _compiling.reset(token)


def run_interpreted(asked: bool | None) -> bool:
    """Whether a kernel is interpreted: as asked for, else on a CPU."""
    return (jax.default_backend() == "cpu" and not _compiling.get()) if asked is None else asked


def load(ref: Ref, at: tuple, there: Array) -> Array:
    """Part of a block, 0 where nothing is `there`; jax 0.5 has it under another name."""
    if hasattr(triton, "load"):
        return triton.load(ref.at[at], mask=there, other=0.0)
    return pl.load(ref, at, mask=there, other=0.0)


def store(ref: Ref, at: tuple, value: Array, there: Array) -> None:
    """Writes what is `there` of a value into part of a block."""
    if hasattr(triton, "store"):
        triton.store(ref.at[at], value, mask=there)
    else:
        pl.store(ref, at, value, mask=there)


# --- attention ----------------------------------------------------------------------------------------------


def online(q: Array, k: Array, v: Array, seen: Array | None, carry: tuple) -> tuple:
    """One block of keys [Y, H] into the running (sum of values [X, H], maximum [X], sum of weights [X]) of q [X, H].

    `seen` [X or 1, Y] bool; None: every row sees every key.
    """
    out, top, total = carry
    logits = lax.dot_general(q, k, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    logits = logits if seen is None else jnp.where(seen, logits, LOW)
    now = jnp.maximum(top, logits.max(axis=1))
    weights = jnp.exp(logits - now[:, None])
    old = jnp.exp(top - now)
    more = lax.dot_general(weights.astype(v.dtype), v, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    return out * old[:, None] + more, now, total * old + weights.sum(axis=1)


def softmax_pass(q: Array, blocks: int, read: Callable[[Array], tuple[Array, Array, Array | None]]) -> tuple:
    """What `online` makes of q [X, H] and blocks 0, 1, … of keys; `read` gives a block's (k, v, seen)."""
    rows, width = q.shape
    start = (jnp.zeros((rows, width), jnp.float32), jnp.full(rows, LOW, jnp.float32), jnp.zeros(rows, jnp.float32))
    return lax.fori_loop(0, blocks, lambda i, carry: online(q, *read(i), carry), start)


def gelu(x: Array) -> Array:
    """`jax.nn.gelu` of float32 in its tanh form; tanh(a) = 1 - 2 / (exp(2a) + 1), which no compiler has to look up."""
    inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return x * (1.0 - 1.0 / (jnp.exp(2.0 * inner) + 1.0))


def _attention(
    q_ref: Ref,
    k_ref: Ref,
    v_ref: Ref,
    seen_ref: Ref,
    own_k_ref: Ref,
    own_v_ref: Ref,
    own_seen_ref: Ref,
    out_ref: Ref,
    *,
    keys: int,
) -> None:
    q = q_ref[...]

    def block(i: Array) -> tuple:
        at = pl.ds(i * KEYS, KEYS)
        return k_ref[at, :], v_ref[at, :], seen_ref[at][None, :]

    carry = softmax_pass(q, keys // KEYS, block)
    out, _, total = online(q, own_k_ref[...], own_v_ref[...], own_seen_ref[...] != 0, carry)
    out_ref[...] = (out / total[:, None]).astype(out_ref.dtype)


def attention(
    q: Array,
    k: Array,
    v: Array,
    seen: Array,
    own_k: Array,
    own_v: Array,
    own_seen: Array,
    *,
    interpret: bool | None = None,
) -> Array:
    """Grouped-query attention of a few rows over the prefix and themselves, without the logits in memory.

    Args:
      q: [B, R, N, H], scaled; query head h reads kv head h // (N/K).
      k, v: [B, S, K, H] of the prefix, S a multiple of `KEYS` (`padded`).
      seen: [B, S] bool, which of them are there; at least one key of all that a row sees must be.
      own_k, own_v: [B, R, K, H].
      own_seen: [1, R, R] bool, which of its own rows a row sees.
      interpret: run without compiling; None: on a CPU only.

    Returns:
      [B, R, N·H] in q's dtype; accumulated in float32.

    Raises:
      ValueError: S is not a multiple of `KEYS`.
    """
    B, R, N, H = q.shape
    S, K = k.shape[1:3]
    if S % KEYS:
        raise ValueError(f"k: expected a multiple of {KEYS} keys, got {S}; use kernels.padded")
    G = N // K
    x = padded(q.reshape(B, R, K, G, H).swapaxes(1, 2).reshape(B, K, R * G, H), 2, ROWS)
    heads = lambda a: a.swapaxes(1, 2)  # a view with one kv head
    own = [padded(heads(a), 2, ROWS) for a in (own_k, own_v)]
    allowed = padded(padded(jnp.repeat(own_seen[0], G, axis=0), 0, ROWS), 1, ROWS).astype(jnp.int32)
    X, Y = x.shape[2], own[0].shape[2]
    whole = lambda n: pl.BlockSpec((None, None, n, H), lambda b, h, i: (b, h, 0, 0))
    rows = pl.BlockSpec((None, None, ROWS, H), lambda b, h, i: (b, h, i, 0))
    mask = pl.BlockSpec((None, S), lambda b, h, i: (b, 0))
    own_mask = pl.BlockSpec((ROWS, Y), lambda b, h, i: (i, 0))
    out = pl.pallas_call(
        partial(_attention, keys=S),
        grid=(B, K, X // ROWS),
        in_specs=[rows, whole(S), whole(S), mask, whole(Y), whole(Y), own_mask],
        out_specs=rows,
        out_shape=jax.ShapeDtypeStruct((B, K, X, H), q.dtype),
        compiler_params=TRITON,
        interpret=run_interpreted(interpret),
    )(x, heads(k), heads(v), seen, *own, allowed)
    return out[:, :, : R * G].reshape(B, K, R, G, H).swapaxes(1, 2).reshape(B, R, N * H)


# --- gated MLP ----------------------------------------------------------------------------------------------


def _gated(x_ref: Ref, gate_ref: Ref, up_ref: Ref, *rest: Ref) -> None:
    *scales, out_ref = rest
    rows, depth = x_ref.shape
    columns = out_ref.shape[1]

    def block(i: Array, carry: tuple) -> tuple:
        gate, up = carry
        at = pl.ds(i * COLUMNS, COLUMNS)
        x = x_ref[:, at]
        times = lambda ref: jnp.dot(x, ref[at, :].astype(x.dtype), preferred_element_type=jnp.float32)
        return gate + times(gate_ref), up + times(up_ref)

    zero = jnp.zeros((rows, columns), jnp.float32)
    gate, up = lax.fori_loop(0, depth // COLUMNS, block, (zero, zero))
    if scales:
        gate, up = (a * scale[...][None, :] for a, scale in zip((gate, up), scales, strict=True))
    out_ref[...] = (gelu(gate) * up).astype(out_ref.dtype)


def gated_mlp(x: Array, gate_up: Matrix, *, interpret: bool | None = None) -> Array:
    """gelu(x @ gate) · (x @ up), both products and what follows in one launch.

    Args:
      x: [..., D], D a multiple of `COLUMNS`.
      gate_up: [D, 2F], gate first, F a multiple of `COLUMNS`; 8 bits are widened block by block.
      interpret: run without compiling; None: on a CPU only.

    Returns:
      [..., F] in x's dtype; accumulated in float32.

    Raises:
      ValueError: D or F is not such a multiple.
    """
    D, F = gate_up.shape[0], gate_up.shape[1] // 2
    if D % COLUMNS or F % COLUMNS:
        raise ValueError(f"gate_up: expected [D, 2F] with D and F multiples of {COLUMNS}, got {D} and {F}")
    rows = padded(x.reshape(-1, D), 0, ROWS)
    half = F // COLUMNS
    values = gate_up.values if isinstance(gate_up, Scaled) else gate_up
    block = lambda offset: pl.BlockSpec((D, COLUMNS), lambda i, j: (0, j + offset))
    scale = lambda offset: pl.BlockSpec((COLUMNS,), lambda i, j: (j + offset,))
    scaled = isinstance(gate_up, Scaled)
    out = pl.pallas_call(
        _gated,
        grid=(rows.shape[0] // ROWS, half),
        in_specs=[
            pl.BlockSpec((ROWS, D), lambda i, j: (i, 0)),
            block(0),
            block(half),
            *([scale(0), scale(half)] if scaled else []),
        ],
        out_specs=pl.BlockSpec((ROWS, COLUMNS), lambda i, j: (i, j)),
        out_shape=jax.ShapeDtypeStruct((rows.shape[0], F), x.dtype),
        compiler_params=TRITON,
        interpret=run_interpreted(interpret),
    )(rows, values, values, *([gate_up.scale] * 2 if scaled else []))
    count = functools.reduce(lambda a, b: a * b, x.shape[:-1], 1)
    return out[:count].reshape(*x.shape[:-1], F)
