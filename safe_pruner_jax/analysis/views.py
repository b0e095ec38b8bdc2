"""What of a trace is worth looking at: rows for `figures.kept.saliency_figure` and `kept_patches_figure`.

saliency_figure(trace.images[3], by_layer(trace, 3), trace.layout.tokens_per_camera)
"""

from collections.abc import Iterable, Sequence

import numpy as np

from safe_pruner_jax.analysis.measures import Matches, cosine
from safe_pruner_jax.analysis.trace import Trace
from safe_pruner_jax.arrays import Layers
from safe_pruner_jax.figures.kept import Shown
from safe_pruner_jax.pruners import Selection

Saliencies = dict[str, np.ndarray]
"""Label → [n] over the slots of all cameras."""


def by_layer(trace: Trace, call: int, layers: Iterable[int] | None = None, steps: str = "half") -> Saliencies:
    """What the action tokens look at in the expert's layers (all by default), averaged over denoise steps."""
    late = trace.late(steps)[call]
    return {f"layer {l % trace.depth}": late[l] for l in (range(trace.depth) if layers is None else layers)}


def by_denoise_step(trace: Trace, call: int, layer: int = -1, steps: Iterable[int] | None = None) -> Saliencies:
    """The same in one layer at single denoise steps (all by default), from noise to actions."""
    seen = trace.expert[call, :, layer]
    return {f"denoise step {s % len(seen)}": seen[s] for s in (range(len(seen)) if steps is None else steps)}


def by_queries(trace: Trace, call: int, layer: int = 2) -> Saliencies:
    """One layer with each choice of the query rows, and as FastV reads it."""
    return {
        "action tokens": trace.expert[call, 0, layer],
        "prompt": trace.text[call, layer],
        "last prompt token": trace.last[call, layer],
        "FastV": trace.probabilities["all"][call, layer],
    }


def forecast_and_truth(
    trace: Trace, call: int, reference: int = 0, late_layers: Layers = (0, -2, -1), steps: str = "half"
) -> Saliencies:
    """Mean late saliency (Eq. 4): at the keyframe, forecast from it for a later call, and what the call looked at.

    Raises:
      ValueError: the keyframe is not before the call.
    """
    if not 0 <= reference < call < len(trace):
        raise ValueError(f"expected 0 ≤ keyframe < call < {len(trace)}, got keyframe {reference} and call {call}")
    late = trace.late(steps)[:, list(late_layers)].mean(1)
    forecast = Matches(trace).forecast(late[reference], call, reference)
    title = f"forecast for call {call}, cosine {cosine(late[call], forecast):.3f}"
    return {f"keyframe, call {reference}": late[reference], title: forecast, f"seen at call {call}": late[call]}


def shown(trace: Trace, selections: Sequence[Selection], calls: Iterable[int]) -> list[Shown]:
    """Some calls of a replay, ready to draw: a keyframe keeps every alive token."""
    pictures = []
    for call in calls:
        chosen = selections[call]
        index = np.flatnonzero(trace.alive[call]) if chosen.keyframe else chosen.index[chosen.alive]
        kappa = "" if np.isnan(chosen.kappa) else f", κ = {float(chosen.kappa):.3f}"
        title = f"call {call}{', keyframe' if chosen.keyframe else ''}{kappa}"
        pictures.append(Shown(trace.images[call], index, title))
    return pictures
