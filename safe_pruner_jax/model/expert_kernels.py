"""One layer of the adaptive action expert in five launches; XLA makes fourteen of it.

    qkv      norm, product, rotation          attend   logits, softmax and sum over prefix and chunk
    out      product, gate, residual          gated    norm, both products, gelu
    down     product, gate, residual

For π0.5's expert: adaptive norms in one array (`gemma.Stacked`), matrices of full precision, `ROWS` rows per robot, of
which those behind the chunk count for nobody. Blocks are chosen to fill the chip: every matrix is cut into columns
of `COLUMNS`, and long prefixes are split among blocks (`SPLIT`), whose parts `out` joins as it reads them.

The same conditions as for the other kernels (`kernels`): no logits, no derivative, measured before it is used. Sums are
in float32, and what XLA's path rounds to the activation dtype between its products is rounded here, too. What goes into
the layers and comes out of them is in `action_kernels`.
"""

import functools
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from safe_pruner_jax.arrays import Array
from safe_pruner_jax.model.config import GemmaConfig
from safe_pruner_jax.model.gemma import LayerWeights, Segment, Stacked
from safe_pruner_jax.model.kernels import (
    KEYS,
    ROWS,
    TRITON,
    Ref,
    gelu,
    online,
    run_interpreted,
    softmax_pass,
)
from safe_pruner_jax.model.matrix import Scaled

COLUMNS = 16
"""Columns of a matrix per block: the least a tensor core multiplies, for the most blocks."""

DEPTH = 64
"""Rows of a matrix that a block reads at a time."""

SPLIT = 192
"""About so many keys of a prefix one block of the attention reads; longer ones are split."""


def supports(c: GemmaConfig, w: LayerWeights, mods: object, rows: int) -> bool:
    """Whether weights, norms and a chunk of so many rows are what the kernels are made for."""
    plain = not isinstance(w.qkv, Scaled) and isinstance(mods, Stacked)
    sizes = (c.width, c.num_heads * c.head_dim, c.mlp_dim)
    return (
        rows <= ROWS
        and plain
        and not any(size % DEPTH for size in sizes)
        and not (c.head_dim // 2) % min(COLUMNS, c.head_dim // 2)
    )


def layer(
    c: GemmaConfig,
    w: LayerWeights,
    x: Array,
    cos_sin: tuple[Array, Array],
    own: Array,
    prefix: Segment,
    mods: Stacked,
    index: int,
    interpret: bool | None = None,
) -> Array:
    """`gemma.layer` of the expert over a prefix, without logits and keys.

    Args:
      c, w: sizes and weights, as far as `supports` says yes.
      x: [B, ROWS, W] in the activation dtype.
      cos_sin: rotation of these rows, [B, ROWS, 1, H/2] each.
      own: [ROWS, ROWS] int32, which of the own rows a row sees; every row at least one.
      prefix: at least `KEYS` keys and values, mask [B, 1, S] bool.
      mods: of all layers, values [L, 2, 3, W].
      index: of this layer.
      interpret: run without compiling; None: on a CPU only.

    Returns:
      [B, ROWS, W].
    """
    how = {"compiler_params": TRITON, "interpret": run_interpreted(interpret)}
    B, _, W = x.shape
    rows = x.reshape(B * ROWS, W)
    mod = partial(norm_row, mods.values, index)
    qkv = project(c, w.qkv, rows, cos_sin, mod, how).reshape(B, ROWS, -1, c.head_dim)
    rows = _residual(_attend(c, qkv, own, prefix, how), w.out, rows, mods.values, (index, 0), how)
    gated = _gated(w.gate_up, rows, mod, how).reshape(B, 1, ROWS, -1)
    rows = _residual((gated,), w.down, rows, mods.values, (index, 1), how)
    return rows.reshape(B, ROWS, W)


def norm_row(values: Array, layer: int, which: int, part: int) -> tuple[Array, pl.BlockSpec]:
    """A row of the norms, read where it lies: 1 + scale (part 0), shift (1) or gate (2) of one of the two norms."""
    return values, pl.BlockSpec((None, None, None, values.shape[-1]), lambda i, j: (layer, which, part, 0))


def _whole(width: int) -> pl.BlockSpec:
    return pl.BlockSpec((ROWS, width), lambda i, j: (i, 0))


def inverse_rms(x_ref: Ref) -> Array:
    """1 / root mean square of every row [ROWS]."""
    width = x_ref.shape[1]

    def block(i: Array, total: Array) -> Array:
        f = x_ref[:, pl.ds(i * DEPTH, DEPTH)].astype(jnp.float32)
        return total + (f * f).sum(axis=1)

    return lax.rsqrt(lax.fori_loop(0, width // DEPTH, block, jnp.zeros(ROWS, jnp.float32)) / width + 1e-6)


def _products(x_ref: Ref, gain_ref: Ref, shift_ref: Ref, w_ref: Ref) -> tuple[Array, Array]:
    """The normalised rows times both halves of w [W, 2, C], in float32."""
    inverse = inverse_rms(x_ref)[:, None]

    def block(i: Array, carry: tuple) -> tuple:
        at = pl.ds(i * DEPTH, DEPTH)
        f = x_ref[:, at].astype(jnp.float32) * inverse * gain_ref[at][None, :] + shift_ref[at][None, :]
        times = lambda half: jnp.dot(f.astype(x_ref.dtype), w_ref[at, half, :], preferred_element_type=jnp.float32)
        return carry[0] + times(0), carry[1] + times(1)

    zero = jnp.zeros((ROWS, w_ref.shape[2]), jnp.float32)
    return lax.fori_loop(0, x_ref.shape[1] // DEPTH, block, (zero, zero))


# --- norm, product, rotation --------------------------------------------------------------------------------


def _qkv_kernel(
    x_ref: Ref,
    gain_ref: Ref,
    shift_ref: Ref,
    w_ref: Ref,
    cos_ref: Ref,
    sin_ref: Ref,
    out_ref: Ref,
    *,
    blocks: int,
    queries: int,
    turned: int,
) -> None:
    dtype = out_ref.dtype
    head = pl.program_id(1) // blocks
    # openpi rounds the product before it rotates
    a, b = (y.astype(dtype).astype(jnp.float32) for y in _products(x_ref, gain_ref, shift_ref, w_ref))
    turns = (head < turned).astype(jnp.float32)  # values are not rotated: cos 1, sin 0
    cos, sin = turns * cos_ref[...] + (1.0 - turns), turns * sin_ref[...]
    scale = 1.0 - (head < queries).astype(jnp.float32) * (1.0 - (2 * blocks * a.shape[1]) ** -0.5)
    for half, y in enumerate((a * cos - b * sin, b * cos + a * sin)):
        out_ref[:, half, :] = (y.astype(dtype).astype(jnp.float32) * scale).astype(dtype)


def project(
    c: GemmaConfig,
    w: Array,
    rows: Array,
    cos_sin: tuple[Array, Array],
    mod: partial,
    how: dict,
    heads: int | None = None,
) -> Array:
    """[B·ROWS, (N+2K)·H]: q rotated and scaled, k rotated, v; or only the first of these heads."""
    W, half, every = rows.shape[1], c.head_dim // 2, c.num_heads + 2 * c.num_kv_heads
    heads = every if heads is None else heads
    columns = min(COLUMNS, half)
    blocks = half // columns
    place = lambda i, j: (j // blocks, 0, j % blocks)
    angles = pl.BlockSpec((ROWS, columns), lambda i, j: (i, j % blocks))
    (gain, gain_at), (shift, shift_at) = mod(0, 0), mod(0, 1)
    program = partial(_qkv_kernel, blocks=blocks, queries=c.num_heads, turned=c.num_heads + c.num_kv_heads)
    out = pl.pallas_call(
        program,
        grid=(rows.shape[0] // ROWS, heads * blocks),
        in_specs=[
            _whole(W),
            gain_at,
            shift_at,
            pl.BlockSpec((W, None, 2, columns), lambda i, j: (0, *place(i, j))),
            angles,
            angles,
        ],
        out_specs=pl.BlockSpec((ROWS, None, 2, columns), lambda i, j: (i, *place(i, j))),
        out_shape=jax.ShapeDtypeStruct((rows.shape[0], heads, 2, half), rows.dtype),
        **how,
    )(rows, gain, shift, w.reshape(W, every, 2, half), *(a.reshape(-1, half) for a in cos_sin))
    return out.reshape(rows.shape[0], -1)


# --- attention ----------------------------------------------------------------------------------------------


def _attend_kernel(
    q_ref: Ref,
    k_ref: Ref,
    v_ref: Ref,
    seen_ref: Ref,
    own_k_ref: Ref,
    own_v_ref: Ref,
    own_ref: Ref,
    *out: Ref,
    blocks: int,
) -> None:
    q, keys = q_ref[...], k_ref.shape[0]
    first = pl.program_id(2) * blocks

    def block(i: Array) -> tuple:
        begin = (first + i) * KEYS
        # the last block reaches back over the one before it, whose keys have been seen
        back = jnp.minimum(begin, keys - KEYS)
        at, new = pl.ds(back, KEYS), back + jnp.arange(KEYS) >= begin
        return k_ref[at, :], v_ref[at, :], (seen_ref[at] & new)[None, :]

    carry = softmax_pass(q, blocks, block)
    last = pl.program_id(2) == pl.num_programs(2) - 1  # the chunk's own keys are seen once
    sum_, top, total = online(q, own_k_ref[...], own_v_ref[...], (own_ref[...] != 0) & last, carry)
    out[0][...] = (sum_ / total[:, None]).astype(out[0].dtype)
    if len(out) > 1:
        out[1][...] = top + jnp.log(total)


def _attend(c: GemmaConfig, qkv: Array, own: Array, prefix: Segment, how: dict) -> tuple[Array, ...]:
    """Attention of qkv [B, ROWS, N+2K, H] over the prefix and itself, in parts.

    Every part [B, parts, ROWS, N·H] is a mean over its keys. If there are several, the second array [B, parts, ROWS, N]
    is the logarithm of what these keys weigh together.
    """
    B, H, N, K = qkv.shape[0], c.head_dim, c.num_heads, c.num_kv_heads
    S, group = prefix.k.shape[1], c.num_heads // c.num_kv_heads
    parts = max(1, (S + SPLIT // 2) // SPLIT)
    blocks = -(-S // (parts * KEYS))
    of = lambda head: pl.BlockSpec((None, ROWS, None, H), lambda b, n, p: (b, 0, head(n), 0))
    there = pl.BlockSpec((None, S, None, H), lambda b, n, p: (b, 0, n // group, 0))
    out_shape = [jax.ShapeDtypeStruct((B, parts, ROWS, N, H), qkv.dtype)]
    out_specs = [pl.BlockSpec((None, None, ROWS, None, H), lambda b, n, p: (b, p, 0, n, 0))]
    if parts > 1:
        out_shape.append(jax.ShapeDtypeStruct((B, parts, ROWS, N), jnp.float32))
        out_specs.append(pl.BlockSpec((None, None, ROWS, None), lambda b, n, p: (b, p, 0, n)))
    out, *logs = pl.pallas_call(
        partial(_attend_kernel, blocks=blocks),
        grid=(B, N, parts),
        in_specs=[
            of(lambda n: n),
            there,
            there,
            pl.BlockSpec((None, S), lambda b, n, p: (b, 0)),
            of(lambda n: N + n // group),
            of(lambda n: N + K + n // group),
            pl.BlockSpec((ROWS, ROWS), lambda b, n, p: (0, 0)),
        ],
        out_specs=out_specs,
        out_shape=out_shape,
        **how,
    )(qkv, prefix.k, prefix.v, prefix.mask[:, 0], qkv, qkv, own)
    return out.reshape(B, parts, ROWS, N * H), *logs


# --- products with a residual, gated MLP --------------------------------------------------------------------


def _joined(y_ref: Ref, log_ref: Ref, i: Array) -> Array:
    """Columns of block i of an attention [parts, ROWS, N·H]: a mean of the parts, by what their keys weigh together."""
    parts, _, heads = log_ref.shape
    column = i * DEPTH + jnp.arange(DEPTH)
    row, head = jnp.arange(ROWS)[:, None], (column // (y_ref.shape[2] // heads))[None, :]
    logs = [log_ref[p, row, head] for p in range(parts)]
    top = functools.reduce(jnp.maximum, logs)
    weights = [jnp.exp(log - top) for log in logs]
    rows = [w * y_ref[p, :, pl.ds(i * DEPTH, DEPTH)].astype(jnp.float32) for p, w in enumerate(weights)]
    return (sum(rows) / sum(weights)).astype(y_ref.dtype)


def _residual_kernel(y_ref: Ref, *rest: Ref) -> None:
    *logs, w_ref, x_ref, gate_ref, out_ref = rest

    def block(i: Array, total: Array) -> Array:
        at = pl.ds(i * DEPTH, DEPTH)
        y = _joined(y_ref, logs[0], i) if logs else y_ref[0, :, at]
        return total + jnp.dot(y, w_ref[at, :], preferred_element_type=jnp.float32)

    total = lax.fori_loop(0, w_ref.shape[0] // DEPTH, block, jnp.zeros(out_ref.shape, jnp.float32))
    dtype = out_ref.dtype
    gated = (gate_ref[...][None, :] * total.astype(dtype).astype(jnp.float32)).astype(dtype)
    out_ref[...] = x_ref[...] + gated


def _residual(y: tuple[Array, ...], w: Array, rows: Array, mods: Array, norm: tuple[int, int], how: dict) -> Array:
    """rows + gate · (y @ w) [B·ROWS, W]; y as `_attend` leaves it, the gate that of one of a layer's two norms."""
    depth, W = w.shape
    columns = min(COLUMNS, W)
    block = pl.BlockSpec((ROWS, columns), lambda i, j: (i, j))
    return pl.pallas_call(
        _residual_kernel,
        grid=(rows.shape[0] // ROWS, W // columns),
        in_specs=[
            *(pl.BlockSpec((None, *part.shape[1:]), lambda i, j: (i, 0, 0, 0)) for part in y),
            pl.BlockSpec((depth, columns), lambda i, j: (0, j)),
            block,
            pl.BlockSpec((None, None, None, columns), lambda i, j: (*norm, 2, j)),
        ],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct(rows.shape, rows.dtype),
        **how,
    )(*y, w, rows, mods)


def _gated_kernel(x_ref: Ref, gain_ref: Ref, shift_ref: Ref, w_ref: Ref, out_ref: Ref) -> None:
    dtype = out_ref.dtype
    gate, up = (y.astype(dtype).astype(jnp.float32) for y in _products(x_ref, gain_ref, shift_ref, w_ref))
    out_ref[...] = (gelu(gate).astype(dtype).astype(jnp.float32) * up).astype(dtype)


def _gated(w: Array, rows: Array, mod: partial, how: dict) -> Array:
    """gelu(norm(rows) @ gate) · (norm(rows) @ up) [B·ROWS, F]."""
    W, F = w.shape[0], w.shape[1] // 2
    columns = min(2 * COLUMNS, F)
    (gain, gain_at), (shift, shift_at) = mod(1, 0), mod(1, 1)
    return pl.pallas_call(
        _gated_kernel,
        grid=(rows.shape[0] // ROWS, F // columns),
        in_specs=[_whole(W), gain_at, shift_at, pl.BlockSpec((W, 2, columns), lambda i, j: (0, 0, j))],
        out_specs=pl.BlockSpec((ROWS, columns), lambda i, j: (i, j)),
        out_shape=jax.ShapeDtypeStruct((rows.shape[0], F), rows.dtype),
        **how,
    )(rows, gain, shift, w.reshape(W, 2, F))
