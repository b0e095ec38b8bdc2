"""Demonstrations on disk: LIBERO's own HDF5 files, and a small archive of the same for moving them to another machine.

    write_demos("<task name>_demo.hdf5", [demo, ...])          # all or nothing
    for demo in read_demos(path, size=224): ...                # LIBERO's human demonstrations as well
    pack([path, ...], "suite.zip")                             # a suite in some tens of megabytes
    for demo in read_packed("suite.zip", size=112): ...

HDF5 files hold frames as LIBERO has them (upside down), a `Demo` as openpi's client sends them (rotated by 180°). The
archive is a zip with one H.264 video per episode and camera, one .npz with the exact numbers, and an index; reading it
needs no h5py. numpy only; no device.
"""

import contextlib
import io
import json
import os
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import imageio.v2 as imageio
import numpy as np

from safe_pruner_jax.robots.transforms import resize_with_pad

CAMERAS = {"observation/image": "agentview_rgb", "observation/wrist_image": "eye_in_hand_rgb"}
"""Key of a request to the policy -> dataset of LIBERO's files."""

EXTRA = {"states": "states", "robot_states": "robot_states", "joint_states": "obs/joint_states"}
"""Key of `Demo.extra` -> dataset of LIBERO's files."""
_FORMAT = "safe-pruner-jax demonstrations 1"
_CONTROL_RATE = 20  # Hz; the frame rate of packed videos
_LABELS = ("prompt", "suite", "task", "name", "seed", "every")


@dataclass(frozen=True, eq=False)
class Demo:
    """One successful episode of T steps; row t is what was seen before the t-th action.

    Args:
      images: CAMERAS' keys -> uint8 [F, S, S, 3], in openpi's orientation.
      state: float32 [T, 8], end-effector position (m) 3, rotation vector (rad) 3, fingers (m) 2.
      actions: float32 [T, 7], translation 3, rotation 3, gripper (-1 open, 1 closed).
      prompt: what the robot was told.
      suite: benchmark suite; "" if the file does not say.
      task: the task's index in its suite; -1 if the file does not say.
      name: the task's name.
      seed: of the episode; -1 if there is none (human demonstrations).
      every: there is a frame of every so many-th step, F = ceil(T / every); 1 in LIBERO's own files.
      extra: EXTRA's keys -> float64 [T, n], where known: the simulator's flattened state (time, positions, velocities);
        fingers 2, end-effector position 3 and quaternion (x y z w) 4; the arm's joint angles (rad) 7.
    """

    images: dict[str, np.ndarray]
    state: np.ndarray
    actions: np.ndarray
    prompt: str
    suite: str = ""
    task: int = -1
    name: str = ""
    seed: int = -1
    every: int = 1
    extra: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self):
        steps = len(self.actions)
        shapes = {"actions": (self.actions.shape, (steps, 7)), "state": (self.state.shape, (steps, 8))}
        shapes |= {key: (rows.shape[:1], (steps,)) for key, rows in self.extra.items()}
        for key, frames in self.images.items():
            shapes[key] = (frames.shape, (-(-steps // self.every), *frames.shape[1:2] * 2, 3))
        wrong = [f"{key} {list(shape)}" for key, (shape, expected) in shapes.items() if shape != expected]
        if steps == 0 or wrong or set(self.images) != set(CAMERAS):
            raise ValueError(f"not a demonstration of {steps} steps: cameras {sorted(self.images)}, {', '.join(wrong)}")

    def __len__(self) -> int:
        return len(self.actions)


def subtasks(grippers: Iterable[float]) -> np.ndarray:
    """Number of the subtask at every call: how often the commanded gripper has changed since the episode began.

    0 is the approach, 1 the carrying, 2 what follows the release, and so on for longer tasks. SAFE-Pruner (Sec. 3.2,
    Fig. 3) speaks of "pick up" and "place" without a rule; the executed command is one that needs no labels.

    Args:
      grippers: commands, open ≤ 0 < closed, one per call.

    Returns:
      int32, one per call.

    >>> subtasks([-1, -1, 1, 1, -1])
    array([0, 0, 1, 1, 2], dtype=int32)
    """
    closed = np.asarray(list(grippers), np.float64) > 0
    return np.cumsum(np.diff(closed, prepend=closed[:1]), dtype=np.int32)


class Packed(NamedTuple):
    """What packing made of one episode: bytes in the archive, PSNR (dB) of each camera's decoded frames."""

    name: str
    seed: int
    steps: int
    bytes: int
    psnr: dict[str, float]


# ------------------------------------------------------------------------------------------------ LIBERO's HDF5 files


def write_demos(path: str | Path, demos: Iterable[Demo], env_args: dict[str, Any] | None = None) -> None:
    """Writes a task's episodes as one of LIBERO's files, replacing it in one step when everything is on disk.

    After an exception, such as OSError when the disk is full, what was at `path` before is still there.

    Args:
      path: `<task name>_demo.hdf5` is what LIBERO's tools look for.
      demos: of one task.
      env_args: how the simulator was built, for LIBERO's attribute of that name; JSON.
    """
    with _new_hdf5(path) as file:
        data = file.create_group("data")
        for number, demo in enumerate(demos):
            if number == 0:
                _write_attributes(data, demo, env_args or {})
            _write_episode(data.create_group(f"demo_{number}"), demo)
        _count(data)


def merge_demos(paths: Iterable[str | Path], path: str | Path) -> int:
    """Copies the episodes of files of one task into one file, each seed once; returns how many there are.

    `path` itself may be among the sources; it is replaced at the end.
    """
    import h5py

    seen = set()
    with _new_hdf5(path) as file:
        data = file.create_group("data")
        for source in paths:
            with h5py.File(source, "r") as other:
                for key, value in other["data"].attrs.items():
                    data.attrs.setdefault(key, value)
                for name in _episodes(other["data"]):
                    seed = int(other["data"][name].attrs.get("seed", -1))
                    if seed < 0 or seed not in seen:
                        seen.add(seed)
                        other.copy(other["data"][name], data, f"demo_{len(data)}")
        _count(data)
        return len(data)


def seeds(path: str | Path) -> list[int]:
    """The seeds of a file's episodes."""
    import h5py

    with h5py.File(path, "r") as file:
        return [int(file["data"][name].attrs.get("seed", -1)) for name in _episodes(file["data"])]


def read_demos(path: str | Path, *, size: int | None = None) -> Iterator[Demo]:
    """The episodes of one of LIBERO's files, human or scripted, in order.

    Args:
      size: S of the images, resized if the file has others; None keeps the file's.

    Raises:
      OSError, ValueError: for a file that is not HDF5, for one without LIBERO's datasets.
    """
    import h5py

    if not h5py.is_hdf5(Path(path)):
        what = "another file" if Path(path).is_file() else "no such file"
        raise OSError(
            f"{path}: expected LIBERO's demonstrations in HDF5, got {what}; scripts/collect_demos.py makes some"
        )
    with h5py.File(path, "r") as file:
        try:
            data = file["data"]
            for name in _episodes(data):
                yield _read_episode(data[name], data.attrs, Path(path), size)
        except KeyError as error:
            raise ValueError(f"{path} is not a file of LIBERO's demonstrations: {error}") from error


@contextlib.contextmanager
def _new_hdf5(path: str | Path) -> Iterator[Any]:
    import h5py

    with _replacing(Path(path)) as partial, h5py.File(partial, "w") as file:
        yield file


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A name to write to; what is there afterwards is moved to `path`, or removed after an exception."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _episodes(data: Any) -> list[str]:
    return sorted((key for key in data if re.fullmatch(r"demo_\d+", key)), key=lambda key: int(key[5:]))


def _count(data: Any) -> None:
    data.attrs["num_demos"] = len(data)
    data.attrs["total"] = sum(int(episode.attrs["num_samples"]) for episode in data.values())


def _write_attributes(data: Any, demo: Demo, env_args: dict[str, Any]) -> None:
    problem = {"problem_name": env_args.get("problem_name", ""), "domain_name": "robosuite"}
    data.attrs["problem_info"] = json.dumps({**problem, "language_instruction": demo.prompt})
    data.attrs["env_args"] = json.dumps(env_args)
    data.attrs["env_name"] = env_args.get("env_name", "")
    data.attrs["bddl_file_name"] = env_args.get("bddl_file", "")
    data.attrs["macros_image_convention"] = "opengl"  # frames are upside down
    data.attrs["tag"] = _FORMAT


def _write_episode(group: Any, demo: Demo) -> None:
    obs, steps = group.create_group("obs"), len(demo)
    for key, name in CAMERAS.items():
        raw = demo.images[key][:, ::-1, ::-1]
        obs.create_dataset(name, data=raw, chunks=(1, *raw.shape[1:]), compression="gzip", compression_opts=4)
    state = demo.state.astype(np.float64)
    columns = {"ee_pos": (0, 3), "ee_ori": (3, 6), "ee_states": (0, 6), "gripper_states": (6, 8)}
    for name, (start, stop) in columns.items():
        obs.create_dataset(name, data=state[:, start:stop])
    for key, rows in demo.extra.items():
        group.create_dataset(EXTRA[key], data=rows, compression="gzip")
    group.create_dataset("actions", data=demo.actions.astype(np.float64))
    last = (np.arange(steps) == steps - 1).astype(np.uint8)
    group.create_dataset("rewards", data=last)
    group.create_dataset("dones", data=last)
    group.attrs["num_samples"] = steps
    if "states" in demo.extra:
        group.attrs["init_state"] = demo.extra["states"][0]
    group.attrs.update({key: getattr(demo, key) for key in ("suite", "task", "name", "seed", "every")})


def _read_episode(group: Any, about: Any, path: Path, size: int | None) -> Demo:
    obs, attrs = group["obs"], group.attrs
    state = np.concatenate([obs["ee_states"][:, :6], obs["gripper_states"][:, :2]], axis=1)
    instruction = json.loads(about["problem_info"])["language_instruction"]  # human files: sometimes a list, or quoted
    parent = path.parent.name
    return Demo(
        images={key: _resized(obs[name][:][:, ::-1, ::-1], size) for key, name in CAMERAS.items()},
        state=state.astype(np.float32),
        actions=group["actions"][:].astype(np.float32),
        prompt="".join(instruction).strip('"'),
        suite=str(attrs.get("suite", parent if parent.startswith("libero_") else "")),
        task=int(attrs.get("task", -1)),
        name=str(attrs.get("name", path.stem.removesuffix("_demo"))),
        seed=int(attrs.get("seed", -1)),
        every=int(attrs.get("every", 1)),
        extra={key: group[name][:] for key, name in EXTRA.items() if name in group},
    )


def _resized(frames: np.ndarray, size: int | None) -> np.ndarray:
    if size is None or frames.shape[1:3] == (size, size):
        return np.ascontiguousarray(frames)
    return np.stack([resize_with_pad(frame, size, size) for frame in frames])


# ------------------------------------------------------------------------------------------------- the small archive


def pack(
    paths: Iterable[str | Path],
    out: str | Path,
    *,
    size: int | None = None,
    crf: int = 20,
    on_demo: Callable[[Packed], None] = lambda packed: None,
) -> list[Packed]:
    """Packs the episodes of LIBERO's files into one archive, which appears at `out` when it is complete.

    Args:
      size: S of the packed frames; None keeps the files'.
      crf: H.264's constant rate factor: 18 to 24, less is better and larger.
      on_demo: called with each episode's size and fidelity; the list of them is returned.
    """
    done: list[Packed] = []
    index: list[dict[str, Any]] = []
    with _replacing(Path(out)) as partial, zipfile.ZipFile(partial, "w") as archive:
        for path in paths:
            for demo in read_demos(path, size=size):
                folder, total, psnr = f"{len(index):05d}", 0, {}
                for key, frames in demo.images.items():
                    video = _encode(frames, crf)
                    archive.writestr(f"{folder}/{CAMERAS[key]}.mp4", video)
                    total, psnr[key] = total + len(video), _psnr(frames, _decode(video, frames.shape))
                numbers = io.BytesIO()
                np.savez_compressed(numbers, state=demo.state, actions=demo.actions, **demo.extra)
                archive.writestr(f"{folder}/numbers.npz", numbers.getvalue())
                side = demo.images["observation/image"].shape[1]
                index.append({"folder": folder, "side": side, **{key: getattr(demo, key) for key in _LABELS}})
                done.append(Packed(demo.name, demo.seed, len(demo), total + numbers.tell(), psnr))
                on_demo(done[-1])
        archive.writestr("index.json", json.dumps({"format": _FORMAT, "demos": index}, indent=1))
    return done


def packed_index(path: str | Path) -> list[dict[str, Any]]:
    """What is in an archive, without decoding it: per episode prompt, suite, task, name, seed, side of the frames."""
    try:
        with zipfile.ZipFile(path) as archive:
            index = json.loads(archive.read("index.json"))
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"{path}: expected LIBERO's HDF5 or a packed archive of episodes, got another file") from error
    if index.get("format") != _FORMAT:
        raise ValueError(f"{path}: expected the format {_FORMAT!r}, found {index.get('format')!r}")
    return index["demos"]


def read_packed(path: str | Path, *, size: int | None = None, only: Iterable[int] | None = None) -> Iterator[Demo]:
    """The episodes of an archive; decoding one takes about 0.3 s.

    Args:
      size: S of the images, resized if the archive has others; None keeps the archive's.
      only: positions in `packed_index`, e.g. one worker's share; None reads all.
    """
    index = packed_index(path)
    with zipfile.ZipFile(path) as archive:
        for position in range(len(index)) if only is None else only:
            entry = index[position]
            with np.load(io.BytesIO(archive.read(f"{entry['folder']}/numbers.npz"))) as file:
                numbers = dict(file)
            entry.setdefault("every", 1)
            shape = (-(-len(numbers["actions"]) // entry["every"]), entry["side"], entry["side"], 3)
            video = lambda name, folder=entry["folder"]: archive.read(f"{folder}/{name}.mp4")
            images = {key: _resized(_decode(video(name), shape), size) for key, name in CAMERAS.items()}
            state, actions = numbers.pop("state"), numbers.pop("actions")
            yield Demo(images, state, actions, **{key: entry[key] for key in _LABELS}, extra=numbers)


def _encode(frames: np.ndarray, crf: int) -> bytes:
    """Frames uint8 [T, S, S, 3] -> an H.264 file; odd sides are padded, `_decode` crops."""
    frames = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), "edge")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "video.mp4")
        options = {"codec": "libx264", "pixelformat": "yuv420p", "quality": None, "macro_block_size": 1}
        options["output_params"] = ["-crf", str(crf), "-preset", "slow", "-threads", "1"]
        with imageio.get_writer(file, fps=_CONTROL_RATE, ffmpeg_log_level="error", **options) as writer:
            for frame in frames:
                writer.append_data(frame)
        return file.read_bytes()


def _decode(video: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """An H.264 file -> frames uint8 of a known shape [T, S, S, 3].

    Raises ValueError for a video with another number of frames.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "video.mp4")
        file.write_bytes(video)
        with imageio.get_reader(file) as reader:
            frames = [frame[: shape[1], : shape[2]] for frame in reader.iter_data()]
    if len(frames) != shape[0]:
        raise ValueError(f"a video of {len(frames)} frames where {shape[0]} were expected")
    return np.stack(frames)


def _psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio over all frames, dB; inf for equal ones."""
    error = np.mean([np.square(x.astype(np.float32) - y).mean() for x, y in zip(a, b, strict=True)])
    return float(np.inf if error == 0 else 10 * np.log10(255.0**2 / error))
