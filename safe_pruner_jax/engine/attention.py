"""What a full pass attends to, for whoever asks: a program beside those of the control step, which it leaves alone."""

import jax
import jax.numpy as jnp

from safe_pruner_jax.arrays import Array
from safe_pruner_jax.engine.programs import draw_noise, embed
from safe_pruner_jax.engine.state import Inputs, visual_slots
from safe_pruner_jax.model import pi0
from safe_pruner_jax.model.config import Pi0Config
from safe_pruner_jax.tokens import saliency

ROWS = ("action", "text")
"""Whose attention there is: of the expert's action tokens, of the prompt."""


def layers_of(config: Pi0Config, of: str) -> int:
    """Layers that have such attention: of the last prefix layer only keys and values are computed."""
    return config.depth if of == "action" else config.depth - 1


def attention(
    config: Pi0Config, of: str, weights: pi0.Weights, inputs: Inputs, key: Array, noise: Array | None
) -> Array:
    """Attention to every visual token in every layer, of one step in which nothing is pruned.

    Args:
      config, of: static; `of` is one of `ROWS`.
      weights: prepared weights.
      inputs: of one robot, leading axis 1.
      key: PRNG key of the control state before the step; the noise is that of the step itself.
      noise: [1, A, action_dim] float32 that was given instead, or None.

    Returns:
      float32 [layers, n], the model's own probabilities over all keys: mean over heads and query rows, for "action"
      also over the second half of the denoise steps (as SAFE-Pruner's late saliency). A row sums to the share of
      attention that goes to pictures at all.
    """
    embedded, n = embed(weights, config, inputs), visual_slots(config, inputs)
    queried = tuple(range(layers_of(config, of)))
    _, segments, logits = pi0.prefix_layers(
        weights, config, embedded, range(config.depth), queried if of == "text" else ()
    )
    alive = embedded.mask[:, :n]
    if of == "text":
        rows = inputs.token_mask[0]
        return jnp.stack([saliency(logits[l][0, :, n:], rows, alive[0], over="all") for l in queried])
    if noise is None:
        noise = draw_noise(config, jax.random.split(key)[1])[None]
    prefix = pi0.Prefix(segments, embedded.count)
    _, late = pi0.sample(
        weights,
        config,
        prefix,
        inputs.state,
        noise,
        visual_alive=alive,
        late_layers=queried,
        late_over="all",
    )
    assert late is not None, "late layers were asked for"
    return late[0]
