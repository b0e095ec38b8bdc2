"""Imitation as openpi trains it: flow matching on demonstrations, nothing else.

params, step = imitate(config, samples, params, Settings(...), out)
"""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from safe_pruner_jax.arrays import Array
from safe_pruner_jax.model import flow
from safe_pruner_jax.model.config import Pi0Config
from safe_pruner_jax.model.params import Params
from safe_pruner_jax.training.augment import augment
from safe_pruner_jax.training.data import Samples, batches, split
from safe_pruner_jax.training.loop import Objective, Settings, fit


@struct.dataclass
class Batch:
    """Samples of one step, leading axis B; see `data.Samples`."""

    images: Array
    state: Array
    actions: Array
    tokens: Array
    token_mask: Array


def losses_of(
    params: Params, config: Pi0Config, batch: Batch, key: Array, draws: int, augmented: bool
) -> dict[str, Array]:
    """Mean flow-matching loss of a batch, {"loss": float32 scalar}.

    Every draw of augmentation, time and noise is from `key`.
    """
    B = batch.actions.shape[0]
    images, for_times, for_noise = jax.random.split(key, 3)
    moving = tuple(camera > 0 for camera in range(batch.images.shape[1]))  # outside, then wrists
    x = augment(images, batch.images, moving=moving) if augmented else batch.images
    times = flow.draw_times(for_times, (B, draws))
    noise = jax.random.normal(for_noise, (B, draws, *batch.actions.shape[1:]))
    cameras = jnp.ones(batch.images.shape[:2], bool)
    prefix = flow.prefix(params, config, x, cameras, batch.tokens, batch.token_mask)
    loss = flow.flow_loss(params, config, prefix, batch.state, batch.actions, times=times, noise=noise)
    return {"loss": loss.mean()}


def flow_objective(config: Pi0Config, s: Settings) -> Objective:
    """Flow matching alone, as openpi trains."""
    losses = lambda params, batch, key: losses_of(params, config, batch, key, s.draws, s.augment)
    measures = lambda params, batch, key: losses_of(params, config, batch, key, s.draws, False)
    return Objective(losses, measures, {"loss": 1.0})


def gather(samples: Samples, steps: np.ndarray) -> Batch:
    """The batch of some steps, on the host."""
    prompt = samples.prompt[steps]
    return Batch(
        samples.frames[steps],
        samples.state[steps],
        samples.actions[steps],
        samples.tokens[prompt],
        samples.token_mask[prompt],
    )


@dataclasses.dataclass(frozen=True)
class Demonstrations:
    """Samples as batches: whole shuffled passes; held out are whole demonstrations."""

    samples: Samples
    settings: Settings
    devices: int = 1

    def batches(self, seed: int, start: int) -> Iterator[Batch]:
        """See `Source`."""
        training, _ = split(self.samples, self.settings.validation, self.settings.seed)
        for indices in batches(training, self.settings.batch, seed, start):
            yield gather(self.samples, indices)

    def checks(self) -> list[Batch]:
        """One batch of at most four times the training size."""
        _, held = split(self.samples, self.settings.validation, self.settings.seed)
        size = min(len(held), 4 * self.settings.batch) // self.devices * self.devices or self.devices
        return [gather(self.samples, next(batches(held, size, self.settings.seed + 1)))]


def imitate(
    config: Pi0Config,
    samples: Samples,
    params: Params,
    s: Settings,
    out: Path,
    *,
    on_log: Callable[[dict], None] = lambda row: None,
) -> tuple[Params, int]:
    """`loop.fit` on demonstrations; `config.image_size` must be the samples'."""
    source = Demonstrations(samples, s, len(jax.devices()))
    return fit(flow_objective(config, s), source, params, s, out, on_log=on_log)
