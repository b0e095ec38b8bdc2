"""An animated picture of an episode: cameras with the kept patches lit, κ and milliseconds running below.

frames = film([Shot(images, index, tokens, kappa, ms), …], tokens_per_camera=64, threshold=0.81)
save(frames, Path("policy.webp"))
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from safe_pruner_jax.figures.kept import INK, OUTLINE, STRIP, font, video_frame
from safe_pruner_jax.figures.theme import QUIET

HEIGHT, EDGE = 64, 16
"""Pixels of the strip below a frame, and of its margins."""
CURVE = "#56b4e9"


class Shot(NamedTuple):
    """One call of the episode.

    Args:
      images: camera → uint8 [S, S, 3], in slot order.
      index: kept slots over all cameras.
      alive: visual tokens there were.
      kappa: None without a comparison.
      ms: milliseconds of the call.
      keyframe: whether every token ran.
    """

    images: Mapping[str, np.ndarray]
    index: np.ndarray  # pyright: ignore[reportIncompatibleMethodOverride]  a tuple's own `index` is not used
    alive: int
    kappa: float | None
    ms: float
    keyframe: bool


def film(shots: Sequence[Shot], tokens_per_camera: int, threshold: float, *, side: int = 304) -> list[Image.Image]:
    """A frame per call.

    Args:
      shots: the episode.
      tokens_per_camera: slots of one camera.
      threshold: γ, drawn as a line.
      side: pixels per camera, a multiple of 16.

    Raises:
      ValueError: no shots.
    """
    if not shots:
        raise ValueError("shots: expected at least one call to draw, got none")
    return [_frame(shots[: number + 1], len(shots), tokens_per_camera, threshold, side) for number in range(len(shots))]


def save(frames: Sequence[Image.Image], path: Path, *, ms: int = 280, rest: int = 1800, quality: int = 70) -> None:
    """Writes an endless WebP; each frame is shown `ms` milliseconds, the last one `rest`."""
    times = [ms] * (len(frames) - 1) + [rest]
    frames[0].save(path, save_all=True, append_images=list(frames[1:]), duration=times, quality=quality, method=6)


def _frame(seen: Sequence[Shot], calls: int, tokens_per_camera: int, threshold: float, side: int) -> Image.Image:
    shot = seen[-1]
    kappa = "" if shot.kappa is None else f"   κ {shot.kappa:.2f}"
    caption = f"{len(shot.index)} of {shot.alive} tokens{kappa}   {shot.ms:.0f} ms"
    badge = "keyframe" if shot.keyframe else ""
    top = video_frame(shot.images, shot.index, tokens_per_camera, caption, badge=badge, side=side)
    frame = Image.new("RGB", (top.shape[1], top.shape[0] + HEIGHT), STRIP)
    frame.paste(Image.fromarray(top), (0, 0))
    _curve(ImageDraw.Draw(frame), seen, calls, threshold, (EDGE, top.shape[0], top.shape[1] - EDGE, frame.height - 8))
    return frame


def _curve(
    draw: ImageDraw.ImageDraw, seen: Sequence[Shot], calls: int, threshold: float, box: tuple[int, int, int, int]
) -> None:
    """κ so far with γ, from a little below both to 1; keyframes are points, bars are milliseconds."""
    left, top, right, bottom = box
    low = min([threshold, *(shot.kappa for shot in seen if shot.kappa is not None)]) - 0.1
    x = lambda call: left + (right - left) * (call + 0.5) / calls
    y = lambda value: bottom - (bottom - top) * min(max((value - low) / (1 - low), 0.0), 1.0)
    slowest, half = max(shot.ms for shot in seen), 0.35 * (right - left) / calls
    for call, shot in enumerate(seen):
        height = 0.6 * (bottom - top) * shot.ms / slowest
        draw.rectangle((x(call) - half, bottom - height, x(call) + half, bottom), fill=(58, 62, 70))
    draw.line((left, y(threshold), right, y(threshold)), fill=QUIET, width=1)
    points = [(x(call), y(shot.kappa)) for call, shot in enumerate(seen) if shot.kappa is not None]
    if len(points) > 1:
        draw.line(points, fill=CURVE, width=2)
    for call, shot in enumerate(seen):
        if shot.keyframe:
            at = y(shot.kappa if shot.kappa is not None and math.isfinite(shot.kappa) else 1.0)
            draw.ellipse((x(call) - 4, at - 4, x(call) + 4, at + 4), fill=OUTLINE)
    draw.text((right, y(threshold) - 2), "γ", INK, font(13), anchor="rb")
