"""Attention of the vision tower in one launch; XLA makes eight of it.

    attend(qkv)        [I, S, 3, N, H] as the product leaves it → [I, S, N, H]

XLA's products want the heads in front: it turns q, k and v, cuts them apart, multiplies, takes the softmax, multiplies,
and turns the result back. Here a block reads the rows of one head where they lie. Logits and sums are in float32.

The same conditions as for the other kernels (`kernels`): no derivative, measured before it is used.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from safe_pruner_jax.arrays import Array
from safe_pruner_jax.model.config import Pi0Config
from safe_pruner_jax.model.kernels import TRITON, Ref, load, run_interpreted, softmax_pass, store

TOKENS = 64
"""Queries of a block, and keys that it reads at a time; fewer where an image has fewer."""

LEAST = 16
"""Least tokens of an image: what a tensor core multiplies."""


def supports(config: Pi0Config) -> bool:
    """Whether images have a number of tokens that blocks divide."""
    tokens = config.tokens_per_camera
    return tokens % min(TOKENS, tokens) == 0 and tokens >= LEAST and min(TOKENS, tokens).bit_count() == 1


def _attend_kernel(q_ref: Ref, k_ref: Ref, v_ref: Ref, out_ref: Ref, *, width: int, keys: int) -> None:
    columns = jnp.arange(out_ref.shape[1])[None, :] < width  # a block is as wide as the next power of two
    rows = pl.ds(0, out_ref.shape[0])
    q = load(q_ref, (rows, slice(None)), columns)
    # openpi rounds √head_dim to the activation dtype before dividing
    q = (q.astype(jnp.float32) / float(np.sqrt(width).astype(q.dtype))).astype(q.dtype)

    def block(i: Array) -> tuple:
        at = (pl.ds(i * keys, keys), slice(None))
        return load(k_ref, at, columns), load(v_ref, at, columns), None

    out, _, total = softmax_pass(q, k_ref.shape[0] // keys, block)
    store(out_ref, (rows, slice(None)), (out / total[:, None]).astype(out_ref.dtype), columns)


def attend(qkv: Array, interpret: bool | None = None) -> Array:
    """Attention of every token to all of its image.

    Args:
      qkv: [I, S, 3, N, H] in the activation dtype; S as `supports` wants it.
      interpret: run without compiling; None: on a CPU only.

    Returns:
      [I, S, N, H].
    """
    I, S, _, N, H = qkv.shape
    wide, block = 1 << (H - 1).bit_length(), min(TOKENS, S)
    part = lambda which: pl.BlockSpec((None, S, None, None, wide), lambda i, n, j: (i, 0, which, n, 0))
    return pl.pallas_call(
        partial(_attend_kernel, width=H, keys=block),
        grid=(I, N, S // block),
        in_specs=[pl.BlockSpec((None, block, None, None, wide), lambda i, n, j: (i, j, 0, n, 0)), part(1), part(2)],
        out_specs=pl.BlockSpec((None, block, None, wide), lambda i, n, j: (i, j, n, 0)),
        out_shape=jax.ShapeDtypeStruct((I, S, N, H), qkv.dtype),
        compiler_params=TRITON,
        interpret=run_interpreted(interpret),
    )(qkv, qkv, qkv)
