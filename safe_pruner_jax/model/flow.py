"""Flow matching: the loss that trains a π0 or π0.5, and the flow times it is drawn at."""

import jax
import jax.numpy as jnp

from safe_pruner_jax.arrays import Array
from safe_pruner_jax.model import pi0
from safe_pruner_jax.model.config import Pi0Config
from safe_pruner_jax.model.params import Params


def flow_loss(
    params: Params,
    config: Pi0Config,
    images: Array,
    camera_mask: Array,
    tokens: Array,
    token_mask: Array,
    state: Array,
    actions: Array,
    times: Array,
    noise: Array,
) -> Array:
    """Flow-matching loss per observation and draw, as openpi trains: ‖v(x_t, t) - (noise - actions)‖² / action_dim.

    The prefix does not depend on time or noise, so one prefix pass serves several draws of the expert.

    Args:
      params: openpi's parameter tree.
      config: sizes.
      images: [B, C, S, S, 3] uint8, or float32 in [-1, 1] after augmentation.
      camera_mask, tokens, token_mask, state: as in `engine.Inputs`.
      actions: [B, A, action_dim] float32, normalised and zero-padded.
      times: [B, draws] float32 in (0, 1], see `draw_times`.
      noise: [B, draws, A, action_dim] float32, standard normal.

    Returns:
      [B, draws, A] float32: mean square over action_dim.
    """
    weights = pi0.prepare(params, config)
    x = jnp.concatenate([pi0.embed_images(weights, config, images), pi0.embed_prompt(weights, config, tokens)], axis=1)
    mask = jnp.concatenate([jnp.repeat(camera_mask, config.tokens_per_camera, axis=1), token_mask], axis=1)
    _, segments, _ = pi0.prefix_layers(weights, config, x, pi0.positions(mask), mask, range(config.depth))
    alive = mask.sum(1, dtype=jnp.int32)

    def draw(t: Array, noise: Array) -> Array:
        at = jax.tree.map(lambda a: a[:, None], pi0.schedule(params, config, t))
        mix = t[:, None, None]
        x_t = mix * noise + (1 - mix) * actions
        v, _ = pi0.velocity(weights, config, segments, alive, state, x_t, at)
        return jnp.square(v.astype(jnp.float32) - (noise - actions)).mean(-1)

    return jax.vmap(draw, in_axes=1, out_axes=1)(times, noise)


def draw_times(key: Array, shape: tuple[int, ...]) -> Array:
    """Flow times of training: Beta(1.5, 1)·0.999 + 0.001, by inversion (the distribution function is t^1.5)."""
    return jax.random.uniform(key, shape) ** (1 / 1.5) * 0.999 + 0.001
