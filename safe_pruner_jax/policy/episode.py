"""What one robot remembers between its control steps, and how a request of it becomes ready for the network."""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from safe_pruner_jax.engine.state import ControlState
from safe_pruner_jax.policy.attention import Wanted
from safe_pruner_jax.policy.overlap import Overlap
from safe_pruner_jax.robots.robots import RequestError, brief
from safe_pruner_jax.robots.transforms import Example
from safe_pruner_jax.tokens import PrefixLayout


@dataclass
class Episode:
    """What one robot remembers between its control steps.

    Args:
      seed: of the noise.
      control: state on the device, leading axis 1; None before the first step.
      prompt, cameras: of the last step; others start afresh.
      chunk: [A, action_dim] float32, the network's actions of the last step.
      sent: [A, robot's width], the same as the robot was told them.
    """

    seed: int
    control: ControlState | None = None
    prompt: Any = None
    cameras: tuple[str, ...] = ()
    chunk: np.ndarray | None = None
    sent: np.ndarray | None = None


class Transform(Protocol):
    """The border between one robot's client and the network, see `robots.transform.RobotIO`."""

    def prepare(self, request: dict) -> tuple[Example, Any]:
        """Request → network input of one robot, and what `finish` needs later."""
        ...

    def finish(self, actions: np.ndarray, context: Any) -> dict:
        """Network actions [A, action_dim] → reply."""
        ...

    def example(self, rng: np.random.Generator) -> dict:
        """A request as this robot sends it, with invented values."""
        ...


@dataclass(frozen=True, eq=False)
class Prepared:
    """A request, ready for the network.

    Args:
      example: the network's input.
      context: what `Transform.finish` needs.
      layout: static shape it runs in.
      prompt: as it came.
      reset: a new episode is asked for.
      noise: [A, action_dim] float32 to start the flow from; None draws it.
      overlap: how the new chunk lies on the last one, which it shall continue; None: it need not.
      seed: of the noise of the episode that begins here; None: the policy's.
      attention: grids that are wanted with the reply.
    """

    example: Example
    context: Any
    layout: PrefixLayout
    prompt: Any
    reset: bool
    noise: np.ndarray | None
    overlap: Overlap | None = None
    seed: int | None = None
    attention: Wanted | None = None

    @property
    def group(self) -> Hashable:
        """Requests of one group can share a device step."""
        return self.layout, self.noise is None, self.overlap is None


def starts_afresh(episode: Episode, prepared: Prepared) -> bool:
    """Whether a request begins a new episode."""
    return (
        episode.control is None
        or prepared.reset
        or prepared.prompt != episode.prompt
        or prepared.layout.cameras != episode.cameras
    )


def read_overlap(rtc: Any) -> Overlap | None:
    """The request's `rtc`. Raises RequestError."""
    if rtc is None:
        return None
    advice = 'send {"executed": steps since the last observation, "delay": steps until the reply}'
    expected = "a map with two whole numbers of control steps, executed and delay"
    if not isinstance(rtc, dict) or not {"executed", "delay"} <= set(rtc):
        raise RequestError("rtc", expected, brief(rtc), advice)
    try:
        return Overlap(rtc["executed"], rtc["delay"])
    except ValueError as error:
        raise RequestError("rtc", expected, str(error), advice) from error


def read_seed(seed: Any) -> int | None:
    """The request's `seed`. Raises RequestError."""
    if seed is None:
        return None
    if isinstance(seed, int | np.integer) and not isinstance(seed, bool) and 0 <= seed < 2**31:
        return int(seed)
    advice = "leave it away for the server's own"
    raise RequestError("seed", "a whole number from 0 to 2³¹ - 1", repr(seed)[:40], advice)


@jax.jit
def stack(controls: tuple[ControlState, ...]) -> ControlState:
    """Control states of single robots → of a batch."""
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *controls)


@jax.jit
def row_of(control: ControlState, row: jax.Array) -> ControlState:
    """One robot's control state out of a batch, still with its batch axis."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, row, 1), control)
