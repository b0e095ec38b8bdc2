"""What became of one robot's control step: a reply or an error, and what happened on the way. No jax here."""

from dataclasses import dataclass, field
from typing import Any


class NonFinite(FloatingPointError):
    """The model's actions are not finite, on the full path either."""

    def __init__(self):
        super().__init__(
            "expected finite actions, got NaN or infinity on the full path too; "
            "this robot's memory was reset: check its observation, then the weights"
        )


@dataclass(frozen=True, eq=False)
class Outcome:
    """Of one robot's control step.

    Args:
      reply: openpi's reply; None after an error.
      error: what went wrong.
      pruning: as in the reply (`kept`, `alive`, `keyframe`, `kappa`, `index`, `fallback`), also where that leaves it
        out; empty if the backend does not prune.
      fresh: the step started without a memory.
    """

    reply: dict[str, Any] | None
    error: Exception | None = None
    pruning: dict[str, Any] = field(default_factory=dict)
    fresh: bool = False
