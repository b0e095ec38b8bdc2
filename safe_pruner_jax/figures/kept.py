"""Pictures of what a pruner keeps. Functions return arrays or figures; nothing is shown and no backend is chosen.

    overlay(image, reply["pruning"]["index"])                                    one camera
    video_frame({"base": image, "wrist": image}, index, 256, caption)            all cameras above a caption
    kept_patches_figure([Shown(images, index, "step 0, keyframe"), …], 256)      one row per control step
    saliency_figure(images, {"layer 2": s, "layer 17": s}, 256)                  where it looks, one row per saliency
    picture(figure)                                                              a figure as an image, for notebooks
    methods_figure([Shown(images, index, "fastv"), …], 256)                      one picture, several methods
    paths_diagram()                                                              the two paths of a step

Visual tokens are numbered camera after camera, row by row over the patch grid of each.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path as Outline
from PIL import Image, ImageDraw, ImageFont

OUTLINE = (255, 214, 10)
STRIP, INK = (24, 26, 30), (236, 238, 240)  # the caption under a video frame


class Shown(NamedTuple):
    """One control step to draw: camera → uint8 [S, S, 3] in slot order, kept slots, what to write beside it."""

    images: Mapping[str, np.ndarray]
    index: np.ndarray  # pyright: ignore[reportIncompatibleMethodOverride]  a tuple's own `index` is not used
    label: str = ""


# --- arrays ------------------------------------------------------------------------------------------------


def overlay(
    image: np.ndarray, kept: np.ndarray, *, grid: int = 16, dim: float = 0.25, outline: tuple[int, int, int] = OUTLINE
) -> np.ndarray:
    """An image with the dropped patches dark and grey, and an outline around what is kept.

    Args:
      image: uint8 [S, S, 3], S at least the number of patches along a side.
      kept: bool [g, g], or the indices of kept patches on a `grid` × `grid` grid.
      grid: patches along a side, when indices are given (π0.5: 224/14).
      dim: brightness left to the dropped patches, in [0, 1].
      outline: RGB of the outline.

    Returns:
      uint8 [S, S, 3].

    Raises:
      ValueError: an image or a mask of another shape, or an index outside the grid.
    """
    kept = _mask(kept, grid)
    image = np.asarray(image)
    side, g = image.shape[0], kept.shape[0]
    if image.shape != (side, side, 3) or image.dtype != np.uint8 or side < g:
        raise ValueError(f"image: expected uint8 [S, S, 3] with S ≥ {g}, got {image.dtype} {list(image.shape)}")
    cell = np.arange(side) * g // side
    inside = kept[np.ix_(cell, cell)]
    grey = image.mean(-1, keepdims=True)
    out = np.where(inside[..., None], image, dim * (0.25 * image + 0.75 * grey))
    out[inside & ~_eroded(inside, max(1, side // 224))] = outline
    return out.round().astype(np.uint8)


def _mask(kept: np.ndarray, grid: int) -> np.ndarray:
    kept = np.asarray(kept)
    if kept.dtype != bool:
        index, kept = kept, np.zeros(grid * grid, bool)
        if index.size and (index.min() < 0 or index.max() >= grid * grid):
            raise ValueError(
                f"kept: expected indices in 0 to {grid * grid - 1}, got {index.min()} to {index.max()}; "
                "subtract the camera's first slot"
            )
        kept[index.astype(int)] = True
        kept = kept.reshape(grid, grid)
    if kept.ndim != 2 or kept.shape[0] != kept.shape[1]:
        raise ValueError(f"kept: expected a square bool mask or indices, got {list(kept.shape)}")
    return kept


def _eroded(mask: np.ndarray, width: int) -> np.ndarray:
    """Pixels whose whole neighbourhood of `width` pixels lies in the mask; nothing lies outside the image."""
    padded = np.pad(mask, width)
    S = mask.shape[0]
    shifts = range(2 * width + 1)
    return np.all([padded[i : i + S, j : j + S] for i in shifts for j in shifts], axis=0)


def _per_camera(cameras: Sequence[str], index: np.ndarray, tokens_per_camera: int) -> dict[str, np.ndarray]:
    """Camera → bool [g, g] of its kept patches."""
    n, g = len(cameras) * tokens_per_camera, math.isqrt(tokens_per_camera)
    index = np.asarray(index, int)
    if g * g != tokens_per_camera:
        raise ValueError(f"tokens_per_camera: expected a square number, got {tokens_per_camera}")
    if index.size and (index.min() < 0 or index.max() >= n):
        raise ValueError(
            f"index: expected slots in 0 to {n - 1} for {len(cameras)} cameras, got {index.min()} to {index.max()}"
        )
    kept = np.zeros(n, bool)
    kept[index] = True
    return dict(zip(cameras, kept.reshape(-1, g, g), strict=True))


def _enlarged(image: np.ndarray, side: int) -> np.ndarray:
    """The image at `side` pixels, so that outlines are drawn finer than its pixels."""
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.LANCZOS))


def font(size: int) -> ImageFont.FreeTypeFont:
    """Bold letters, Greek ones among them, that come with Matplotlib."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans-Bold.ttf")), size)


def video_frame(
    images: Mapping[str, np.ndarray],
    index: np.ndarray,
    tokens_per_camera: int,
    caption: str,
    *,
    badge: str = "",
    side: int = 448,
    dim: float = 0.4,
) -> np.ndarray:
    """All cameras side by side with the dropped patches dimmed, above a strip of text.

    Args:
      images: camera → uint8 [S, S, 3], in slot order.
      index: kept slots over all cameras.
      tokens_per_camera: slots of one camera.
      caption: one line of text.
      badge: a few letters before it that stand out; "" for none.
      side: pixels per camera, a multiple of 16, as video codecs want it.
      dim: see `overlay`.

    Returns:
      uint8 [side + 48, width, 3], both multiples of 16.
    """
    kept = _per_camera(list(images), index, tokens_per_camera)
    gap = np.full((side, 16, 3), STRIP, np.uint8)
    panels = []
    for camera, image in images.items():
        panels += [overlay(_enlarged(image, side), kept[camera], dim=dim), gap]
    top = np.concatenate(panels[:-1], axis=1)
    strip = Image.new("RGB", (top.shape[1], 48), STRIP)
    draw, left = ImageDraw.Draw(strip), 16
    bold = font(17)
    if badge:
        width = draw.textlength(badge, bold)
        draw.rounded_rectangle((left, 9, left + width + 20, 39), 6, fill=OUTLINE)
        draw.text((left + 10, 24), badge, STRIP, bold, anchor="lm")
        left += int(width) + 36
    draw.text((left, 24), caption, INK, bold, anchor="lm")
    return np.concatenate([top, np.asarray(strip)], axis=0)


# --- figures -----------------------------------------------------------------------------------------------


def _figure(width: float, height: float) -> Figure:
    """A figure that belongs to nobody: pyplot keeps no reference and its backend does not matter."""
    figure = Figure((width, height), dpi=120, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def kept_patches_figure(steps: Sequence[Shown], tokens_per_camera: int, title: str = "", *, dim: float = 0.4) -> Figure:
    """Kept patches on every camera: one row per control step, one column per camera.

    Args:
      steps: what to draw, all with the same cameras.
      tokens_per_camera: slots of one camera.
      title: over the figure.
      dim: see `overlay`.

    Raises:
      ValueError: no steps.
    """
    if not steps:
        raise ValueError("steps: expected at least one control step to draw, got none")
    cameras = list(steps[0].images)
    figure = _figure(3.1 * len(cameras) + 0.5, 3.1 * len(steps) + 0.7)
    axes = figure.subplots(len(steps), len(cameras), squeeze=False)
    for row, step in zip(axes, steps, strict=True):
        kept = _per_camera(cameras, step.index, tokens_per_camera)
        for ax, camera in zip(row, cameras, strict=True):
            ax.imshow(overlay(_enlarged(step.images[camera], 896), kept[camera], dim=dim))
            ax.set_xticks([])
            ax.set_yticks([])
            ax.spines[:].set_visible(False)
            ax.set_xlabel(f"{kept[camera].sum()} of {kept[camera].size} kept", fontsize=9, color="#444444")
        row[0].set_ylabel(step.label, fontsize=10)
    for ax, camera in zip(axes[0], cameras, strict=True):
        ax.set_title(camera, fontsize=11)
    figure.suptitle(title, fontsize=12)
    figure.tight_layout()
    return figure


def heat(image: np.ndarray, s: np.ndarray, *, peak: float | None = None, strength: float = 0.65) -> np.ndarray:
    """An image with saliency laid over it: dark where there is none, yellow where it is highest.

    Args:
      image: uint8 [S, S, 3].
      s: [g, g] ≥ 0 over the patch grid.
      peak: saliency that is drawn brightest; None takes the highest of `s`.
      strength: weight of the colours in [0, 1].

    Returns:
      uint8 [S, S, 3].

    Raises:
      ValueError: an image or a grid that is not square.
    """
    image, s = np.asarray(image), np.asarray(s, np.float64)
    side, g = image.shape[0], s.shape[0]
    if image.shape != (side, side, 3) or s.shape != (g, g) or side < g:
        raise ValueError(f"expected an image [S, S, 3] and saliency [g, g], got {list(image.shape)}, {list(s.shape)}")
    cell = np.arange(side) * g // side
    level = np.clip(s[np.ix_(cell, cell)] / max(s.max() if peak is None else peak, 1e-12), 0, 1)
    colours = matplotlib.colormaps["inferno"](level)[..., :3] * 255
    grey = image.mean(-1, keepdims=True)
    return ((1 - strength) * grey + strength * colours).round().astype(np.uint8)


def methods_figure(shown: Sequence[Shown], tokens_per_camera: int, columns: int = 3, *, dim: float = 0.4) -> Figure:
    """Several selections side by side, each with all its cameras and its label over them.

    Args:
      shown: what to draw; line after line.
      tokens_per_camera: slots of one camera.
      columns: selections per line.
      dim: see `overlay`.

    Raises:
      ValueError: nothing to draw.
    """
    if not shown:
        raise ValueError("shown: expected at least one selection to draw, got none")
    lines, cameras = -(-len(shown) // columns), max(len(s.images) for s in shown)
    figure = _figure(1.75 * cameras * columns, 2.15 * lines)
    figure.set_layout_engine("constrained")
    for ax in figure.subplots(lines, columns, squeeze=False).ravel():
        ax.axis("off")
    for ax, s in zip(figure.axes, shown, strict=False):
        kept = _per_camera(list(s.images), s.index, tokens_per_camera)
        ax.imshow(np.concatenate([overlay(_enlarged(s.images[c], 448), kept[c], dim=dim) for c in kept], axis=1))
        ax.set_title(s.label, fontsize=9)
    return figure


def saliency_figure(
    images: Mapping[str, np.ndarray], rows: Mapping[str, np.ndarray], tokens_per_camera: int, title: str = ""
) -> Figure:
    """Saliency over every camera: one row per saliency, one column per camera, on one scale within a row.

    Args:
      images: camera → uint8 [S, S, 3], in slot order.
      rows: label → [n] over the slots of all cameras.
      tokens_per_camera: slots of one camera, a square number.
      title: over the figure.

    Raises:
      ValueError: no rows, or rows of another length than the cameras have slots.
    """
    n, g = len(images) * tokens_per_camera, math.isqrt(tokens_per_camera)
    wrong = {label: np.shape(s) for label, s in rows.items() if np.shape(s) != (n,)}
    if not rows or wrong:
        raise ValueError(f"rows: expected saliencies of {n} slots, got {wrong or 'none'}")
    figure = _figure(2.1 * len(images) + 1.2, 2.1 * len(rows) + 0.7)
    figure.set_layout_engine("constrained")
    axes = figure.subplots(len(rows), len(images), squeeze=False)
    for line, (label, s) in zip(axes, rows.items(), strict=True):
        for ax, (camera, image), part in zip(line, images.items(), np.reshape(s, (-1, g, g)), strict=True):
            ax.imshow(heat(_enlarged(image, 224), part, peak=float(np.max(s))))
            ax.set_xticks([])
            ax.set_yticks([])
            ax.spines[:].set_visible(False)
            ax.set_title(camera if label == next(iter(rows)) else "", fontsize=9)
        line[0].set_ylabel(label, fontsize=8)
    figure.suptitle(title, fontsize=11)
    return figure


def picture(figure: Figure) -> Image.Image:
    """A figure as an RGB image, which notebooks and viewers show without pyplot."""
    figure.canvas.draw()
    return Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")


_LOOK = {  # fill, edge
    "input": ("#eef1f4", "#57606a"),
    "shared": ("#dbe9f9", "#1f5fa8"),
    "full": ("#fdeacb", "#b36b00"),
    "pruned": ("#d9f2df", "#1a7f37"),
}


def paths_diagram() -> Figure:
    """The two paths of a control step: shallow layers, decision, then all tokens or the kept ones."""
    figure = _figure(11, 4.2)
    ax = figure.add_axes((0, 0, 1, 1), xlim=(0, 110), ylim=(1, 43))
    ax.axis("off")
    _box(ax, (2, 24, 14, 8), "images", "SigLIP → Z", "input")
    _box(ax, (2, 11, 14, 8), "prompt", "embed", "input")
    _box(ax, (21, 13.5, 17, 16), "layers 0 – 2", "all alive tokens\nshallow saliency S", "shared")
    _box(ax, (43, 13.5, 20, 16), "decide", "match Z to keyframe\nforecast Ŝ from its S\nκ = cos(S, Ŝ)", "shared")
    _box(ax, (71, 25.5, 18, 11), "full · keyframe", "layers 3 – 17\nall alive tokens", "full")
    _box(ax, (71, 6.5, 18, 11), "pruned", "layers 3 – 17\ntop K visual tokens", "pruned")
    _box(ax, (94, 13.5, 14, 16), "actions", "expert, 10 steps\nover the keys of\nevery layer", "input")
    _arrow(ax, [(16, 28), (18.5, 28), (18.5, 21.5), (21, 21.5)])
    _arrow(ax, [(16, 15), (18.5, 15), (18.5, 21.5), (21, 21.5)])
    _arrow(ax, [(38, 21.5), (43, 21.5)])
    _arrow(ax, [(63, 21.5), (66, 21.5), (66, 31), (71, 31)])
    _arrow(ax, [(63, 21.5), (66, 21.5), (66, 12), (71, 12)])
    _arrow(ax, [(89, 31), (91.5, 31), (91.5, 21.5), (94, 21.5)])
    _arrow(ax, [(89, 12), (91.5, 12), (91.5, 21.5), (94, 21.5)])
    ax.text(66, 33, "κ < γ", ha="center", fontsize=12)
    ax.text(66, 8.6, "κ ≥ γ", ha="center", fontsize=12)
    edge = _LOOK["full"][1]
    _arrow(ax, [(80, 36.5), (80, 40), (53, 40), (53, 29.5)], color=edge, linestyle=(0, (4, 2.5)))
    ax.text(51.5, 39.2, "keyframe cache: Z, S,\nlate saliency", ha="right", va="center", fontsize=9.5, color=edge)
    ax.text(53, 5.4, "score: (1-λ) S + λ · mean of\nforecast late saliency", ha="center", fontsize=9.5, color="#57606a")
    return figure


def _box(ax: Axes, place: tuple[float, float, float, float], head: str, body: str, kind: str) -> None:
    """A rounded box at (x, y, width, height) with a bold line above its text."""
    (x, y, width, height), (fill, edge) = place, _LOOK[kind]
    style = "round,pad=0,rounding_size=1"
    ax.add_patch(FancyBboxPatch((x, y), width, height, style, facecolor=fill, edgecolor=edge, linewidth=1.4))
    lines = body.count("\n") + 1
    top = y + height / 2 + 1.15 * (lines + 1)
    ax.text(x + width / 2, top, head, ha="center", va="top", fontsize=11.5, weight="bold")
    ax.text(x + width / 2, top - 2.9, body, ha="center", va="top", fontsize=9.5, linespacing=1.4)


def _arrow(ax: Axes, corners: list[tuple[float, float]], color: str = "#57606a", linestyle: str | tuple = "-") -> None:
    ax.add_patch(
        FancyArrowPatch(
            path=Outline(corners), arrowstyle="-|>", mutation_scale=13, color=color, linestyle=linestyle, linewidth=1.4,
            capstyle="butt", joinstyle="round",
        )
    )  # fmt: skip
