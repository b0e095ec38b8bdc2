"""Axis letters, array aliases and the matrix product used everywhere.

    B  robots in a batch           n  visual token slots of the layout (tokens per camera × cameras)
    C  cameras of the layout       T  prompt slots of the layout
    S  image side, pixels          P  prefix slots, P = n + T: visual tokens first, then the prompt
    d  width of the language model k  token slots kept after the cut
    W  width of the action expert  R  suffix rows: A action tokens (π0: one state token before them)
    L  transformer layers          N  query heads, K  key/value heads, H  head width
    A  action horizon              s  denoise steps

A function documented without B is written for one robot; the engine maps it over robots with `vmap`.
"""

import jax
import jax.numpy as jnp
from flax import struct

Array = jax.Array

Layers = tuple[int, ...]
"""Layer indices, 0 is the first layer of the language model (and of the expert)."""


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
    def dtype(self):
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
        y = (y * w.scale).astype(x.dtype)
    else:
        y = rows @ w
    return y.reshape(*x.shape[:-1], w.shape[-1])


def columns(w: Matrix, start: int) -> Matrix:
    """The columns of a matrix from `start` on."""
    return Scaled(w.values[:, start:], w.scale[start:]) if isinstance(w, Scaled) else w[:, start:]
