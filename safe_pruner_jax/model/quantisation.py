"""8-bit weights for the language model and the action expert: a named choice, never the default.

    weights = reduce(weights, "int8")          every matrix of the Gemma layers → `arrays.Scaled`

Each column c of a matrix is stored as round(w_c / s_c) with s_c = max|w_c| / q_max: symmetric, no calibration data.
Activations stay in their dtype, so what is saved is memory and its traffic, not arithmetic: it pays where a step is
bound by reading weights, as the denoise loop is. The vision tower, the embedding table and the norms stay as they are.
"""

import logging
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from safe_pruner_jax.arrays import Array
from safe_pruner_jax.model.gemma import LayerWeights
from safe_pruner_jax.model.matrix import Scaled, Upright, dense
from safe_pruner_jax.model.pi0 import Weights

logger = logging.getLogger(__name__)

EightBit = Literal["int8", "fp8"]

STORED = {"int8": (jnp.int8, 127.0), "fp8": (jnp.float8_e4m3fn, 448.0)}
"""Name → stored dtype and its largest magnitude."""


def scaled(w: Array | Upright, to: EightBit) -> Scaled:
    """A matrix [D, E] in 8 bits; a column of zeros keeps a scale of 1."""
    w = w.values.T if isinstance(w, Upright) else w
    dtype, largest = STORED[to]
    w = w.astype(jnp.float32)
    top = jnp.abs(w).max(axis=0)
    scale = jnp.where(top > 0, top / largest, 1.0)
    values = w / scale[None]
    return Scaled((jnp.round(values) if to == "int8" else values).astype(dtype), scale)


def reduce(weights: Weights, to: EightBit) -> Weights:
    """The same weights with every matrix of the language model and the expert in 8 bits.

    Layer by layer, so that beside both copies only one layer more is in memory.

    Args:
      weights: from `pi0.prepare`.
      to: "int8", or "fp8" (float8_e4m3fn).

    Raises:
      ValueError: another name, or weights that are in 8 bits already.
    """
    if to not in STORED:
        raise ValueError(f"quantise: expected one of {', '.join(STORED)}, got {to!r}")
    if isinstance(weights.prefix[0].qkv, Scaled):
        raise ValueError("quantise: expected weights of full precision, got 8 bits; load the checkpoint again")
    matrix = jax.jit(partial(scaled, to=to))

    def layer(w: LayerWeights) -> LayerWeights:
        names = ("qkv", "out", "gate_up", "down")
        return w.replace(**{name: jax.block_until_ready(matrix(getattr(w, name))) for name in names})

    return weights.replace(prefix=tuple(map(layer, weights.prefix)), expert=tuple(map(layer, weights.expert)))


def usable(to: EightBit, dtype: str) -> EightBit | None:
    """The choice that this device can run: `to`, else int8, else None; says so in the log where it is another.

    Args:
      to: what was asked for.
      dtype: of the activations.
    """
    for choice in dict.fromkeys((to, "int8")):
        try:
            w = jax.jit(partial(scaled, to=choice))(jnp.eye(32))
            jax.block_until_ready(jax.jit(dense)(jnp.ones((8, 32), dtype), w))
        except Exception as error:  # whatever the compiler of a device calls it
            kind = jax.devices()[0].device_kind
            logger.warning("%s weights: %s cannot run them (%s)", choice, kind, str(error).splitlines()[0])
        else:
            if choice != to:
                logger.warning("%s weights are used instead of %s", choice, to)
            return choice
    logger.warning("weights stay in %s", dtype)
    return None
