"""Matrices of the network: plain, in 8 bits, or stored the other way round, and the product used everywhere."""

import jax.numpy as jnp
from flax import struct

from safe_pruner_jax.arrays import Array, beside


@struct.dataclass
class Scaled:
    """A matrix [D, E] in 8 bits: `values` int8 or float8_e4m3fn, times `scale` [E] float32 column by column."""

    values: Array
    scale: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """[D, E]."""
        return self.values.shape

    @property
    def dtype(self) -> jnp.dtype:
        """Of the stored values."""
        return self.values.dtype


@struct.dataclass
class Upright:
    """A matrix [D, E] stored the other way round, as `values` [E, D]."""

    values: Array


Matrix = Array | Scaled


def dense(x: Array, w: Matrix) -> Array:
    """x [..., D] times w [D, E], as one product of two matrices, in x's dtype.

    The same numbers as `x @ w`; XLA's CPU backend differentiates a product with several leading axes 3 times slower.
    An 8-bit matrix is widened to x's dtype on its way into the product, which accumulates in float32; the columns are
    scaled behind it.
    """
    rows = x.reshape(-1, x.shape[-1])
    if isinstance(w, Scaled):
        y = jnp.matmul(rows, w.values.astype(x.dtype), preferred_element_type=jnp.float32)
        y = (y * beside(w.scale, y)).astype(x.dtype)
    else:
        y = rows @ w
    return y.reshape(*x.shape[:-1], w.shape[-1])


def columns(w: Matrix, start: int) -> Matrix:
    """The columns of a matrix from `start` on."""
    return Scaled(w.values[:, start:], w.scale[start:]) if isinstance(w, Scaled) else w[:, start:]
