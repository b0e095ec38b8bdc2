"""Interleaved timing: every round runs every step once, so a slow moment of the machine hits all of them.

times = interleave({"full": step, "safe": other}, rounds=20)      {"full": [20] seconds, "safe": [20]}
spread(times["full"])                                             median, quartiles, whether to trust them
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

WARM_UP = 2
"""Rounds that are run and not counted."""

UNREST = 0.15
"""Distance of the quartiles over the median above which a measurement counts as disturbed."""

Step = Callable[[], None]
"""Runs to the end: what it computes is on the host, or waited for, when it returns."""


def interleave(
    steps: Mapping[str, Step],
    rounds: int,
    *,
    warm_up: int = WARM_UP,
    on_round: Callable[[int, dict[str, float]], None] = lambda number, seconds: None,
    seconds: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, np.ndarray]:
    """Wall times.

    Args:
      steps: name → step.
      rounds: counted rounds, at least 1.
      warm_up: rounds before them that are not counted.
      on_round: called after every round with its number, from 1, those of the warm-up included, and its times.
      seconds: no round begins after so many, except the first counted one; None: all of them do.
      clock: seconds.

    Returns:
      Per step its times [rounds] in seconds; entry i of all steps is of the same round.
    """
    if rounds < 1:
        raise ValueError(f"rounds: expected at least 1, got {rounds}")
    times: dict[str, list[float]] = {name: [] for name in steps}
    began = 0.0 if seconds is None else clock()
    for number in range(warm_up + rounds):
        if seconds is not None and number > warm_up and clock() - began > seconds:
            break
        for name, step in steps.items():
            start = clock()
            step()
            times[name].append(clock() - start)
        on_round(number + 1, {name: values[-1] for name, values in times.items()})
    return {name: np.array(values[warm_up:]) for name, values in times.items()}


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of repeated measurements, in the unit of the values."""

    median: float
    low: float
    high: float

    @property
    def disturbed(self) -> bool:
        """Whether the machine was too restless for the figure to stand alone (`UNREST`)."""
        return self.high - self.low > UNREST * abs(self.median)

    def __str__(self) -> str:
        return f"{self.median:.4g} ({self.low:.4g}–{self.high:.4g})"


def spread(values: np.ndarray) -> Spread:
    """Of values [rounds]."""
    low, median, high = np.percentile(values, (25, 50, 75))
    return Spread(float(median), float(low), float(high))


def ratio(times: np.ndarray, to: np.ndarray) -> Spread:
    """How often `times` fits into `to`: of the ratios within a round, which a slow moment hits on both sides."""
    return spread(to / times)
