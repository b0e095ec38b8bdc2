"""A dataset's columns → what a robot's client sends, and demonstrations to train on.

    for track in tracks(Dataset(folder), get_config("pi05_libero"), scratch=run): …

Column names are those of openpi's data configurations (`LeRobotLiberoDataConfig`, `LeRobotDROIDDataConfig`,
`LeRobotAlohaDataConfig`) first, then those of LeRobot's own datasets and of `openpi export`.
"""

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from safe_pruner_jax.lerobot.dataset import Dataset, Episode
from safe_pruner_jax.lerobot.libraries import DatasetError
from safe_pruner_jax.robots.robots import RequestError
from safe_pruner_jax.robots.transform import PolicyConfig
from safe_pruner_jax.robots.transforms import resize_with_pad

_SEEN = "observation.images."
_ALOHA = ("cam_high", "cam_left_wrist", "cam_right_wrist")

COLUMNS: dict[str, dict[str, tuple[str, ...]]] = {
    "LIBERO": {
        "observation/image": ("image", f"{_SEEN}image", f"{_SEEN}base_0_rgb"),
        "observation/wrist_image": ("wrist_image", f"{_SEEN}wrist_image", f"{_SEEN}image2", f"{_SEEN}left_wrist_0_rgb"),
        "observation/state": ("state", "observation.state"),
    },
    "DROID": {
        "observation/exterior_image_1_left": ("exterior_image_1_left", f"{_SEEN}exterior_1_left", f"{_SEEN}base_0_rgb"),
        "observation/wrist_image_left": ("wrist_image_left", f"{_SEEN}wrist_left", f"{_SEEN}left_wrist_0_rgb"),
        "observation/joint_position": ("joint_position", "observation.state.joint_position"),
        "observation/gripper_position": ("gripper_position", "observation.state.gripper_position"),
    },
    "ALOHA": {
        "images/cam_high": (f"{_SEEN}cam_high", f"{_SEEN}top", f"{_SEEN}base_0_rgb"),
        "images/cam_left_wrist": (f"{_SEEN}cam_left_wrist", f"{_SEEN}left_wrist_0_rgb"),
        "images/cam_right_wrist": (f"{_SEEN}cam_right_wrist", f"{_SEEN}right_wrist_0_rgb"),
        "state": ("observation.state",),
    },
}
"""Robot → entry of its request → columns it may come from, the first that is there."""

ACTIONS = ("actions", "action")
"""Columns that actions may come from."""

_OPTIONAL = {"images/cam_left_wrist", "images/cam_right_wrist"}


@dataclass(frozen=True, eq=False)
class Track:
    """An episode to train on.

    Args:
      images: camera of the network → uint8 [T, S, S, 3], in the order of its slots; views of a file where `tracks` was
        given a folder for it.
      state: float [T, n], in the network's convention.
      actions: float [T, n], in the network's convention, absolute where the dataset's are.
      prompt: what the robot was told.
      every: 1; there is a frame for every row.
    """

    images: dict[str, np.ndarray]
    state: np.ndarray
    actions: np.ndarray
    prompt: str
    every: int = 1


def columns(data: Dataset, robot: str) -> dict[str, str]:
    """Entry of the robot's request, and "actions" → the column it comes from.

    Raises:
      DatasetError: a robot without a repacking, or a dataset without one of its columns.
    """
    if robot not in COLUMNS:
        raise DatasetError(f"data: expected a configuration of {', '.join(COLUMNS)}, got one of {robot}")
    features, columns = data.info["features"], {}
    for entry, names in (COLUMNS[robot] | {"actions": ACTIONS}).items():
        column = next((name for name in names if name in features), None)
        if column is not None:
            columns[entry] = column
        elif entry not in _OPTIONAL:
            raise DatasetError(
                f"{data.folder}: expected a column for {entry} of {robot}, one of {', '.join(names)}, got "
                f"{', '.join(features)}; choose the configuration of this robot or rename the column"
            )
    return columns


def requests(episode: Episode, named: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """What the robot's client would have sent at every row.

    Args:
      episode: of a dataset.
      named: its `columns`.
    """
    cameras = {entry: column for entry, column in named.items() if "image" in entry}
    values = {entry: episode.column(c) for entry, c in named.items() if entry not in cameras and entry != "actions"}
    films = [episode.frames(column) for column in cameras.values()]
    for t, frames in enumerate(zip(*films, strict=True)):
        request: dict[str, Any] = {"prompt": episode.task}
        request |= {entry: np.asarray(rows[t], np.float64) for entry, rows in values.items()}
        for entry, frame in zip(cameras, frames, strict=True):
            group, _, name = entry.partition("/")
            if group == "images":  # ALOHA's client nests them, channels first
                request.setdefault("images", {})[name] = np.moveaxis(frame, 2, 0)
            else:
                request[entry] = frame
        yield request


def grippers(episode: Episode, named: Mapping[str, str], robot: str) -> np.ndarray:
    """Whether the gripper is told to close, at every row: float [T], open ≤ 0 < closed.

    LIBERO's command is -1 or 1, DROID's 0 (open) to 1, ALOHA's 0 (closed) to 1. ALOHA has two grippers: the sign is
    that of their product, so that it changes whenever one of them does.
    """
    actions = episode.column(named["actions"]).astype(np.float64)
    width = {"LIBERO": 7, "DROID": 8, "ALOHA": 14}[robot]
    if actions.ndim != 2 or actions.shape[1] < width:
        raise DatasetError(f"episode {episode.index}: expected [T, {width}] actions for {robot}, got {actions.shape}")
    if robot == "LIBERO":
        return actions[:, 6]
    if robot == "DROID":
        return 2 * actions[:, 7] - 1
    return (1 - 2 * actions[:, 6]) * (1 - 2 * actions[:, 13])


def tracks(data: Dataset, config: PolicyConfig, *, scratch: Path | None = None) -> Iterator[Track]:
    """Every episode as a demonstration for `config`, frames of the model's size.

    Args:
      data: of the robot of `config`.
      config: of the policy.
      scratch: folder for the frames, on a disk with room for rows × cameras × S × S × 3 bytes. They are in a file
        without a name there, which vanishes with the last track; memory then holds states and actions only, and one
        frame per camera. None keeps frames in memory.

    Raises:
      DatasetError: a column that is missing or of another length, a video that is cut short, too small a disk.
    """
    named, robot, size = columns(data, config.robot.name), config.robot, config.model.image_size
    rows, cameras = int(data.info["total_frames"]), sum("image" in entry for entry in named)
    frames, begin = _room((rows, cameras, size, size, 3), scratch), 0
    for episode in data.episodes():
        where = f"{data.folder}, episode {episode.index}"
        if (end := begin + len(episode)) > rows:
            raise DatasetError(
                f"{where}: expected {rows} rows in all, as meta/info.json says, got more; download it again"
            )
        states, slots = [], []
        try:
            for t, request in enumerate(requests(episode, named)):
                raw = robot.input(request)
                states.append(raw["state"])
                slots = [camera for camera, real in raw["image_mask"].items() if real]
                for number, camera in enumerate(slots):
                    frames[begin + t, number] = resize_with_pad(raw["image"][camera], size, size)
        except RequestError as error:
            raise DatasetError(f"{where}: {error}") from error
        actions = episode.column(named["actions"]).astype(np.float64)
        if actions.ndim != 2 or actions.shape[1] < robot.action_dim:
            raise DatasetError(
                f"{where}: expected [T, {robot.action_dim}] actions for {robot.name}, got {actions.shape}"
            )
        images = {camera: frames[begin:end, number] for number, camera in enumerate(slots)}
        yield Track(images, np.stack(states), robot.target(actions), episode.task)
        begin = end


def _room(shape: tuple[int, ...], scratch: Path | None) -> np.ndarray:
    """Zeros of uint8, in memory or in a file without a name."""
    if scratch is None:
        return np.zeros(shape, np.uint8)
    scratch.mkdir(parents=True, exist_ok=True)
    needed, free = int(np.prod(shape)), shutil.disk_usage(scratch).free
    if needed > free:
        raise DatasetError(
            f"data: expected {needed / 1e9:.0f} GB of disk for {shape[0]} rows of frames, got {free / 1e9:.0f} GB free "
            f"in {scratch}; give another --out, a smaller --image-size or fewer episodes"
        )
    with tempfile.TemporaryFile(dir=scratch) as file:
        return np.memmap(file, np.uint8, "w+", shape=shape)
