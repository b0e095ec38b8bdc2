"""Pictures with labels, for training a policy that sees: scenes by teleport, demonstrations by the expert.

    with open_scenes("libero_object", 0) as maker:
        frames = maker.scenes(seed)            60 pictures of one shuffled scene each
        frames = maker.demonstration(seed)     one episode of the feedback law, every few steps a picture
    write(path, frames, about);  frames, about = read(path)

One file is one seed: it appears when it is complete, so a collection goes on where it was. Pictures are JPEG, labels
are exact. What is drawn is 256² resized to 224² and to the policy's size, the way a client and a server do it.
"""

import atexit
import contextlib
import functools
import io
import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from safe_pruner_jax.libero.cameras import CAMERAS
from safe_pruner_jax.libero.env import LiberoEnv, load_task
from safe_pruner_jax.libero.expert import Pushes
from safe_pruner_jax.libero.labels import Labels, kind
from safe_pruner_jax.libero.law import CHUNK, FeedbackExpert
from safe_pruner_jax.libero.placements import Visited
from safe_pruner_jax.libero.shuffled import draw_for
from safe_pruner_jax.robots.transforms import resize_with_pad

FORMAT = "safe_pruner_jax scenes 2"
HELD_OUT = 10, 3
"""Seeds with this remainder are for validation."""
PER_SCENE_FILE = 60
QUALITY = 95

SPACING = 1_000_000
"""Between the seeds of scenes of one file; the last one stays below `shuffled.HELD_OUT`."""

_NOISE, _PUSHES, _EVERY = 0.08, 0.02, 4  # of a demonstration
_LIMIT = 250

Frames = dict[str, np.ndarray]
"""Leading axis T: image uint8 [T, cameras, S, S, 3], segmentation uint8 [T, cameras, S, S], position float32 [T, kinds,
3] and site [T, 3] in metres, yaw float32 [T] in radians (the fingers' direction) and turn [T] (from it to the target's
grasp), named int32 [T, instructions] (number of the kind that each instruction names; -1: it is not said here), target
int32 [T] (number of the instruction), held int32 [T] (number of the kind; -1 with an empty hand), actions float32 [T,
10, 7], acts bool [T] (actions are labels)."""


class SceneMaker:
    """Draws labelled frames of one task's objects.

    Args:
      env: made with `coarse=True` for speed, or as in evaluation.
      size: pixels per side of images and segmentation.
    """

    def __init__(self, env: LiberoEnv, size: int):
        self.env, self._size = env, size
        self.placements, self._labels = draw_for(env), Labels(env, size)

    @property
    def about(self) -> dict[str, Any]:
        """What a file of these frames says of them: suite, task, kinds, instructions, kind of the receptacle."""
        task, placements = self.env.task, self.placements
        return {
            "suite": task.suite,
            "task": task.index,
            "kinds": self._labels.kinds,
            "instructions": placements.instructions,
            "receptacle": kind(placements.receptacle),
        }

    def scenes(self, seed: int, count: int = PER_SCENE_FILE) -> Frames:
        """Pictures without physics, each of another placement."""
        rng, placements = np.random.default_rng([seed, self.env.task.index, 1]), self.placements
        rows = []
        while len(rows) < count:
            group = len(rows) // placements.scenes
            placements.shuffle(seed + SPACING * group)
            base, visited = self.env.simulator.get_sim_state().copy(), self._visit(seed + group, rng)
            for _ in range(min(placements.scenes, count - len(rows))):
                held = placements.teleport(rng, base, visited)
                name = held or placements.names[rng.integers(len(placements.names))]
                rows.append(self.frame(self.instruction(name), held is not None))
        return stack(rows)

    def demonstration(self, seed: int) -> Frames | None:
        """One episode with a random target; None if the expert did not solve it.

        Half of the episodes begin with the hand led astray. Motion commands get noise and pushes; labels are the
        expert's actions from the states that those lead to (DART, Laskey et al. 2017).
        """
        rng = np.random.default_rng([seed, self.env.task.index, 2])
        self.placements.shuffle(seed)
        name = self.placements.names[rng.integers(len(self.placements.names))]
        if rng.random() < 0.5:
            self._wander(rng)
        rows, actions, push = [], [], Pushes(_PUSHES, rng)
        law, goal, words = FeedbackExpert(self.env, self.goal(name)), self.goal(name), self.instruction(name)
        for step in range(_LIMIT):
            if step % _EVERY == 0:
                rows.append(self.frame(words, law.holds_object()))
            actions.append(law.act())
            action = actions[-1] + _NOISE * np.append(rng.standard_normal(6), 0.0)
            action[:3] += push()
            self.env.advance(np.clip(action, -1, 1))
            if law.scene.holds(goal):
                break
        else:
            return None
        ahead = np.minimum(np.arange(0, step + 1, _EVERY)[:, None] + np.arange(CHUNK), step)
        frames = stack(rows)
        frames["actions"] = np.asarray(actions, np.float32)[ahead]
        frames["acts"][:] = True
        return frames

    def goal(self, name: str) -> tuple[str, str, str]:
        """The predicate that fetching this object is to make true: the task's own, with this object."""
        predicate, _, target = self.placements.goal
        return predicate, name, target

    def instruction(self, name: str) -> str:
        """What is said in the present scene to have this object fetched."""
        return next(words for words, named in self.placements.named.items() if named == name)

    def frame(self, instruction: str, held: bool) -> dict[str, Any]:
        """The present picture and its labels, when this is said."""
        seen, named = self.env.observe(), self.placements.named
        name, number = named[instruction], lambda name: self._labels.kinds.index(kind(name))
        size, said = self._size, self.placements.instructions
        yaw, turn = self._labels.hand(name)
        return {
            "image": np.stack([resize_with_pad(seen[key], size, size) for key in CAMERAS]),
            "segmentation": self._labels.segmentation(),
            "position": self._labels.positions(),
            "site": self._labels.site(),
            "yaw": np.float32(yaw),
            "turn": np.float32(turn),
            "named": np.array([number(named[words]) if words in named else -1 for words in said], np.int32),
            "target": np.int32(said.index(instruction)),
            "held": np.int32(number(name) if held else -1),
            "actions": np.zeros((CHUNK, 7), np.float32),
            "acts": np.bool_(False),
        }

    def _wander(self, rng: np.random.Generator) -> None:
        """Moves the hand somewhere else before an episode: along a line, downwards more often than up."""
        line = rng.standard_normal(3)
        line /= np.linalg.norm(line)
        line[2] = -0.7 * abs(line[2])
        spin = 0.25 * rng.standard_normal()
        for _ in range(rng.integers(4, 20)):
            noise = 0.2 * rng.standard_normal(3)
            turn = [*(0.1 * rng.standard_normal(2)), spin]
            self.env.advance(np.clip([*(line + noise), *turn, -1.0], -1, 1))

    def _visit(self, seed: int, rng: np.random.Generator) -> list[Visited]:
        """Every other state of one noisy episode."""
        name = self.placements.names[seed % len(self.placements.names)]
        law, visited = FeedbackExpert(self.env, self.goal(name)), []
        for _ in range(90):
            noise = self.placements.noise * np.append(rng.standard_normal(6), 0.0)
            self.env.advance(np.clip(law.act() + noise, -1, 1))
            held = name if law.holds_object() else None
            visited.append(Visited(self.env.simulator.get_sim_state().copy(), held))
        return visited[::2]


@contextlib.contextmanager
def open_scenes(suite: str, task: int, size: int = 112) -> Iterator[SceneMaker]:
    """A maker with its own environment of coarse pictures, which is closed afterwards."""
    with LiberoEnv(load_task(suite, task), coarse=True) as env:
        yield SceneMaker(env, size)


_open: list[LiberoEnv] = []


@functools.lru_cache(1)
def current_maker(suite: str, task: int, size: int, *, coarse: bool = True) -> SceneMaker:
    """This process's maker, for workers that are given one job after the other; the environment before is closed."""
    _close()
    _open.append(LiberoEnv(load_task(suite, task), coarse=coarse))
    atexit.register(_close)  # now that MuJoCo has registered the end of its display, since the last one is called first
    return SceneMaker(_open[-1], size)


def _close() -> None:
    """Frees the OpenGL context while there is still something to free it with."""
    while _open:
        _open.pop().close()


def stack(rows: list[dict[str, Any]]) -> Frames:
    """Frames along a new leading axis."""
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def write(path: Path, frames: Frames, about: dict[str, Any]) -> None:
    """Writes one file, which appears under its name when it is complete."""
    T, C, S = frames["image"].shape[:3]
    pictures = [_jpeg(image) for image in frames["image"].reshape(T * C, S, S, 3)]
    arrays = {key: value for key, value in frames.items() if key != "image"}
    arrays["jpeg"] = np.frombuffer(b"".join(pictures), np.uint8)
    arrays["jpeg_length"] = np.array([len(p) for p in pictures], np.int32)
    text = json.dumps({"format": FORMAT, "size": S, **about})
    partial = path.with_suffix(f".{os.getpid()}.part")
    try:
        with partial.open("wb") as file:
            np.savez_compressed(file, about=np.array(text), **arrays)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read(path: Path) -> tuple[Frames, dict[str, Any]]:
    """One file's frames, and what is known about them: suite, task, seed, kinds, size.

    Raises:
      ValueError: not such a file; the message names it.
    """
    try:
        with np.load(path) as file:
            arrays = dict(file)
        about = json.loads(str(arrays.pop("about")))
        if about["format"] != FORMAT:
            raise ValueError(f"expected the format {FORMAT!r}, got {about['format']!r}")
        blob, lengths = arrays.pop("jpeg").tobytes(), arrays.pop("jpeg_length")
    except (KeyError, OSError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path}: not a file of labelled scenes ({error}); collect some with scripts/collect_scenes.py"
        ) from error
    ends = np.cumsum(lengths)
    images = [np.asarray(Image.open(io.BytesIO(blob[b - n : b]))) for b, n in zip(ends, lengths, strict=True)]
    T, C, S, _ = arrays["segmentation"].shape
    return {"image": np.stack(images).reshape(T, C, S, S, 3), **arrays}, about


def _jpeg(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=QUALITY, subsampling=0)
    return buffer.getvalue()
