"""A LeRobotDataset on disk, versions 2.x and 3.0, episode by episode.

    data = Dataset("my_dataset")
    for episode in data.episodes():
        episode.column("action")                  [T, n]
        for frame in episode.frames("image"): …   uint8 [H, W, 3]

2.x has a parquet file and a video per episode and camera; 3.0 has many episodes in a file, and `meta/episodes` says
where. Nothing but tables of numbers is in memory; frames are decoded as they are asked for.
"""

import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from safe_pruner_jax.lerobot.libraries import DatasetError, parquet
from safe_pruner_jax.lerobot.video import read_frames

INFO = "meta/info.json"
"""The file that makes a folder a dataset."""


def is_dataset(path: str | Path) -> bool:
    """Whether a folder is a LeRobotDataset."""
    return (Path(path) / INFO).is_file()


@dataclass(frozen=True, eq=False)
class Episode:
    """One episode.

    Args:
      index: in the dataset.
      task: what the robot was told.
      table: its rows, of parquet.
      features: of the dataset, `info.json`'s.
      videos: camera → its file and the time of the first frame in it, seconds.
      fps: rows per second.
    """

    index: int
    task: str
    table: Any
    features: Mapping[str, Any]
    videos: Mapping[str, tuple[Path, float]]
    fps: float

    def __len__(self) -> int:
        return self.table.num_rows

    def column(self, name: str) -> np.ndarray:
        """A column of numbers, [T] or [T, …] as the feature's shape says.

        Raises:
          DatasetError: no such column.
        """
        if name not in self.table.column_names:
            known = ", ".join(self.table.column_names)
            raise DatasetError(f"expected a column {name}, got {known}; choose the configuration of this robot")
        rows = np.asarray(self.table.column(name).to_pylist())
        shape = tuple(self.features.get(name, {}).get("shape", rows.shape[1:]))
        return rows if shape in ((1,), rows.shape[1:]) else rows.reshape(len(rows), *shape)

    def frames(self, camera: str) -> Iterator[np.ndarray]:
        """The frames of a camera, uint8 [H, W, 3] each."""
        if camera in self.videos:
            file, start = self.videos[camera]
            yield from read_frames(file, start, len(self), self.fps)
            return
        for cell in self.table.column(camera).to_pylist():
            yield np.asarray(Image.open(io.BytesIO(cell["bytes"])).convert("RGB"))


@dataclass(frozen=True)
class Dataset:
    """A folder with `meta/info.json`.

    Raises:
      DatasetError: not a dataset, a version that is not known, a file that is missing or corrupt.
    """

    folder: Path
    info: Mapping[str, Any] = field(init=False, hash=False)

    def __post_init__(self):
        folder = Path(self.folder)
        object.__setattr__(self, "folder", folder)
        try:
            info = json.loads((folder / INFO).read_text(encoding="utf-8"))
            version, _ = info["codebase_version"], info["features"]
        except FileNotFoundError as error:
            raise DatasetError(f"expected a LeRobot dataset at {folder}, got no {INFO} there") from error
        except (ValueError, KeyError, TypeError) as error:
            raise DatasetError(f"{folder / INFO} is corrupt ({error!r}); download the dataset again") from error
        if not str(version).startswith(("v2.", "v3.0")):
            raise DatasetError(f"{folder}: expected version v2.x or v3.0, got {version}; convert it with lerobot")
        object.__setattr__(self, "info", info)

    @property
    def fps(self) -> float:
        """Rows per second."""
        return float(self.info["fps"])

    @property
    def cameras(self) -> list[str]:
        """Features that are pictures."""
        return [key for key, feature in self.info["features"].items() if feature["dtype"] in ("video", "image")]

    def __len__(self) -> int:
        return int(self.info["total_episodes"])

    def episodes(self) -> Iterator[Episode]:
        """All episodes, in order."""
        tasks = self._tasks()
        for about in self._third() if str(self.info["codebase_version"]).startswith("v3") else self._second():
            index, table, videos = about
            told = table.column("task_index")[0].as_py()
            if told not in tasks:
                raise DatasetError(f"{self.folder}: expected a task {told} in meta/, got {len(tasks)} others")
            yield Episode(index, tasks[told], table, self.info["features"], videos, self.fps)

    def _tasks(self) -> dict[int, str]:
        """Number → text."""
        lines = self.folder / "meta/tasks.jsonl"
        if lines.is_file():
            rows = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines() if line]
        else:
            rows = self._read(self.folder / "meta/tasks.parquet").to_pylist()
        # pandas keeps its index, the text, under a name of its own
        return {row["task_index"]: row.get("task", row.get("__index_level_0__")) for row in rows}

    def _second(self) -> Iterator[tuple[int, Any, dict[str, tuple[Path, float]]]]:
        for line in (self.folder / "meta/episodes.jsonl").read_text(encoding="utf-8").splitlines():
            index = json.loads(line)["episode_index"]
            place = {"episode_index": index, "episode_chunk": index // int(self.info.get("chunks_size", 1000))}
            table = self._read(self.folder / self.info["data_path"].format(**place))
            moving = [key for key in self.cameras if self.info["features"][key]["dtype"] == "video"]
            path = lambda key, place=place: self.folder / self.info["video_path"].format(video_key=key, **place)
            yield index, table, {key: (path(key), 0.0) for key in moving}

    def _third(self) -> Iterator[tuple[int, Any, dict[str, tuple[Path, float]]]]:
        files = sorted((self.folder / "meta/episodes").glob("*/*.parquet"))
        if not files:
            raise DatasetError(f"{self.folder}: expected meta/episodes/*/*.parquet, got none; download it again")
        moving = [key for key in self.cameras if self.info["features"][key]["dtype"] == "video"]
        opened, rows, first = None, None, 0
        for row in (row for file in files for row in self._read(file).to_pylist()):
            place = {"chunk_index": row["data/chunk_index"], "file_index": row["data/file_index"]}
            if opened != (file := self.folder / self.info["data_path"].format(**place)):
                opened, rows = file, self._read(file)
                first = rows.column("index")[0].as_py()
            table = rows.slice(row["dataset_from_index"] - first, row["length"])
            videos = {}
            for key in moving:
                place = {part: row[f"videos/{key}/{part}"] for part in ("chunk_index", "file_index")}
                file = self.folder / self.info["video_path"].format(video_key=key, **place)
                videos[key] = file, float(row[f"videos/{key}/from_timestamp"])
            yield row["episode_index"], table, videos

    def _read(self, file: Path) -> Any:
        library = parquet()
        try:
            return library.read_table(file)
        except FileNotFoundError as error:
            raise DatasetError(f"{self.folder}: expected {file}, got no such file; download it again") from error
        except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
            raise DatasetError(f"{file} cannot be read: {error}; download it again") from error
