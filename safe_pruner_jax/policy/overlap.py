"""Real-time chunking: the next action chunk continues the one that the robot executes while it is computed.

    step of the old chunk   0 … n-1        n … n+d-1              n+d … A-1
    step of the new chunk                  0 … d-1                d … A-n-1              A-n … A-1
                            executed       executed meanwhile     overlap                beyond the old chunk
    weight                                 1                      falls to 0             0

This is the host's half: what the new chunk shall agree with, and how much. `model.guidance` pulls the flow towards it.
Nothing is trained, and the prefix is not touched, so it is the same with every pruner.

Source: Black, Galliker, Levine 2025, Real-Time Execution of Action Chunking Flow Policies (arXiv 2506.07339), Eq. 5.
Departure: n, the number of steps between the two observations,
is also the paper's execution horizon s, since what is left of the old chunk is A - n actions whatever comes later.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

SMALLEST_SCALE = 1e-5
"""Robot units per normalised unit below which a value of an action is a constant."""


@dataclass(frozen=True)
class Overlap:
    """How a new chunk lies on the old one.

    Args:
      executed: control steps between the observation of the old chunk and that of the new one, n.
      delay: further steps that will have been executed when the new chunk arrives, d.

    Raises:
      ValueError: other than whole numbers of at least 0.
    """

    executed: int
    delay: int

    def __post_init__(self):
        for name in ("executed", "delay"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 0:
                raise ValueError(f"{name}: expected a whole number of control steps, at least 0, got {value!r:.50}")

    def left(self, horizon: int) -> int:
        """Steps of the old chunk that the new one covers."""
        return max(horizon - int(self.executed), 0)

    def frozen(self, horizon: int) -> int:
        """Steps of the new chunk that are executed from the old one."""
        return min(int(self.delay), self.left(horizon))


def soft_mask(horizon: int, overlap: Overlap) -> np.ndarray:
    """Weights [horizon] float32 of Eq. 5: 1 while frozen, falling exponentially over the overlap, 0 beyond.

    >>> [round(float(w), 3) for w in soft_mask(6, Overlap(executed=2, delay=1))]
    [1.0, 0.488, 0.189, 0.041, 0.0, 0.0]
    """
    rest, frozen = overlap.left(horizon), overlap.frozen(horizon)
    steps = np.arange(horizon)
    share = np.clip((rest - steps) / (rest - frozen + 1), 0.0, 1.0)
    weight = share * np.expm1(share) / (np.e - 1)
    return np.where(steps < frozen, 1.0, weight).astype(np.float32)


def remaining(chunk: np.ndarray, overlap: Overlap) -> np.ndarray:
    """The old chunk [A, D] as seen from the new one's first step; zeros where it has ended."""
    out = np.zeros_like(chunk)
    rest = overlap.left(len(chunk))
    out[:rest] = chunk[len(chunk) - rest :]
    return out


def rebase(chunk: np.ndarray, sent: np.ndarray, finish: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """A chunk as the network would give it at another observation, for the same motion of the robot.

    Actions may be relative to the observed state, so the same normalised numbers mean another motion one observation
    later. `finish` must be affine in every value, as all of openpi's output transforms are.

    Args:
      chunk: [A, action_dim] float32, normalised, at the old observation.
      sent: [A, W] what the robot was told for it, W ≤ action_dim; value by value.
      finish: normalised [A, action_dim] → what the robot is told [A, W], at the new observation.

    Returns:
      [A, action_dim] float32; values that the robot is not told, and constants, stay as they are.
    """
    zero = finish(np.zeros_like(chunk))
    scale = finish(np.ones_like(chunk)) - zero
    movable = np.abs(scale) > SMALLEST_SCALE
    width = sent.shape[1]
    out = chunk.copy()
    out[:, :width] = np.where(movable, (sent - zero) / np.where(movable, scale, 1.0), chunk[:, :width])
    return out
