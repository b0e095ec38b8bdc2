"""Labelled scenes as batches: what stages of a policy that sees are trained on.

    source = Scenes(folder, tokenizer, stats, config)      reads every file once; `refresh` reads new ones
    batch = source.draw(rng, 16)                           prompts are drawn among the objects in view

Labels are kept per patch, not per pixel: the class of 2×2 cells in each patch, the share of every class in it, and
offsets in units of `UNIT`. Frames stay uint8 in memory.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from flax import struct

from safe_pruner_jax.arrays import Array
from safe_pruner_jax.libero.labels import CLASSES
from safe_pruner_jax.libero.placements import RECEPTACLE
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


def prompt(kind: str) -> str:
    """LIBERO-Object's instruction for an object: "pick up the cream cheese and place it in the basket"."""
    return f"pick up the {kind.replace('_', ' ')} and place it in the {RECEPTACLE}"


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
    """Instructions of all kinds as tokens, and which of their tokens are the name.

    Attributes: `tokens`, `mask`, `name` [k, T]; T is the longest instruction.
    """

    def __init__(self, kinds: Sequence[str], tokenizer: Tokenizer):
        ids = [tokenizer.encode(prompt(kind)) for kind in kinds]
        self.tokens = np.zeros((len(ids), max(map(len, ids))), np.int32)
        self.mask, self.name = np.zeros(self.tokens.shape, bool), np.zeros(self.tokens.shape, bool)
        shared = lambda rows: next(i for i in range(99) if len({tuple(r[: i + 1]) for r in rows}) > 1)
        start, end = shared(ids), shared([row[::-1] for row in ids])
        for k, row in enumerate(ids):
            self.tokens[k, : len(row)], self.mask[k, : len(row)] = row, True
            self.name[k, start : len(row) - end] = True


class Scenes:
    """All labelled frames of some folders.

    Attributes: `training`, `held`: indices of frames; `kinds`; `vocabulary`.

    Args:
      folders: with files of `collect_scenes`; every file is of one suite and size.
      tokenizer, stats, config: of the policy.
      repeat: how often frames of each folder count.
      random_prompts: share of frames whose prompt names any object in the scene instead of the expert's target.

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
            targets[i] = rng.choice(np.flatnonzero(self._fetchable(index[i])))
        return self.batch(index, targets)

    def checks(self, size: int, batches: int, acting: bool) -> list[SceneBatch]:
        """Fixed held-out batches; with `acting`, of frames with actions, prompted with their own target."""
        pool = self.held[self._all["acts"][self.held]] if acting else self.held
        rng = np.random.default_rng(5)
        index = rng.permutation(pool)[: size * batches]
        index = np.resize(index, size * max(1, len(index) // size))
        targets = self._all["target"][index].copy()
        if not acting:
            targets = np.array([rng.choice(np.flatnonzero(self._fetchable(i))) for i in index])
        return [self.batch(index[k : k + size], targets[k : k + size]) for k in range(0, len(index), size)]

    def _fetchable(self, i: int) -> np.ndarray:
        present = ~np.isnan(self._all["position"][i, :, 0])
        present[self.kinds.index(RECEPTACLE)] = False
        return present

    def batch(self, index: np.ndarray, targets: np.ndarray) -> SceneBatch:
        """Frames `index` [B], prompted to fetch the kinds `targets` [B]."""
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
        basket = self.kinds.index(RECEPTACLE)
        per_camera = share.shape[1] // d["image"].shape[1]
        outside = np.arange(share.shape[1]) < per_camera  # the hand's commanded camera does not say where the world is
        target_share = things[rows, :, targets]
        way = np.concatenate([from_hand[rows, targets], from_hand[rows, basket]], -1)
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
            attention=_soft(target_share, things[..., basket], share[..., _GRIPPER]),
            way=np.nan_to_num(way).astype(np.float32),
            turn=np.stack([np.cos(2 * d["turn"]), np.sin(2 * d["turn"])], -1).astype(np.float32),
            turn_weight=commanded.astype(np.float32),
            held=(d["held"] == targets).astype(np.float32),
            actions=d["actions"],
            acts=(d["acts"] & commanded).astype(np.float32),
        )

    def _check(self, path: Path, about: dict) -> None:
        if about["size"] != self._config.image_size:
            raise ValueError(f"{path}: expected frames of {self._config.image_size} pixels, got {about['size']}")
        if not self.kinds:
            self.kinds = tuple(about["kinds"])
            self.vocabulary = Vocabulary(self.kinds, self._tokenizer)
        if tuple(about["kinds"]) != self.kinds:
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
        favour = np.where(np.arange(counts.shape[-1]) < 2, 1.0, 1.6)  # what is small must not vanish
        actions = normalise(frames["actions"], self._stats, quantiles=True).astype(np.float32)
        pad = config.action_dim - actions.shape[-1]
        return frames | {
            "cells": (counts * favour).argmax(-1).astype(np.uint8),
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
