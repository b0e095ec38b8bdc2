"""Frames of a video file, and a video file of frames."""

from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np

from safe_pruner_jax.lerobot.libraries import DatasetError, av


def read_frames(file: Path, start: float, count: int, fps: float) -> Iterator[np.ndarray]:
    """The frames of an episode, in order, decoded one by one.

    Args:
      file: of the video; it may hold several episodes.
      start: time of the first frame, seconds.
      count: frames.
      fps: of the dataset.

    Yields:
      uint8 [H, W, 3].

    Raises:
      DatasetError: no such file, one that cannot be decoded, or one with fewer frames.
    """
    library = av()
    if not file.is_file():
        raise DatasetError(f"expected the video {file}, got no such file; download the dataset again, with its videos")
    number, first = 0, start - 0.5 / fps
    try:
        with library.open(str(file)) as container:
            stream = container.streams.video[0]
            if start > 0:
                container.seek(max(0, int(first / stream.time_base)), stream=stream)  # to the key frame before
            for frame in container.decode(stream):
                if frame.pts is not None and float(frame.pts * stream.time_base) < first:
                    continue
                yield frame.to_ndarray(format="rgb24")
                if (number := number + 1) == count:
                    return
    except library.FFmpegError as error:
        raise DatasetError(f"{file} cannot be decoded: {error}; download it again") from error
    raise DatasetError(f"{file}: expected {count} frames from {start:g} s on, got {number}; the video is cut short")


def write_frames(file: Path, frames: Iterable[np.ndarray], fps: int, crf: int = 20) -> tuple[int, int, int]:
    """Writes frames uint8 [H, W, 3] as H.264, every second one a key frame; odd sides lose their last row or column.

    No frame is predicted from a later one (bf = 0): rerun streams such a file as it is, others need its ffmpeg.

    Returns:
      How many frames there are, their height and width in the file.

    Raises:
      DatasetError: no frame.
    """
    library, count, height, width = av(), 0, 0, 0
    file.parent.mkdir(parents=True, exist_ok=True)
    with library.open(str(file), "w") as container:
        stream = None
        for frame in frames:
            if stream is None:
                height, width = (side // 2 * 2 for side in frame.shape[:2])
                options = {"crf": str(crf), "g": "2", "bf": "0"}
                stream = container.add_stream("libx264", rate=Fraction(fps), options=options)
                stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            picture = np.ascontiguousarray(frame[:height, :width])
            container.mux(stream.encode(library.VideoFrame.from_ndarray(picture, format="rgb24")))
            count += 1
        if stream is None:
            raise DatasetError(f"{file}: expected at least one frame, got none")
        container.mux(stream.encode())
    return count, height, width
