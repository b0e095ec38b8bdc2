"""Flow matching: the loss that trains a π0 or π0.5, and the flow times it is drawn at.

prefix() once per observation, flow_loss() for any number of times and noises; waypoint_loss() is optional.
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
        v, _ = pi0.velocity(prefix.weights, config, prefix, state, x_t, at)
        return jnp.square(v.astype(jnp.float32) - (noise - actions)).mean(-1)

    return jax.vmap(draw, in_axes=1, out_axes=1)(times, noise)


def waypoint_loss(head: Params, prefix: Prefix, token_mask: Array, waypoints: Array) -> Array:
    """Squared error [B] of waypoints read linearly from the values of the prompt's tokens in all layers.

    An auxiliary loss: what the expert attends to has to say where things are. Not openpi's; π0.5 itself was trained to
    locate objects beside acting, on data that demonstrations do not have.

    Args:
      head: "kernel" [L·K·H, W] and "bias" [W].
      prefix: with the prompt's slots last.
      token_mask: [B, T] bool.
      waypoints: [B, W] float32.
    """
    share = token_mask / token_mask.sum(1, keepdims=True)
    mean = lambda v: jnp.einsum("bt,btkh->bkh", share, v[:, -token_mask.shape[1] :].astype(jnp.float32))
    read = jnp.concatenate([mean(s.v).reshape(len(waypoints), -1) for s in prefix.segments], axis=1)
    return jnp.square(read @ head["kernel"] + head["bias"] - waypoints).mean(-1)


def draw_times(key: Array, shape: tuple[int, ...]) -> Array:
    """Flow times of training: Beta(1.5, 1)·0.999 + 0.001, by inversion (the distribution function is t^1.5)."""
    return jax.random.uniform(key, shape) ** (1 / 1.5) * 0.999 + 0.001
