"""Reads a dataset of `openpi export` with the `lerobot` package itself, and compares it with this package's reader.

Not in the tests: it needs PyTorch. A throw-away environment, without CUDA:

    python -m venv /tmp/venv-lerobot
    pip="/tmp/venv-lerobot/bin/pip install"
    $pip --no-deps torch==2.13.0+cpu torchvision==0.21.0 lerobot==0.4.4    # torch: any build for CPUs
    $pip numpy pyarrow av==15.1.0 pillow pandas datasets huggingface_hub jsonlines packaging draccus einops deepdiff
    $pip sympy networkx jinja2 fsspec filelock typing_extensions
    PYTHONPATH=. /tmp/venv-lerobot/bin/python scripts/check_lerobot.py my_dataset

Every row is read, every frame decoded with PyAV. Exit code 0 when all of it is equal.
"""

import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

# torchvision's compiled half does not load beside another build of torch. lerobot calls nothing of it, its import does.
_ops = torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    _ops.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from lerobot.datasets.lerobot_dataset import LeRobotDataset  # noqa: E402

from safe_pruner_jax.lerobot.dataset import Dataset  # noqa: E402

PIXELS = 1.0
"""Largest mean difference of a decoded frame, of 255: two conversions from YUV."""


def main(folder: str) -> int:
    """Prints what was read; 1 if a value differs from what this package reads."""
    ours = Dataset(Path(folder))
    begin = time.perf_counter()
    theirs = LeRobotDataset("local/check", root=folder, video_backend="pyav")
    rows, frames, worst, columns = 0, 0, 0.0, set()
    for episode in ours.episodes():
        films = {camera: episode.frames(camera) for camera in ours.cameras}
        features = {key: episode.column(key) for key in ours.info["features"] if key not in ours.cameras}
        for t in range(len(episode)):
            row = theirs[rows]
            if row["task"] != episode.task:
                print(f"row {rows}: expected the task {episode.task!r}, got {row['task']!r}", file=sys.stderr)
                return 1
            for key, values in features.items():
                got = row[key].numpy().reshape(np.shape(values[t]))
                if not np.array_equal(got, values[t].astype(got.dtype), equal_nan=got.dtype.kind == "f"):
                    print(f"row {rows}, {key}: expected {values[t]}, got {got}", file=sys.stderr)
                    return 1
            for camera, film in films.items():
                got = np.moveaxis(255 * row[camera].numpy(), 0, -1)
                worst, frames = max(worst, float(np.abs(got - next(film)).mean())), frames + 1
            columns, rows = {*columns, *features}, rows + 1
    ok = rows == len(theirs) and worst <= PIXELS
    packages = ", ".join(f"{name} {version(name)}" for name in ("lerobot", "torch", "av", "datasets"))
    print(f"{packages}: {theirs.num_episodes} episodes, {rows} of {len(theirs)} rows, {len(columns)} columns equal;")
    print(f"{frames} frames decoded, largest mean difference {worst:.3f} of 255; {time.perf_counter() - begin:.1f} s")
    return 0 if ok else 1


if __name__ == "__main__":
    if len(sys.argv) != 2:
        print(f"expected the folder of a dataset, got {len(sys.argv) - 1} arguments\n\n{__doc__}", file=sys.stderr)
        sys.exit(2)
    sys.exit(main(sys.argv[1]))
