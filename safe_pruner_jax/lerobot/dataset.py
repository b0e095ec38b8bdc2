"""A LeRobotDataset on disk, versions 2.x and 3.0, episode by episode.

    data = Dataset("my_dataset")
    for episode in data.episodes():
        episode.column("action")                  [T, n]
        for frame in episode.frames("image"): …   uint8 [H, W, 3]

2.x has a parquet file and a video per episode and camera; 3.0 has many episodes in a file, and `meta/episodes` says
where. Everything is lazy, so memory does not grow with the dataset: there are the table of episodes, one data file (the
last that was asked for; LeRobot writes about 100 MB into each), and the frame that is being decoded.
"""

import functools
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
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


def require_local(path: str | Path) -> None:
    """Raises DatasetError for what names a dataset of the Hugging Face hub and is no file or folder here.

    Nothing is downloaded by itself: a dataset may have hundreds of gigabytes.
    """
    text = re.sub(r"^hf:/+(datasets/)?", "", str(path))
    remote = text != str(path)
    if remote or (not Path(path).exists() and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w-]*", text)):
        name = "/".join(text.split("/")[:2])
        raise DatasetError(
            f"data: expected a file or folder that is here, got {'hf://' * remote}{text}; fetch it with "
            f"`hf download {name} --repo-type dataset --local-dir FOLDER` and give the folder"
        )


@dataclass(frozen=True, eq=False)
class Episode:
    """One episode; its rows are read when they are asked for.

    Args:
      index: in the dataset.
      length: T.
      read: its rows, of parquet.
      tasks: of the dataset, number → text.
      features: of the dataset, `info.json`'s.
      videos: camera → its file and the time of the first frame in it, seconds.
      fps: rows per second.
    """

    index: int
    length: int
    read: Callable[[], Any]
    tasks: Mapping[int, str]
    features: Mapping[str, Any]
    videos: Mapping[str, tuple[Path, float]]
    fps: float

    def __len__(self) -> int:
        return self.length

    @property
    def task(self) -> str:
        """What the robot was told.

        Raises:
          DatasetError: a number without a text.
        """
        number = int(self.column("task_index")[0])
        if number not in self.tasks:
            raise DatasetError(f"expected a task {number} in meta/, got {len(self.tasks)} others; download it again")
        return self.tasks[number]

    def column(self, name: str) -> np.ndarray:
        """A column of numbers, [T] or [T, …] as the feature's shape says.

        Raises:
          DatasetError: no such column, or rows of different lengths.
        """
        try:
            rows = np.asarray(self._cells(name).to_pylist())
            if rows.dtype.kind not in "bifu":
                raise ValueError(f"got {rows.dtype}")
        except ValueError as error:  # NumPy's, of rows of different lengths
            expected = f"episode {self.index}: expected numbers, equally many in each row of {name}"
            raise DatasetError(f"{expected} ({error}); choose another column") from error
        shape = tuple(self.features.get(name, {}).get("shape", rows.shape[1:]))
        return rows if shape in ((1,), rows.shape[1:]) else rows.reshape(len(rows), *shape)

    def frames(self, camera: str) -> Iterator[np.ndarray]:
        """The frames of a camera, uint8 [H, W, 3] each."""
        if camera in self.videos:
            file, start = self.videos[camera]
            yield from read_frames(file, start, len(self), self.fps)
            return
        for number, cell in enumerate(self._cells(camera)):
            data = (cell.as_py() or {}).get("bytes")
            if data is None:
                raise DatasetError(
                    f"episode {self.index}, row {number}: expected a picture in {camera}, got none; write the dataset "
                    "with its pictures in its parquet files, or as videos"
                )
            try:
                yield np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
            except OSError as error:
                where = f"episode {self.index}, row {number}"
                raise DatasetError(f"{where}: {camera} cannot be decoded: {error}; download it again") from error

    def _cells(self, name: str) -> Any:
        table = self.read()
        if name not in table.column_names:
            columns = ", ".join(table.column_names)
            raise DatasetError(f"expected a column {name}, got {columns}; choose the configuration of this robot")
        return table.column(name)


@dataclass(frozen=True)
class Dataset:
    """A folder with `meta/info.json`.

    Raises:
      DatasetError: not a dataset, a version that is not known, a file that is missing or corrupt.
    """

    folder: Path
    info: Mapping[str, Any] = field(init=False, hash=False)
    _file: Callable[[Path], Any] = field(init=False, hash=False, compare=False, repr=False)

    def __post_init__(self):
        folder = Path(self.folder)
        object.__setattr__(self, "folder", folder)
        object.__setattr__(self, "_file", functools.lru_cache(1)(self._read))
        try:
            info = json.loads((folder / INFO).read_text(encoding="utf-8"))
            version = info["codebase_version"]
            _ = int(info["total_episodes"]), int(info["total_frames"]), float(info["fps"]), str(info["data_path"])
            _ = {feature["dtype"] for feature in info["features"].values()}
        except FileNotFoundError as error:
            require_local(folder)
            raise DatasetError(f"expected a LeRobot dataset at {folder}, got no {INFO} there") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
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
        third = str(self.info["codebase_version"]).startswith("v3")
        moving = [key for key in self.cameras if self.info["features"][key]["dtype"] == "video"]
        try:
            yield from (self._third if third else self._second)(self._tasks(), moving)
        except KeyError as error:
            where = f"{self.folder / 'meta'}: expected the entry {error} of every episode"
            raise DatasetError(f"{where}, got one without; download the dataset again") from error

    def _tasks(self) -> dict[int, str]:
        """Number → text."""
        lines = self.folder / "meta/tasks.jsonl"
        rows = _lines(lines) if lines.is_file() else self._read(self.folder / "meta/tasks.parquet").to_pylist()
        # pandas keeps its index, the text, under a name of its own
        text = lambda row: row["task"] if "task" in row else row["__index_level_0__"]
        return {int(row["task_index"]): str(text(row)) for row in rows}

    def _second(self, tasks: Mapping[int, str], moving: Sequence[str]) -> Iterator[Episode]:
        for row in _lines(self.folder / "meta/episodes.jsonl"):
            index, length = row["episode_index"], row["length"]
            place = {"episode_index": index, "episode_chunk": index // int(self.info.get("chunks_size", 1000))}
            file = self.folder / self.info["data_path"].format(**place)
            named = lambda key, place=place: self.folder / self.info["video_path"].format(video_key=key, **place)
            videos = {key: (named(key), 0.0) for key in moving}
            read = functools.partial(self._rows, file, length)
            yield Episode(index, length, read, tasks, self.info["features"], videos, fps=self.fps)

    def _third(self, tasks: Mapping[int, str], moving: Sequence[str]) -> Iterator[Episode]:
        files = sorted((self.folder / "meta/episodes").glob("*/*.parquet"))
        if not files:
            raise DatasetError(f"{self.folder}: expected meta/episodes/*/*.parquet, got none; download it again")
        parts = ("chunk_index", "file_index")
        columns = ["episode_index", "length", "dataset_from_index", *(f"data/{part}" for part in parts)]
        columns += [f"videos/{key}/{part}" for key in moving for part in (*parts, "from_timestamp")]
        for row in (row for file in files for row in self._read(file, columns).to_pylist()):
            of = lambda what, row=row: {part: row[f"{what}/{part}"] for part in parts}
            file, length = self.folder / self.info["data_path"].format(**of("data")), row["length"]
            videos = {}
            for key in moving:
                video = self.folder / self.info["video_path"].format(video_key=key, **of(f"videos/{key}"))
                videos[key] = video, float(row[f"videos/{key}/from_timestamp"])
            read = functools.partial(self._rows, file, length, row["dataset_from_index"])
            yield Episode(row["episode_index"], length, read, tasks, self.info["features"], videos, fps=self.fps)

    def _rows(self, file: Path, length: int, start: int | None = None) -> Any:
        """An episode's rows; with `start`, the index of its first row in the dataset, out of a file of several."""
        rows = self._file(file)
        if start is not None:
            rows = rows.slice(start - rows.column("index")[0].as_py(), length)
        if len(rows) != length:
            raise DatasetError(f"{file}: expected {length} rows of an episode, got {len(rows)}; download it again")
        return rows

    def _read(self, file: Path, columns: Sequence[str] | None = None) -> Any:
        library = parquet()
        try:
            return library.read_table(file, columns=columns)
        except FileNotFoundError as error:
            raise DatasetError(f"{self.folder}: expected {file}, got no such file; download it again") from error
        except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
            raise DatasetError(f"{file} cannot be read: {error}; download it again") from error


def _lines(file: Path) -> list[dict[str, Any]]:
    """Objects of a JSON-lines file."""
    try:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line]
    except FileNotFoundError as error:
        raise DatasetError(f"expected {file}, got no such file; download the dataset again") from error
    except ValueError as error:
        raise DatasetError(f"{file} is corrupt ({error}); download the dataset again") from error
