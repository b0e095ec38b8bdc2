"""Which camera and which region of it a policy's actions attend to, over an episode.

    rows = measure(policy, requests)                 one full pass per call; nothing is pruned
    print(table(rows)); figure(rows).savefig("diagnose.png")

The question of openpi #988: the wrist camera seems to be ignored. Attention is the model's own: a share of 1 would be
all of it, over pictures, prompt and the actions themselves.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from safe_pruner_jax.engine.attention import layers_of
from safe_pruner_jax.figures.kept import heat
from safe_pruner_jax.figures.theme import COLOURS, legend, markdown, panels
from safe_pruner_jax.policy.policy import Policy, layout_of, pack

REGIONS = ("upper left", "upper", "upper right", "left", "middle", "right", "lower left", "lower", "lower right")
"""Ninths of a picture, row by row."""
LAYERS = (0, -2, -1)
"""The late layers of SAFE-Pruner's Eq. 3, which also this analysis takes unless told otherwise."""


class Row(dict[str, Any]):
    """One call: `call`, `cameras` camera → share of attention, `regions` camera → nine shares, `grids` camera → [g, g]
    float32, `images` camera → uint8 [S, S, 3], `prompt`."""


def measure(
    policy: Policy, requests: Iterable[Mapping[str, Any]], *, layers: Sequence[int] = LAYERS, of: str = "action"
) -> list[Row]:
    """Attention of every call, mean over `layers`.

    Args:
      policy: whose model it is; its pruner plays no part.
      requests: openpi's, of one episode.
      layers: of the expert for "action", of the prefix for "text"; negative counts from the end.
      of: whose attention: "action" tokens (second half of the denoise steps) or the prompt, "text".

    Raises:
      ValueError: no requests, or a layer that does not exist.
    """
    config, key, rows = policy.engine.config, jax.random.key(policy.seed), []
    count = layers_of(config, of)
    if not layers or min(layers) < -count or max(layers) >= count:
        raise ValueError(f"layers: expected some between {-count} and {count - 1} for {of!r}, got {tuple(layers)}")
    for call, request in enumerate(requests):
        example, _ = policy.transform.prepare(dict(request))
        layout = layout_of(example, config, policy.prompt_lengths)
        inputs = jax.device_put(pack([example], layout))
        seen = policy.attention.every_layer(of, inputs, key)[np.asarray(layers)].mean(0)
        key = jax.random.split(key)[0]  # as the engine goes on
        side = math.isqrt(layout.tokens_per_camera)
        grids = dict(zip(layout.cameras, seen.reshape(-1, side, side), strict=True))
        images = {camera: np.asarray(example.images[camera]) for camera in layout.cameras}
        rows.append(
            Row(
                call=call,
                cameras={camera: float(grid.sum()) for camera, grid in grids.items()},
                regions={camera: ninths(grid) for camera, grid in grids.items()},
                grids=grids,
                images=images,
                prompt=str(request.get("prompt", "")),
            )
        )
    if not rows:
        raise ValueError("expected at least one call, got none; the recording is empty")
    return rows


def ninths(grid: np.ndarray) -> list[float]:
    """Sums over the nine `REGIONS` of a grid [g, g]; they add up to the grid's.

    >>> ninths(np.eye(6)[:, ::-1])
    [0.0, 0.0, 2.0, 0.0, 2.0, 0.0, 2.0, 0.0, 0.0]
    """
    third = np.arange(len(grid)) * 3 // len(grid)
    sums = np.zeros((3, 3))
    np.add.at(sums, (third[:, None], third[None, :]), grid)
    return [float(value) for value in sums.ravel()]


def table(rows: Sequence[Row]) -> str:
    """Per camera: its share of the attention to pictures and of all attention, its range over time, its best region."""
    cameras, pictures = list(rows[0]["cameras"]), [sum(row["cameras"].values()) for row in rows]
    lines = []
    for camera in cameras:
        share = np.array([row["cameras"][camera] for row in rows])
        among = share / np.maximum(pictures, 1e-12)
        regions = np.mean([row["regions"][camera] for row in rows], axis=0)
        best = int(regions.argmax())
        spread = f"{among.min():.0%} – {among.max():.0%}"
        name = f"{REGIONS[best]}, {regions[best] / max(regions.sum(), 1e-12):.0%}"
        lines.append([camera, f"{among.mean():.1%}", spread, f"{share.mean():.1%}", name])
    header = ["camera", "of attention to pictures", "over the episode", "of all attention", "most attended ninth"]
    rest = 1 - np.mean(pictures)
    return (
        markdown(header, lines)
        + f"\n{len(rows)} calls; {rest:.1%} goes to the prompt and the actions.\n{verdict(rows)}\n"
    )


def verdict(rows: Sequence[Row]) -> str:
    """In words whether a camera gets much less than its share of the patches."""
    total = {camera: sum(row["cameras"][camera] for row in rows) for camera in rows[0]["cameras"]}
    least = min(total, key=lambda camera: total[camera])
    share, even = total[least] / max(sum(total.values()), 1e-12), 1 / len(total)
    if len(total) < 2 or share >= even / 3:
        return "No camera is ignored: each has at least a third of an even share."
    return (
        f"{least} is nearly ignored: {share:.1%} of the attention to pictures, {even:.0%} would be even. Cover it: "
        "if the actions hardly change, the policy does not use it."
    )


def figure(rows: Sequence[Row]) -> Figure:
    """Shares over time above, mean attention over the first call's pictures below."""
    cameras = list(rows[0]["cameras"])
    columns = max(2, len(cameras))
    drawing, axes = panels(columns, rows=2)
    calls = [row["call"] for row in rows]
    over_time, regions = axes[0][:2]
    shares = [[row["cameras"][camera] for row in rows] for camera in cameras]
    over_time.stackplot(calls, shares, labels=cameras, colors=COLOURS, alpha=0.8)
    over_time.set(title="share of attention over the episode", xlabel="call", ylim=(0, 1))
    over_time.xaxis.get_major_locator().set_params(integer=True)
    legend(drawing, [over_time])
    for camera, color in zip(cameras, COLOURS, strict=False):
        mean = np.mean([row["regions"][camera] for row in rows], axis=0)
        offset = (cameras.index(camera) - (len(cameras) - 1) / 2) * 0.8 / len(cameras)
        regions.barh(np.arange(9) + offset, mean, 0.8 / len(cameras), color=color, label=camera)
    regions.set_yticks(range(9), REGIONS, fontsize=8)
    regions.invert_yaxis()
    regions.set(title="mean share by region", xlabel="share of attention")
    for ax in axes[0][2:]:
        ax.set_axis_off()
    for ax, camera in zip(axes[1], cameras, strict=False):
        mean = np.mean([row["grids"][camera] for row in rows], axis=0)
        ax.imshow(heat(rows[0]["images"][camera], mean))
        ax.set_title(f"{camera}, mean of {len(rows)} calls", fontsize=9)
        ax.set_axis_off()
    for ax in axes[1][len(cameras) :]:
        ax.set_axis_off()
    return drawing
