"""Flow matching: the loss that trains a π0 or π0.5, and the flow times it is drawn at.

prefix() once per observation, flow_loss() for any number of times and noises.
"""

import jax
import jax.numpy as jnp
from flax import struct

from safe_pruner_jax.arrays import Array
from safe_pruner_jax.model import pi0
from safe_pruner_jax.model.config import Pi0Config
from safe_pruner_jax.model.params import Params


@struct.dataclass
class Prefix(pi0.Prefix):
    """What the expert reads of an observation, and the weights it reads it with.

    Args:
      weights: the model, prepared.
    """

    weights: pi0.Weights


def prefix(
    params: Params, config: Pi0Config, images: Array, camera_mask: Array, tokens: Array, token_mask: Array
) -> Prefix:
    """The prefix of observations, in every layer; differentiable.

    Args:
      params: openpi's parameter tree.
      config: sizes.
      images: [B, C, S, S, 3] uint8, or float32 in [-1, 1] after augmentation.
      camera_mask, tokens, token_mask: as in `pi0.embed_prefix`.
    """
    weights = pi0.prepare(params, config)
    rows = pi0.embed_prefix(weights, config, images, camera_mask, tokens, token_mask)
    _, segments, _ = pi0.prefix_layers(weights, config, rows, range(config.depth))
    return Prefix(segments, rows.count, weights)


def flow_loss(
    params: Params, config: Pi0Config, prefix: Prefix, state: Array, actions: Array, times: Array, noise: Array
) -> Array:
    """Flow-matching loss per observation and draw, as openpi trains: ‖v(x_t, t) - (noise - actions)‖² / action_dim.

    The prefix does not depend on time or noise, so one prefix pass serves several draws of the expert.

    Args:
      params, config: the model.
      prefix: of the same parameters.
      state: [B, action_dim] float32 (only π0 reads it).
      actions: [B, A, action_dim] float32, normalised and zero-padded.
      times: [B, draws] float32 in (0, 1], see `draw_times`.
      noise: [B, draws, A, action_dim] float32, standard normal.

    Returns:
      [B, draws, A] float32: mean square over action_dim.
    """

    def draw(t: Array, noise: Array) -> Array:
        at = jax.tree.map(lambda a: a[:, None], pi0.schedule(params, config, t))
        mix = t[:, None, None]
        x_t = mix * noise + (1 - mix) * actions
        v, *_ = pi0.velocity(prefix.weights, config, prefix, state, x_t, at)
        return jnp.square(v.astype(jnp.float32) - (noise - actions)).mean(-1)

    return jax.vmap(draw, in_axes=1, out_axes=1)(times, noise)


def draw_times(key: Array, shape: tuple[int, ...]) -> Array:
    """Flow times of training: Beta(1.5, 1)·0.999 + 0.001, by inversion (the distribution function is t^1.5)."""
    return jax.random.uniform(key, shape) ** (1 / 1.5) * 0.999 + 0.001
