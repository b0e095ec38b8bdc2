"""Programs that use each kernel, at π0.5's sizes and never run: what a GPU's compiler has to take."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from safe_pruner_jax.model import action_kernels, expert_kernels, gemma, kernels, vision_kernels
from safe_pruner_jax.model.config import GemmaConfig

EXPERT = GemmaConfig(1024, 18, 4096, 8, 1, 256)
ROWS = jax.ShapeDtypeStruct((1, 16, 1024), "bfloat16")


def by_kernel() -> dict[str, list[tuple[Callable, jax.ShapeDtypeStruct]]]:
    """{name of `kernels.NAMES`: programs of one array, and its shape}."""
    bfloat16 = lambda *shape: jax.ShapeDtypeStruct(shape, "bfloat16")
    sizes = {"qkv": (1024, 2560), "out": (2048, 1024), "gate_up": (1024, 8192), "down": (4096, 1024)}
    zeros = lambda *shape: jnp.zeros(shape, "bfloat16")
    made = lambda: gemma.LayerWeights(gain1=None, gain2=None, **{name: zeros(*size) for name, size in sizes.items()})
    norms = lambda: gemma.Stacked(jnp.zeros((19, 2, 3, 1024)))
    angles = lambda: (jnp.zeros((1, 16, 1, 128)),) * 2
    prefix = lambda keys: gemma.Segment(zeros(1, keys, 1, 256), zeros(1, keys, 1, 256), jnp.ones((1, 1, keys), bool))

    def attention(q):
        kv, own = zeros(1, 576, 1, 256), zeros(1, 10, 1, 256)
        seen = jnp.ones((1, 576), bool), jnp.ones((1, 10, 10), bool)
        return kernels.attention(q, kv, kv, seen[0], own, own, seen[1], interpret=False)

    def layer(keys, rows):
        own = jnp.asarray(np.eye(16, dtype=np.int32))
        among = (angles(), own, prefix(keys))
        return expert_kernels.layer(EXPERT, made(), rows, *among, norms(), 0, interpret=False)

    def saliency(rows):
        seen = (prefix(544).k, jnp.ones((1, 512), bool), 10)
        return action_kernels.saliency(EXPERT, made().qkv, rows, angles(), norms(), 0, *seen, interpret=False)

    def enter(x):
        return action_kernels.enter(x, zeros(32, 1024), zeros(1024), "bfloat16", interpret=False)

    def leave(rows):
        out = (zeros(1024, 32), zeros(32), jnp.zeros((1, 10, 32)))
        return action_kernels.leave(rows, norms(), 18, *out, by=-0.1, interpret=False)

    layers = [lambda rows, keys=keys: layer(keys, rows) for keys in (134, 544)]
    return {
        kernels.ATTENTION: [(attention, bfloat16(1, 10, 8, 256))],
        kernels.GATED_MLP: [(lambda x: kernels.gated_mlp(x, zeros(1024, 8192), interpret=False), bfloat16(10, 1024))],
        kernels.LAYER: [
            *((program, ROWS) for program in (*layers, saliency, leave)),
            (enter, jax.ShapeDtypeStruct((1, 10, 32), "float32")),
        ],
        kernels.VISION: [
            (lambda qkv: vision_kernels.attend(qkv, interpret=False), bfloat16(2, 256, 3, 16, 72)),
        ],
    }
