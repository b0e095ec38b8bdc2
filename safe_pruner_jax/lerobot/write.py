"""A LeRobotDataset v3.0, written episode by episode.

    with Writer(folder, fps=20, robot="LIBERO") as writer:
        writer.add("pick up the bowl", {"observation.images.base_0_rgb": frames}, {"action": actions, …})

Every episode has a parquet file and a video per camera of its own; `meta/` appears when all of them are there, so an
interrupted export is no dataset.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from safe_pruner_jax.lerobot.dataset import INFO
from safe_pruner_jax.lerobot.libraries import DatasetError, arrow, parquet
from safe_pruner_jax.lerobot.video import write_frames

CHUNK = 1000
"""Files per folder."""

_PLACE = "chunk-{chunk_index:03d}/file-{file_index:03d}"
_DATA, _VIDEO = f"data/{_PLACE}.parquet", f"videos/{{video_key}}/{_PLACE}.mp4"
_OWN = ("timestamp", "frame_index", "episode_index", "index", "task_index")
_SAMPLED = 100  # frames of a video that its statistics look at


class Writer:
    """Writes a dataset to a folder that is new or empty.

    Args:
      folder: of the dataset.
      fps: rows per second.
      robot: its name, for `info.json`.

    Raises:
      DatasetError: something is there, or the extra `lerobot` is not installed.
    """

    def __init__(self, folder: Path, fps: int, robot: str):
        self.folder, self.fps, self.robot = Path(folder), fps, robot
        if self.folder.exists() and any(self.folder.iterdir()):
            raise DatasetError(f"out: expected a folder that is new or empty, got {folder}; give another")
        parquet()
        self._features: dict[str, dict[str, Any]] = {}
        self._tasks: dict[str, int] = {}
        self._episodes: list[dict[str, Any]] = []
        self._rows = 0

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if error is None:
            self.close()

    def __len__(self) -> int:
        return len(self._episodes)

    def add(self, task: str, videos: Mapping[str, Iterable[np.ndarray]], columns: Mapping[str, np.ndarray]) -> None:
        """Writes one episode of T rows.

        Args:
          task: what the robot was told.
          videos: feature → T frames uint8 [H, W, 3].
          columns: feature → [T, …]; booleans, integers or floats.

        Raises:
          DatasetError: other features or shapes than the episodes before, or columns of different lengths.
        """
        number = len(self._episodes)
        place = {"chunk_index": number // CHUNK, "file_index": number % CHUNK}
        shaped = {key: rows[:, None] if rows.ndim == 1 else rows for key, rows in columns.items()}
        length = len(next(iter(shaped.values())))
        features = {key: _feature(rows) for key, rows in shaped.items()}
        stats = {key: _statistics(rows) for key, rows in shaped.items()}
        for key, frames in videos.items():
            film = _Film(frames)
            count, height, width = write_frames(self.folder / _VIDEO.format(video_key=key, **place), film, self.fps)
            stats[key], features[key] = film.statistics(), _video_feature(height, width, self.fps)
            shaped[key] = np.empty(count)
        self._check(features, {key: len(rows) for key, rows in shaped.items()})
        indices = self._indices(number, length, self._tasks.setdefault(task, len(self._tasks)))
        stats |= {key: _statistics(rows[:, None]) for key, rows in indices.items()}
        table = {key: _arrow(rows) for key, rows in shaped.items() if key not in videos}
        table |= {key: arrow().array(rows) for key, rows in indices.items()}
        self._write(arrow().table(table), _DATA.format(**place))
        self._episodes.append(self._about(number, task, length, place, list(videos), stats))
        self._rows += length

    def close(self) -> None:
        """Writes `meta/`; what `add` wrote is a dataset from now on.

        Raises:
          DatasetError: there is no episode.
        """
        if not self._episodes:
            raise DatasetError("data: expected at least one episode, got none; give other files")
        at = (self.folder / INFO).parent
        at.mkdir(parents=True, exist_ok=True)
        about = [{key: value for key, value in row.items() if key != "stats"} for row in self._episodes]
        for row, episode in zip(about, self._episodes, strict=True):
            row |= {f"stats/{key}/{name}": v for key, values in episode["stats"].items() for name, v in values.items()}
        self._write(
            arrow().Table.from_pylist(about), f"meta/episodes/{_PLACE.format(chunk_index=0, file_index=0)}.parquet"
        )
        self._write(_tasks(self._tasks), "meta/tasks.parquet")
        _write_json(at / "stats.json", _pooled([row["stats"] for row in self._episodes]))
        _write_json(at / "info.json", self._info())

    def _check(self, features: dict[str, dict[str, Any]], lengths: dict[str, int]) -> None:
        if len(set(lengths.values())) != 1:
            raise DatasetError(f"expected as many rows in every column, got {lengths}")
        self._features = self._features or features
        if differing := [key for key in {**features, **self._features} if features.get(key) != self._features.get(key)]:
            shapes = lambda of: {key: of[key]["shape"] for key in differing if key in of}
            raise DatasetError(
                f"episode {len(self)}: expected {shapes(self._features)} as in the episodes before, got "
                f"{shapes(features)}; export them into a folder of their own"
            )

    def _indices(self, number: int, length: int, task: int) -> dict[str, np.ndarray]:
        frame = np.arange(length)
        constant = lambda value: np.full(length, value, np.int64)
        values = ((frame / self.fps).astype(np.float32), frame, constant(number), frame + self._rows, constant(task))
        return dict(zip(_OWN, values, strict=True))

    def _about(
        self, number: int, task: str, length: int, place: dict[str, int], videos: list[str], stats: dict[str, Any]
    ) -> dict[str, Any]:
        row: dict[str, Any] = {"episode_index": number, "tasks": [task], "length": length}
        row |= {"dataset_from_index": self._rows, "dataset_to_index": self._rows + length}
        row |= {f"data/{key}": value for key, value in place.items()}
        row |= {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}
        for key in videos:
            row |= {f"videos/{key}/{name}": value for name, value in place.items()}
            row |= {f"videos/{key}/from_timestamp": 0.0, f"videos/{key}/to_timestamp": length / self.fps}
        return row | {"stats": stats}

    def _info(self) -> dict[str, Any]:
        scalar = {key: {"dtype": "int64", "shape": [1], "names": None} for key in _OWN}
        scalar["timestamp"]["dtype"] = "float32"
        return {
            "codebase_version": "v3.0",
            "robot_type": self.robot,
            "total_episodes": len(self),
            "total_frames": self._rows,
            "total_tasks": len(self._tasks),
            "chunks_size": CHUNK,
            "data_files_size_in_mb": 100,
            "video_files_size_in_mb": 200,
            "fps": self.fps,
            "splits": {"train": f"0:{len(self)}"},
            "data_path": _DATA,
            "video_path": _VIDEO,
            "features": self._features | scalar,
        }

    def _write(self, table: Any, name: str) -> None:
        file = self.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        parquet().write_table(table, file)


class _Film:
    """Frames on their way into a video; some of them are kept for statistics."""

    def __init__(self, frames: Iterable[np.ndarray]):
        self._frames, self._kept, self._stride = frames, [], 1

    def __iter__(self):
        for number, frame in enumerate(self._frames):
            if number % self._stride == 0:
                self._kept.append(frame[::4, ::4])
            if len(self._kept) > _SAMPLED:
                self._kept, self._stride = self._kept[::2], 2 * self._stride
            yield frame

    def statistics(self) -> dict[str, Any]:
        """Per channel, of values in [0, 1], shaped [3, 1, 1] as LeRobot has them."""
        pixels = np.stack(self._kept).reshape(-1, 3) / 255.0
        statistics = _statistics(pixels)
        per_channel = {
            key: np.reshape(value, (3, 1, 1)).tolist() for key, value in statistics.items() if key != "count"
        }
        return per_channel | {"count": [len(self._kept)]}


def _feature(rows: np.ndarray) -> dict[str, Any]:
    return {"dtype": rows.dtype.name, "shape": list(rows.shape[1:]), "names": None}


def _video_feature(height: int, width: int, fps: int) -> dict[str, Any]:
    info = {"video.height": height, "video.width": width, "video.codec": "h264", "video.pix_fmt": "yuv420p"}
    info |= {"video.is_depth_map": False, "video.fps": fps, "video.channels": 3, "has_audio": False}
    names = ["height", "width", "channels"]
    return {"dtype": "video", "shape": [height, width, 3], "names": names, "info": info}


def _statistics(rows: np.ndarray) -> dict[str, Any]:
    """Of [T, …] over the first axis; values that are not finite (κ of a first call) are left out."""
    values = np.where(np.isfinite(rows), rows, 0.0) if rows.dtype.kind == "f" else rows.astype(np.float64)
    statistics = {"min": values.min(0), "max": values.max(0), "mean": values.mean(0), "std": values.std(0)}
    statistics |= {f"q{q:02d}": np.quantile(values, q / 100, axis=0) for q in (1, 10, 50, 90, 99)}
    return {key: np.asarray(value, np.float64).tolist() for key, value in statistics.items()} | {"count": [len(values)]}


def _pooled(episodes: list[dict[str, Any]]) -> dict[str, Any]:
    """Statistics of all episodes together; quantiles are means of theirs, as LeRobot pools them."""
    statistics = {}
    for key in episodes[0]:
        count = np.array([episode[key]["count"][0] for episode in episodes], np.float64)
        of = lambda name, key=key: np.array([episode[key][name] for episode in episodes], np.float64)
        weight = (count / count.sum()).reshape(-1, *[1] * (of("mean").ndim - 1))
        mean = (weight * of("mean")).sum(0)
        var = (weight * (np.square(of("std")) + np.square(of("mean") - mean))).sum(0)
        pooled = {"min": of("min").min(0), "max": of("max").max(0), "mean": mean, "std": np.sqrt(var)}
        pooled |= {name: (weight * of(name)).sum(0) for name in episodes[0][key] if name.startswith("q")}
        statistics[key] = {name: value.tolist() for name, value in pooled.items()} | {"count": [int(count.sum())]}
    return statistics


def _arrow(rows: np.ndarray) -> Any:
    """[T, …] as nested lists, of a fixed length where there is one axis; [T, 1] as plain values."""
    library = arrow()
    if rows.shape[1:] == (1,):
        return library.array(rows[:, 0])
    flat = library.array(np.ascontiguousarray(rows).reshape(-1))
    sizes = rows.shape[1:]
    if len(sizes) == 1:
        return library.FixedSizeListArray.from_arrays(flat, sizes[0])
    for size in reversed(sizes):
        offsets = np.arange(0, len(flat) + 1, size, dtype=np.int32)
        flat = library.ListArray.from_arrays(library.array(offsets), flat)
    return flat


def _tasks(tasks: Mapping[str, int]) -> Any:
    """The table of tasks; the text is the index of the data frame that LeRobot reads it as."""
    library = arrow()
    table = library.table({"task_index": list(tasks.values()), "task": list(tasks)})
    kinds = {"task_index": ("int64", "int64"), "task": ("unicode", "object")}
    columns = [
        {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": numpy, "metadata": None}
        for name, (kind, numpy) in kinds.items()
    ]
    index = {"index_columns": ["task"], "column_indexes": [], "columns": columns, "pandas_version": "2.0.0"}
    return table.replace_schema_metadata({"pandas": json.dumps(index)})


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=4) + "\n", encoding="utf-8")
