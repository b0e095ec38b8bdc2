"""Labelled scenes as batches: what stages of a policy that sees are trained on.

    source = Scenes(folder, tokenizer, stats, config)      reads every file once; `refresh` reads new ones
    batch = source.draw(rng, 16)                           prompts are drawn among those that name something there

Labels are kept per patch, not per pixel: the class of 2×2 cells in each patch, the share of every class in it, and
offsets in units of `UNIT`. Frames stay uint8 in memory.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from flax import struct

from safe_pruner_jax.arrays import Array
from safe_pruner_jax.libero.labels import CLASSES, spoken
from safe_pruner_jax.libero.scenes import HELD_OUT, read
from safe_pruner_jax.model.config import Pi0Config
from safe_pruner_jax.robots.transforms import NormStats, Tokenizer, normalise

UNIT = 0.15
"""Metres that an offset of 1 stands for."""
CELLS = 2
"""Cells along one side of a patch in which classes are told."""

_SEEN = 0.12  # share of a patch from which on a thing is in it
_GRIPPER = CLASSES.index("gripper")

logger = logging.getLogger(__name__)


@struct.dataclass
class SceneBatch:
    """Frames with labels, leading axis B; n visual tokens, T prompt slots, k kinds.

    Args:
      images: [B, C, S, S, 3] uint8.
      tokens, token_mask: [B, T] int32 and bool.
      cells: [B, n, 4] int32, classes of the cells of every patch.
      thing: [B, n] int32, kind that fills most of a patch, and 0 for none; 1 is the first kind.
      offset: [B, n, 3] float32, hand → thing in the hand's frame; weight [B, n].
      place: [B, n, 3], the thing (or the gripper) in the world; place_weight [B, n].
      mask: [B, n], how much of a patch is the named object, at most 1.
      attention: [B, n], where attention should go: distribution over visual tokens, 0 without supervision.
      way: [B, 6], hand → named object, hand → receptacle.
      turn: [B, 2], cosine and sine of twice the angle to the grasp; turn_weight [B].
      held: [B], 1 where the named object is in the hand.
      actions: [B, A, action_dim] normalised; acts [B], 1 where they are labels of this prompt.
    """

    images: Array
    tokens: Array
    token_mask: Array
    cells: Array
    thing: Array
    offset: Array
    offset_weight: Array
    place: Array
    place_weight: Array
    mask: Array
    attention: Array
    way: Array
    turn: Array
    turn_weight: Array
    held: Array
    actions: Array
    acts: Array


class Vocabulary:
    """Instructions of a suite as tokens, and the names of its kinds as they stand in one.

    Attributes: `tokens`, `mask` [instructions, T]; `names`, `names_mask` [kinds, N].
    """

    def __init__(self, instructions: Sequence[str], kinds: Sequence[str], tokenizer: Tokenizer):
        self.tokens, self.mask = _padded([tokenizer.encode(text) for text in instructions])
        said = [tokenizer.encode(f"pick up the {spoken(kind)} and place it") for kind in kinds]
        shared = lambda rows: next(i for i in range(99) if len({tuple(r[: i + 1]) for r in rows}) > 1)
        start, end = shared(said), shared([row[::-1] for row in said])
        self.names, self.names_mask = _padded([row[start : len(row) - end] for row in said])


def _padded(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of tokens as int32 [rows, longest], and where they are some."""
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    mask = np.arange(tokens.shape[1]) < np.array([len(row) for row in rows])[:, None]
    tokens[mask] = np.concatenate(rows)
    return tokens, mask


class Scenes:
    """All labelled frames of some folders.

    Attributes: `training`, `held`: indices of frames; `kinds`; `instructions`; `vocabulary`.

    Args:
      folders: with files of `collect_scenes`; every file is of one suite and size.
      tokenizer, stats, config: of the policy.
      repeat: how often frames of each folder count.
      random_prompts: share of frames whose prompt is any that is said of the scene, not the expert's.

    Raises:
      ValueError: no files, or files that do not fit together or to the model; the message names the file.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        tokenizer: Tokenizer,
        stats: dict[str, NormStats],
        config: Pi0Config,
        *,
        repeat: Sequence[int] | None = None,
        random_prompts: float = 0.7,
        acts_share: float = 0.0,
    ):
        self._folders, self._stats, self._config = [Path(f) for f in folders], stats["actions"], config
        self._repeat = list(repeat or [1] * len(self._folders))
        self._random_prompts, self._acts_share, self._tokenizer = random_prompts, acts_share, tokenizer
        self._read: set[Path] = set()
        self._parts: list[dict[str, np.ndarray]] = []
        self.kinds: tuple[str, ...] = ()
        self.instructions: tuple[str, ...] = ()
        self.refresh()
        if not self._parts:
            where = ", ".join(map(str, folders))
            raise ValueError(f"data: expected labelled scenes in {where}, got none; run scripts/collect_scenes.py")

    def refresh(self) -> int:
        """Reads files that have appeared; returns how many."""
        new = [(p, r) for f, r in zip(self._folders, self._repeat, strict=True) for p in sorted(f.glob("*.npz"))]
        new = [(path, r) for path, r in new if path not in self._read]
        for path, repeat in new:
            frames, about = read(path)
            self._check(path, about)
            self._parts.append(self._reduced(frames) | self._role(about, len(frames["site"]), repeat))
            self._read.add(path)
        if new:
            keys = self._parts[0]
            self._all = {key: np.concatenate([part[key] for part in self._parts]) for key in keys}
            self._parts = [self._all]
            index = np.arange(len(self._all["site"]))
            self.held = index[self._all["held_out"]]
            training = index[~self._all["held_out"]]
            self.training = np.repeat(training, self._all["repeat"][training])
            self._acting = self.training[self._all["acts"][self.training]]
            logger.info("%d frames for training, %d held out", len(training), len(self.held))
        return len(new)

    def draw(self, rng: np.random.Generator, size: int) -> SceneBatch:
        """A random batch for training; at least `acts_share` of it are frames whose actions are labels."""
        acting = rng.binomial(size, self._acts_share) if len(self._acting) else 0
        index = np.concatenate([rng.choice(self._acting, acting), rng.choice(self.training, size - acting)])
        targets = self._all["target"][index].copy()
        free = np.arange(size) >= acting
        for i in np.flatnonzero(free & (rng.random(size) < self._random_prompts)):
            targets[i] = rng.choice(self._said(index[i]))
        return self.batch(index, targets)

    def checks(self, size: int, batches: int, acting: bool) -> list[SceneBatch]:
        """Fixed held-out batches; with `acting`, of frames with actions, prompted with their own target."""
        pool = self.held[self._all["acts"][self.held]] if acting else self.held
        rng = np.random.default_rng(5)
        index = rng.permutation(pool)[: size * batches]
        index = np.resize(index, size * max(1, len(index) // size))
        targets = self._all["target"][index].copy()
        if not acting:
            targets = np.array([rng.choice(self._said(i)) for i in index])
        return [self.batch(index[k : k + size], targets[k : k + size]) for k in range(0, len(index), size)]

    def _said(self, i: int) -> np.ndarray:
        """Numbers of the instructions that name something in a frame."""
        return np.flatnonzero(self._all["named"][i] >= 0)

    def batch(self, index: np.ndarray, targets: np.ndarray) -> SceneBatch:
        """Frames `index` [B], prompted with the instructions `targets` [B]."""
        d = {key: value[index] for key, value in self._all.items()}
        rows = np.arange(len(index))
        share = d["share"].astype(np.float32)  # [B, n, classes]
        things = share[..., len(CLASSES) :]
        from_hand = (d["position"] - d["site"][:, None]) / UNIT
        thing, filled = things.argmax(-1), things.max(-1) > _SEEN
        offset = np.take_along_axis(_turned(from_hand, d["yaw"]), thing[..., None], 1)
        gripper = share[..., _GRIPPER] > np.maximum(things.max(-1), _SEEN)
        world = np.concatenate([d["position"], d["site"][:, None]], 1) / UNIT
        where = np.where(gripper, len(self.kinds), thing)
        place = np.take_along_axis(world, where[..., None], 1)
        commanded = targets == d["target"]
        into, thing_named = self.kinds.index(self._receptacle), d["named"][rows, targets]
        per_camera = share.shape[1] // d["image"].shape[1]
        outside = np.arange(share.shape[1]) < per_camera  # the hand's commanded camera does not say where the world is
        target_share = things[rows, :, thing_named]
        way = np.concatenate([from_hand[rows, thing_named], from_hand[rows, into]], -1)
        return SceneBatch(
            images=d["image"],
            tokens=self.vocabulary.tokens[targets],
            token_mask=self.vocabulary.mask[targets],
            cells=d["cells"].astype(np.int32),
            thing=np.where(things.max(-1) > 0.15, thing + 1, 0).astype(np.int32),
            offset=np.nan_to_num(offset).astype(np.float32),
            offset_weight=(filled & ~np.isnan(offset[..., 0])).astype(np.float32),
            place=np.nan_to_num(place).astype(np.float32),
            place_weight=((filled | gripper) & outside & ~np.isnan(place[..., 0])).astype(np.float32),
            mask=np.minimum(1.5 * target_share, 1.0),
            attention=_soft(target_share, things[..., into], share[..., _GRIPPER]),
            way=np.nan_to_num(way).astype(np.float32),
            turn=np.stack([np.cos(2 * d["turn"]), np.sin(2 * d["turn"])], -1).astype(np.float32),
            turn_weight=commanded.astype(np.float32),
            held=(d["held"] == thing_named).astype(np.float32),
            actions=d["actions"],
            acts=(d["acts"] & commanded).astype(np.float32),
        )

    def _check(self, path: Path, about: dict) -> None:
        if about["size"] != self._config.image_size:
            raise ValueError(f"{path}: expected frames of {self._config.image_size} pixels, got {about['size']}")
        if not self.kinds:
            self.kinds, self.instructions = tuple(about["kinds"]), tuple(about["instructions"])
            self._receptacle = about["receptacle"]
            self.vocabulary = Vocabulary(self.instructions, self.kinds, self._tokenizer)
        if (tuple(about["kinds"]), tuple(about["instructions"])) != (self.kinds, self.instructions):
            raise ValueError(f"{path}: expected scenes of one suite ({', '.join(self.kinds)}), got {about['suite']}")

    def _role(self, about: dict, frames: int, repeat: int) -> dict[str, np.ndarray]:
        modulus, rest = HELD_OUT
        held_out = about["seed"] % modulus == rest
        return {"held_out": np.full(frames, held_out), "repeat": np.full(frames, repeat)}

    def _reduced(self, frames: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Per-patch labels instead of segmentation, and normalised, padded actions."""
        segmentation, config = frames.pop("segmentation"), self._config
        T, C, S, _ = segmentation.shape
        g, c = config.grid, CELLS
        side = S // (g * c)
        blocks = segmentation.reshape(T, C, g, c, side, g, c, side).transpose(0, 1, 2, 5, 3, 6, 4, 7)
        blocks = blocks.reshape(T, C * g * g, c * c, side * side)
        counts = np.stack([(blocks == k).sum(-1) for k in range(len(CLASSES) + len(self.kinds))], -1)
        alike = [len(CLASSES) + [spoken(k) for k in self.kinds].index(spoken(kind)) for kind in self.kinds]
        looks = np.eye(counts.shape[-1], dtype=counts.dtype)[[*range(len(CLASSES)), *alike]]  # two of a kind look alike
        favour = np.where(np.arange(counts.shape[-1]) < 2, 1.0, 1.6)  # what is small must not vanish
        actions = normalise(frames["actions"], self._stats, quantiles=True).astype(np.float32)
        pad = config.action_dim - actions.shape[-1]
        return frames | {
            "cells": (counts @ looks * favour).argmax(-1).astype(np.uint8),
            "share": (counts.sum(2) / (side * side * c * c)).astype(np.float16),
            "actions": np.pad(actions, [(0, 0), (0, 0), (0, pad)]),
        }


def _turned(vectors: np.ndarray, yaw: np.ndarray) -> np.ndarray:
    """World vectors [B, k, 3] in the frame of hands with these yaws [B]."""
    cos, sin = np.cos(yaw)[:, None], np.sin(yaw)[:, None]
    x, y, z = np.moveaxis(vectors, -1, 0)
    return np.stack([cos * x + sin * y, cos * y - sin * x, z], -1)


def _soft(target: np.ndarray, basket: np.ndarray, gripper: np.ndarray) -> np.ndarray:
    """Soft attention targets [B, n]: 60 % named object, 20 % receptacle, 20 % gripper, as far as they are in view."""
    total = 0.0
    for weight, share in ((0.6, target), (0.2, basket), (0.2, gripper)):
        size = share.sum(1, keepdims=True)
        total = total + weight * np.where(size > 0.1, share / np.maximum(size, 1e-6), 0.0)
    return (total / np.maximum(total.sum(1, keepdims=True), 1e-6)).astype(np.float32)
