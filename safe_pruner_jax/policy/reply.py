"""What became of one robot's control step: a reply or an error, and what happened on the way. No jax here."""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np


class NonFinite(FloatingPointError):
    """The model's actions are not finite, on the full path either."""

    def __init__(self):
        super().__init__(
            "expected finite actions, got NaN or infinity on the full path too; "
            "this robot's memory was reset: check its observation, then the weights"
        )


@dataclass(frozen=True, eq=False)
class Result:
    """What became of one robot's control step.

    Args:
      reply: openpi's reply; None after an error.
      error: what went wrong.
      pruning: as in the reply (`kept`, `alive`, `keyframe`, `kappa`, `index`, `views`, `text`, `fallback`), also where
        that leaves it out; empty if the backend does not prune.
      fresh: the step started without a memory.
      saliency: for people who look on, never sent to the robot: `score` [n] that the tokens were chosen by, on the
        host; `late` [1, layers, n], still on the device.
    """

    reply: dict[str, Any] | None
    error: Exception | None = None
    pruning: dict[str, Any] = field(default_factory=dict)
    fresh: bool = False
    saliency: dict[str, Any] = field(default_factory=dict)


def timing(start: float, decided: float | None, end: float) -> dict[str, float]:
    """A reply's times in milliseconds, from times in seconds; `decided` where there is a decision."""
    milliseconds = {"infer_ms": (end - start) * 1000}
    if decided is not None:
        milliseconds |= {"shallow_ms": (decided - start) * 1000, "rest_ms": (end - decided) * 1000}
    return milliseconds


def pruned(keyframe: bool, kappa: float, running: np.ndarray, alive: np.ndarray) -> dict:
    """A reply's `pruning`; running and alive: [n] bool, visual tokens after the last cut and before any."""
    index = np.flatnonzero(running).astype(np.int32)
    return {
        "kept": len(index),
        "alive": int(alive.sum()),
        "keyframe": keyframe,
        "kappa": None if math.isnan(kappa) else kappa,
        "index": index,
    }
