"""A time for launches that were compiled and never run: a model, and its assumptions as named numbers.

    time_s(sequence, target, Assumptions(least_us=1.5))

A launch takes the longest of three: the least time a kernel takes inside a CUDA graph, its bytes at the rate of the
memory, its products at the rate of the tensor cores. A kernel of fewer blocks than the chip has multiprocessors gets
only its share of both rates. Everything is read from memory, although the second-level cache holds what a step of the
expert passes from launch to launch; nothing overlaps, although XLA lets independent launches. The rates are those of
data sheets, which no program reaches. So the model is no bound, neither from above nor from below: it shows what a
step is made of, and what a change of it is worth.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from safe_pruner_jax.bench.targets import Target
from safe_pruner_jax.bench.thunks import Launch, Sequence


@dataclass(frozen=True)
class Assumptions:
    """What is not known without the GPU.

    Args:
      least_us: least time from the start of a kernel to the start of the next, in a CUDA graph.
      reached: share of the data sheet's rates that a full kernel reaches.
      dtype: of the products.
    """

    least_us: float = 1.5
    reached: float = 1.0
    dtype: str = "bfloat16"


LEAST_US = (1.5, 2.5)
"""What `least_us` is in tables: a good case and a common one."""


@dataclass(frozen=True)
class Time:
    """Seconds of some launches, by what each is bound by."""

    launch: float = 0.0
    memory: float = 0.0
    products: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return self.launch + self.memory + self.products

    def __add__(self, other: "Time") -> "Time":
        return Time(self.launch + other.launch, self.memory + other.memory, self.products + other.products)

    def __mul__(self, times: float) -> "Time":
        return Time(self.launch * times, self.memory * times, self.products * times)


def launch_time(launch: Launch, gpu: Target, assumed: Assumptions) -> Time:
    """Of one launch, as often as it runs."""
    share = 1.0 if launch.blocks is None else min(1.0, launch.blocks / gpu.multiprocessors)
    rate = share * assumed.reached
    moving = launch.cost.bytes / (gpu.bytes_per_s * rate)
    multiplying = launch.cost.macs / (gpu.macs_per_s(assumed.dtype) * rate)
    least = 1e-6 * assumed.least_us
    if max(moving, multiplying) <= least:
        return Time(launch=least * launch.times)
    if moving >= multiplying:
        return Time(memory=moving * launch.times)
    return Time(products=multiplying * launch.times)


def launches_time(launches: Iterable[Launch], gpu: Target, assumed: Assumptions) -> Time:
    """Of launches behind one another."""
    return sum((launch_time(launch, gpu, assumed) for launch in launches), Time())


def sequence_time(sequence: Sequence, gpu: Target, assumed: Assumptions) -> Time:
    """Of a whole program."""
    loop = launches_time(sequence.loop, gpu, assumed) * sequence.turns
    return launches_time(sequence.outside, gpu, assumed) + loop
