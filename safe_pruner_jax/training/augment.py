"""openpi's image augmentations, on the device: a crop and a small turn for outside cameras, colours for all."""

import jax
import jax.numpy as jnp

from safe_pruner_jax.arrays import Array

CROP = 0.95
"""Side of the random crop, as a share of the image's."""
ANGLE = 5.0
"""Largest rotation, degrees."""
BRIGHTNESS, CONTRAST, SATURATION = 0.3, 0.4, 0.5
"""Half widths of the colour factors around 1."""


def augment(key: Array, images: Array, *, moving: tuple[bool, ...]) -> Array:
    """Random views of a batch.

    Args:
      key: PRNG key.
      images: [B, C, S, S, 3] uint8.
      moving: per camera, whether it moves with the robot (a wrist camera); those keep their geometry, as in openpi.

    Returns:
      [B, C, S, S, 3] float32 in [-1, 1].
    """
    B, C = images.shape[:2]
    keys = jax.random.split(key, (B, C))
    x = images.astype(jnp.float32) / 255.0
    views = []
    for camera in range(C):
        view = x[:, camera]
        if not moving[camera]:
            view = jax.vmap(_crop_and_turn)(keys[:, camera], view)
        views.append(jax.vmap(_colour)(keys[:, camera], view))
    return jnp.stack(views, axis=1) * 2.0 - 1.0


def _crop_and_turn(key: Array, image: Array) -> Array:
    """One bilinear look-up for both: output pixel → rotated, scaled by `CROP`, shifted; outside is the border."""
    size = image.shape[0]
    shift, turn = jax.random.split(key)
    centre = (size - 1) / 2
    offset = jax.random.uniform(shift, (2, 1, 1), minval=-1.0, maxval=1.0) * (1 - CROP) * size / 2
    angle = jnp.deg2rad(jax.random.uniform(turn, (), minval=-ANGLE, maxval=ANGLE))
    row, column = jnp.meshgrid(jnp.arange(size) - centre, jnp.arange(size) - centre, indexing="ij")
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    at = jnp.stack([cos * row - sin * column, sin * row + cos * column]) * CROP + centre + offset
    look = lambda channel: jax.scipy.ndimage.map_coordinates(channel, list(at), order=1, mode="nearest")
    return jax.vmap(look, in_axes=2, out_axes=2)(image)


def _colour(key: Array, image: Array) -> Array:
    """Brightness, contrast and saturation factors around 1, in this order; image [S, S, 3] in [0, 1]."""
    factor = lambda k, width: jax.random.uniform(k, (), minval=1 - width, maxval=1 + width)
    brightness, contrast, saturation = jax.random.split(jax.random.fold_in(key, 1), 3)
    image = jnp.clip(image * factor(brightness, BRIGHTNESS), 0, 1)
    mean = _grey(image).mean()
    image = jnp.clip(mean + (image - mean) * factor(contrast, CONTRAST), 0, 1)
    grey = _grey(image)[..., None]
    return jnp.clip(grey + (image - grey) * factor(saturation, SATURATION), 0, 1)


def _grey(image: Array) -> Array:
    return image @ jnp.array([0.299, 0.587, 0.114])
