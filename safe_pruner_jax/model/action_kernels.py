"""Kernels beside the expert's layers (`expert_kernels`): actions become rows, rows an Euler step, and what actions see.

    enter      actions · matrix + offset, as rows padded to `ROWS`
    leave      final norm, product, Euler step
    saliency   norm, queries and their rotation; mean of the softmax over the visual keys; mean of the heads by XLA

They belong to the kernel `layer`, and its conditions hold: no derivative, measured before they are used.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from safe_pruner_jax.arrays import Array
from safe_pruner_jax.model.config import GemmaConfig
from safe_pruner_jax.model.expert_kernels import DEPTH, inverse_rms, norm_row, project
from safe_pruner_jax.model.gemma import Stacked
from safe_pruner_jax.model.kernels import KEYS, LOW, ROWS, TRITON, Ref, load, run_interpreted, store


def takes(actions: int) -> bool:
    """Whether `enter` and `leave` take actions of so many numbers: what a tensor core multiplies."""
    return actions >= ROWS and actions.bit_count() == 1


# --- actions to rows and back -------------------------------------------------------------------------------


def _enter_kernel(x_ref: Ref, w_ref: Ref, b_ref: Ref, out_ref: Ref, *, rows: int) -> None:
    there = jnp.arange(ROWS)[:, None] < rows
    x = load(x_ref, (pl.ds(0, ROWS), slice(None)), there)
    y = jnp.dot(x, w_ref[...].astype(jnp.float32), precision=lax.Precision.HIGHEST)
    out_ref[...] = (y + b_ref[...].astype(jnp.float32)[None, :]).astype(out_ref.dtype)


def enter(x: Array, w: Array, b: Array, dtype: str, interpret: bool | None = None) -> Array:
    """Rows of the expert [B, ROWS, W] for actions x [B, R, D] float32, R ≤ `ROWS`, as `takes` wants D."""
    B, R, D = x.shape
    columns = min(KEYS, w.shape[1])
    return pl.pallas_call(
        partial(_enter_kernel, rows=R),
        grid=(B, w.shape[1] // columns),
        in_specs=[
            pl.BlockSpec((None, ROWS, D), lambda i, j: (i, 0, 0)),
            pl.BlockSpec((D, columns), lambda i, j: (0, j)),
            pl.BlockSpec((columns,), lambda i, j: (j,)),
        ],
        out_specs=pl.BlockSpec((None, ROWS, columns), lambda i, j: (i, 0, j)),
        out_shape=jax.ShapeDtypeStruct((B, ROWS, w.shape[1]), dtype),
        compiler_params=TRITON,
        interpret=run_interpreted(interpret),
    )(x, w, b)


def _leave_kernel(
    h_ref: Ref, gain_ref: Ref, shift_ref: Ref, w_ref: Ref, b_ref: Ref, x_ref: Ref, out_ref: Ref, *, rows: int, by: float
) -> None:
    inverse = inverse_rms(h_ref)[:, None]

    def block(i: Array, total: Array) -> Array:
        at = pl.ds(i * DEPTH, DEPTH)
        f = h_ref[:, at].astype(jnp.float32) * inverse * gain_ref[at][None, :] + shift_ref[at][None, :]
        w = w_ref[at, :].astype(jnp.float32)
        return total + jnp.dot(f.astype(h_ref.dtype).astype(jnp.float32), w, precision=lax.Precision.HIGHEST)

    v = lax.fori_loop(0, h_ref.shape[1] // DEPTH, block, jnp.zeros((ROWS, out_ref.shape[1]), jnp.float32))
    there, at = jnp.arange(ROWS)[:, None] < rows, (pl.ds(0, ROWS), slice(None))
    store(out_ref, at, load(x_ref, at, there) + by * (v + b_ref[...].astype(jnp.float32)[None, :]), there)


def leave(
    h: Array, mods: Stacked, last: int, w: Array, b: Array, x: Array, *, by: float, interpret: bool | None = None
) -> Array:
    """x + by · (norm(h) @ w + b) [B, R, D] float32 for rows h [B, ROWS, W]: an Euler step, if these are the last rows.

    Args:
      h: of the expert, behind its last layer.
      mods: norms, values [L+1, 2, 3, W]; the final one stands behind those of the `last` = L layers.
      w, b: [W, D] and [D].
      x: [B, R, D] float32, where the flow is.
      by: the step.
      interpret: run without compiling; None: on a CPU only.
    """
    B, R, D = x.shape
    W = h.shape[2]
    actions = pl.BlockSpec((None, ROWS, D), lambda i: (i, 0, 0))
    part = lambda which: pl.BlockSpec((None, None, None, W), lambda i: (last, 0, which, 0))
    return pl.pallas_call(
        partial(_leave_kernel, rows=R, by=by),
        grid=(B,),
        in_specs=[
            pl.BlockSpec((None, ROWS, W), lambda i: (i, 0, 0)),
            part(0),
            part(1),
            pl.BlockSpec((W, D), lambda i: (0, 0)),
            pl.BlockSpec((D,), lambda i: (0,)),
            actions,
        ],
        out_specs=actions,
        out_shape=jax.ShapeDtypeStruct(x.shape, jnp.float32),
        input_output_aliases={5: 0},  # else the loop copies x in every step
        compiler_params=TRITON,
        interpret=run_interpreted(interpret),
    )(h, mods.values, mods.values, w, b, x)


# --- what the actions see -----------------------------------------------------------------------------------


def _saliency_kernel(q_ref: Ref, k_ref: Ref, alive_ref: Ref, out_ref: Ref, *, rows: int) -> None:
    q, blocks = q_ref[...], out_ref.shape[0] // KEYS

    def logits(i: Array) -> Array:
        at = pl.ds(i * KEYS, KEYS)
        x = lax.dot_general(q, k_ref[at, :], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        return jnp.where(alive_ref[at][None, :], x, LOW)

    def weigh(i: Array, carry: tuple) -> tuple:
        top, total = carry
        now = jnp.maximum(top, logits(i).max(axis=1))
        return now, total * jnp.exp(top - now) + jnp.exp(logits(i) - now[:, None]).sum(axis=1)

    top, total = lax.fori_loop(0, blocks, weigh, (jnp.full(ROWS, LOW, jnp.float32), jnp.zeros(ROWS, jnp.float32)))
    share = (jnp.arange(ROWS) < rows).astype(jnp.float32) / (total * rows)

    def mean(i: Array, carry: None) -> None:
        out_ref[pl.ds(i * KEYS, KEYS)] = (jnp.exp(logits(i) - top[:, None]) * share[:, None]).sum(axis=0)

    lax.fori_loop(0, blocks, mean, None)


def saliency(
    c: GemmaConfig,
    w: Array,
    x: Array,
    cos_sin: tuple[Array, Array],
    mods: Stacked,
    index: int,
    k: Array,
    alive: Array,
    rows: int,
    interpret: bool | None = None,
) -> Array:
    """`tokens.saliency` over visual keys, of a layer whose input is x: two launches and the mean of the heads.

    Args:
      c, cos_sin, mods, index, interpret: as of `layer`.
      w: the layer's `qkv`, of which queries alone are computed.
      x: [B, ROWS, W] in the activation dtype.
      k: [B, S, K, H] keys of the prefix, of which the first n are visual, n a multiple of `KEYS`.
      alive: [B, n] bool.
      rows: how many of the rows count.

    Returns:
      [B, n] float32; dead tokens have 0.
    """
    how = {"compiler_params": TRITON, "interpret": run_interpreted(interpret)}
    (B, _, W), N, H, n = x.shape, c.num_heads, c.head_dim, alive.shape[1]
    q = project(c, w, x.reshape(B * ROWS, W), cos_sin, partial(norm_row, mods.values, index), how, heads=N)
    s = pl.pallas_call(
        partial(_saliency_kernel, rows=rows),
        grid=(B, N),
        in_specs=[
            pl.BlockSpec((None, ROWS, None, H), lambda b, h: (b, 0, h, 0)),
            pl.BlockSpec((None, k.shape[1], None, H), lambda b, h: (b, 0, h // (N // c.num_kv_heads), 0)),
            pl.BlockSpec((None, n), lambda b, h: (b, 0)),
        ],
        out_specs=pl.BlockSpec((None, None, n), lambda b, h: (b, h, 0)),
        out_shape=jax.ShapeDtypeStruct((B, N, n), jnp.float32),
        **how,
    )(q.reshape(B, ROWS, N, H), k, alive)
    return jnp.where(alive, s.mean(1), 0.0)
