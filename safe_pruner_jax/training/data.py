"""Demonstrations as training samples: every step of every demonstration, with the chunk of actions that follows.

Frames stay uint8 and where they are, in memory or in a file; a batch is an index into them.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from safe_pruner_jax.robots.transform import PolicyConfig
from safe_pruner_jax.robots.transforms import NormStats, Tokenizer, normalise
from safe_pruner_jax.tokens import PROMPT_LENGTHS

CAMERA_KEYS = ("observation/image", "observation/wrist_image")
"""Image entries of a demonstration in slot order: outside camera, wrist camera."""


class Frames:
    """Frames of demonstrations one after the other, [N, C, S, S, 3], which are not copied until they are asked for.

    Args:
      parts: one tuple per demonstration, of its cameras' frames, uint8 [F, S, S, 3] each.
    """

    def __init__(self, parts: Sequence[Sequence[np.ndarray]]):
        self._parts, self._ends = parts, np.cumsum([len(part[0]) for part in parts])
        self.shape = (int(self._ends[-1]), len(parts[0]), *parts[0][0].shape[1:])

    def __getitem__(self, steps: np.ndarray | slice) -> np.ndarray:
        """[…, C, S, S, 3] of step indices […], or of a slice."""
        steps = np.arange(self.shape[0])[steps]
        pictures = np.empty((steps.size, *self.shape[1:]), np.uint8)
        for picture, step in zip(pictures, steps.ravel(), strict=True):
            part = int(np.searchsorted(self._ends, step, side="right"))
            cameras = self._parts[part]
            for camera, frames in enumerate(cameras):
                picture[camera] = frames[step - self._ends[part]]  # from the end of its demonstration
        return pictures.reshape(*steps.shape, *self.shape[1:])


@dataclass(frozen=True)
class Samples:
    """All samples, indexed by step.

    Args:
      frames: [N, C, S, S, 3] uint8, C the cameras of a demonstration, outside first; read by index.
      state: [N, action_dim] float32, normalised, zero-padded.
      actions: [N, A, action_dim] float32, normalised, zero-padded; the last action of a demonstration repeats.
      tokens: [prompts, T] int32, padded with 0.
      token_mask: [prompts, T] bool.
      prompt: [N] int32, row of `tokens`.
      episode: [N] int32, number of the demonstration.
    """

    frames: Frames
    state: np.ndarray
    actions: np.ndarray
    tokens: np.ndarray
    token_mask: np.ndarray
    prompt: np.ndarray
    episode: np.ndarray


def norm_stats(demos: Sequence[Any]) -> dict[str, NormStats]:
    """Mean, standard deviation and the 1 % and 99 % quantiles of states and actions over all steps."""

    def of(values: np.ndarray) -> NormStats:
        values = values.astype(np.float64)
        low, high = np.quantile(values, [0.01, 0.99], axis=0)
        # a value that hardly moves (a gripper command at its stop) must not be blown up
        flat = high - low < 1e-3
        return NormStats(values.mean(0), values.std(0), np.where(flat, low - 1, low), np.where(flat, high + 1, high))

    state, actions = (np.concatenate([getattr(d, name) for d in demos]) for name in ("state", "actions"))
    return {"state": of(state), "actions": of(actions)}


def openpi_stats(demos: Sequence[Any], config: PolicyConfig) -> dict[str, NormStats]:
    """Statistics as openpi's `compute_norm_stats.py` has them: of what the network sees and of the chunks it learns.

    Actions count as often as they are in a chunk, relative to the state at its begin where the configuration has them
    so. Quantiles are the lower edges of 5000 bins between the extremes.

    Deviations: openpi goes batch by batch, and widens its bins when a batch has a new extreme, which moves a quantile
    by up to a bin; the last batch, which it drops when it is not full, counts here.
    """
    states = lambda: (demo.state[:: demo.every].astype(np.float64) for demo in demos)
    chunks = lambda: (chunks_of(demo, config).reshape(-1, np.shape(demo.actions)[-1]) for demo in demos)
    return {"state": _binned(states), "actions": _binned(chunks)}


_BINS = 5000


def _binned(parts: Callable[[], Iterable[np.ndarray]]) -> NormStats:
    """Statistics of [N, d], which comes in parts, twice: once for the extremes, once for what lies between."""
    count, total, squares, least, most = 0, 0.0, 0.0, np.inf, -np.inf
    for rows in parts():
        count, total, squares = count + len(rows), total + rows.sum(0), squares + np.square(rows).sum(0)
        least, most = np.minimum(least, rows.min(0)), np.maximum(most, rows.max(0))
    mean = np.asarray(total) / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0))
    edges = np.linspace(least - 1e-10, most + 1e-10, _BINS + 1).T
    counts = np.zeros((len(edges), _BINS), np.int64)
    for rows in parts():
        for own, column, bins in zip(counts, rows.T, edges, strict=True):
            own += np.histogram(column, bins)[0]
    places = np.argmax(counts.cumsum(1)[None] >= np.array([0.01, 0.99])[:, None, None] * count, axis=-1)
    low, high = np.take_along_axis(edges, places.T, axis=1).T
    return NormStats(mean, std, low, high)


def chunks_of(demo: Any, config: PolicyConfig) -> np.ndarray:
    """What the network learns at every frame of a demonstration: [F, A, n], in the robot's units.

    The last action repeats. Values that the configuration has relative to the state are, to that of the frame.
    """
    T, horizon, mask = len(demo.actions), config.model.action_horizon, config.delta_mask
    ahead = np.minimum(np.arange(0, T, demo.every)[:, None] + np.arange(horizon), T - 1)
    chunks = np.asarray(demo.actions)[ahead]
    if mask is not None:
        n = min(len(mask), chunks.shape[-1])
        now = np.where(mask[:n], demo.state[:: demo.every, :n], 0.0)
        chunks = np.concatenate([chunks[..., :n] - now[:, None], chunks[..., n:]], axis=-1)
    return chunks


def cameras_of(demos: Sequence[Any]) -> list[str]:
    """Names of the demonstrations' cameras, outside first.

    Raises:
      ValueError: demonstrations with different cameras.
    """
    cameras = [CAMERA_KEYS if set(demo.images) == set(CAMERA_KEYS) else tuple(demo.images) for demo in demos]
    if other := next((names for names in cameras if names != cameras[0]), None):
        raise ValueError(f"data: expected the cameras {', '.join(cameras[0])} everywhere, got {', '.join(other)}")
    return list(cameras[0])


def make_samples(
    demos: Sequence[Any], config: PolicyConfig, stats: dict[str, NormStats], tokenizer: Tokenizer
) -> Samples:
    """Demonstrations (see `libero.demonstrations.Demo`) as samples of one policy.

    Args:
      demos: with `images`, `state` [T, ·], `actions` [T, ·], `prompt`, `every`, or a `lerobot.repack.Track`; images
        already of the model's size.
      config: policy; its model gives sizes, and whether the state is written into the prompt, as openpi does.
      stats: scaling of states and actions.
      tokenizer: of the model.

    Raises:
      ValueError: no demonstration, or frames of another size.
    """
    model = config.model
    if not demos:
        raise ValueError("expected at least one demonstration, got none; collect some with scripts/collect_demos.py")
    size = model.image_size
    cameras = cameras_of(demos)
    for demo in demos:
        for key in cameras:
            if demo.images[key].shape[1:] != (size, size, 3):
                raise ValueError(f"{key}: expected frames [T, {size}, {size}, 3], got {list(demo.images[key].shape)}")

    def scaled(values: np.ndarray, name: str) -> np.ndarray:
        return normalise(values, stats[name], quantiles=config.quantiles)

    def encoded(demo: Any, states: np.ndarray) -> list[tuple[int, ...]]:
        if model.discrete_state_input:
            return [tuple(tokenizer.encode(demo.prompt, state)) for state in states]
        return [tuple(tokenizer.encode(demo.prompt))] * len(states)

    states = [scaled(demo.state[:: demo.every], "state") for demo in demos]
    sequences = [ids for pair in zip(demos, states, strict=True) for ids in encoded(*pair)]
    prompts = {ids: row for row, ids in enumerate(sorted(set(sequences)))}
    longest = max(map(len, prompts))
    slots = next((t for t in PROMPT_LENGTHS if t >= longest), model.max_token_len)
    tokens, mask = np.zeros((len(prompts), slots), np.int32), np.zeros((len(prompts), slots), bool)
    for ids, row in prompts.items():
        tokens[row, : len(ids)], mask[row, : len(ids)] = ids, True

    def padded(values: np.ndarray) -> np.ndarray:
        return np.pad(
            values.astype(np.float32), [(0, 0)] * (values.ndim - 1) + [(0, model.action_dim - values.shape[-1])]
        )

    chunks = [padded(scaled(chunks_of(demo, config), "actions")) for demo in demos]
    lengths = [len(chunk) for chunk in chunks]
    return Samples(
        frames=Frames([[d.images[k] for k in cameras] for d in demos]),
        state=padded(np.concatenate(states)),
        actions=np.concatenate(chunks),
        tokens=tokens,
        token_mask=mask,
        prompt=np.array([prompts[ids] for ids in sequences], np.int32),
        episode=np.repeat(np.arange(len(demos)), lengths).astype(np.int32),
    )


def split(samples: Samples, share: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Steps for training and for validation, by whole demonstrations; with a single one it is used for both."""
    episodes = np.unique(samples.episode)
    held = np.random.default_rng(seed).permutation(episodes)[: round(share * len(episodes))]
    validation = np.isin(samples.episode, held)
    if not held.size or validation.all():
        return np.arange(len(samples.episode)), np.arange(len(samples.episode))
    return np.flatnonzero(~validation), np.flatnonzero(validation)


def batches(steps: np.ndarray, size: int, seed: int, start: int = 0) -> Iterator[np.ndarray]:
    """Endless batches of step indices [size] int32: whole shuffled passes, the same for the same seed.

    Args:
      steps: indices to draw from.
      size: batch size.
      seed: of the shuffling.
      start: batches to skip, so that a resumed run goes on where it stopped.
    """
    drawn, number = np.empty(0, np.int32), 0
    rng = np.random.default_rng(seed)
    while True:
        while len(drawn) < size:
            drawn = np.concatenate([drawn, rng.permutation(steps).astype(np.int32)])
        batch, drawn = drawn[:size], drawn[size:]
        if number >= start:
            yield batch
        number += 1
