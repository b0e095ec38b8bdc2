"""Axis letters and array aliases used everywhere.

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

Array = jax.Array


def beside(v: Array, x: Array) -> Array:
    """v [..., E] with as many axes as x [..., E] has, for an operation between them.

    jax would do it by itself; done by hand, an operation between shapes that were not meant for one another is an error
    (`jax_numpy_rank_promotion="raise"` in the tests).
    """
    return v.reshape((1,) * (x.ndim - v.ndim) + v.shape)


Layers = tuple[int, ...]
"""Layer indices, 0 is the first layer of the language model (and of the expert)."""
