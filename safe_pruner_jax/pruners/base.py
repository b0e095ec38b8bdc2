"""What a pruner is: a static plan and two pure functions.

    plan   what the engine must know to compile: where tokens are dropped, how many stay, what to capture
    init   evidence (shapes only) → state
    step   (state, evidence) → (state, selection)

The engine runs the layers before the cut, hands the pruner its evidence, and finishes the step either with all
alive tokens (`selection.keyframe`) or with the selected ones. What a finished step learned is evidence of the
next one, so there is no third function. Everything here is written for ONE robot; the engine maps it over robots.

Three instances, from nothing to everything:

    full     plan without a cut: every alive token stays                            no state
    fastv    keeps the tokens the last prompt row looks at in layer 2               no state
    safe     forecasts what late layers will look at from the last keyframe         unit tokens + one saliency

Adding one is one file with a factory and one line in `PRUNERS`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
from flax import struct

from safe_pruner_jax.arrays import Array, Layers
from safe_pruner_jax.tokens import check_keep

State = Any
"""A pytree of arrays whose structure, shapes and dtypes never change from step to step."""

NO_HISTORY = -1
"""`Evidence.since_full` when nothing earlier may be used."""


@dataclass(frozen=True)
class Cut:
    """Visual tokens are dropped before layer `layer` (≥ 1); `keep` is a share or a count of the alive ones."""

    layer: int
    keep: float

    def __post_init__(self):
        check_keep(self.keep)
        if not isinstance(self.layer, int) or self.layer < 1:
            raise ValueError(f"cut: expected a layer index of at least 1, got {self.layer!r}; use for example cut=3")


@dataclass(frozen=True)
class Capture:
    """Saliency of a layer before the cut.

    Args:
      layer: layer index.
      rows: whose attention: "action" (action tokens in the expert at flow time 1), "text" (alive prompt rows) or
        "last" (last alive prompt row).
      over: "visual" normalises over alive visual tokens (SAFE-Pruner, Eq. 1); "all" keeps the model's own
        probabilities.
    """

    layer: int
    rows: Literal["action", "text", "last"]
    over: Literal["visual", "all"] = "visual"


@dataclass(frozen=True)
class Plan:
    """The static side of a pruner; hashable, part of the key a program is compiled for.

    Args:
      cut: where and how much is dropped; None keeps everything.
      capture: saliencies wanted from layers before the cut, in the order of `Evidence.saliency`.
      late_layers: expert layers whose saliency a full pass must leave behind; negative counts from the end.
      late_steps: denoise steps averaged for it: "half" (second half), "all", "last".
    """

    cut: Cut | None = None
    capture: tuple[Capture, ...] = ()
    late_layers: Layers = ()
    late_steps: Literal["half", "all", "last"] = "half"

    def __post_init__(self):
        if self.late_steps not in ("half", "all", "last"):
            raise ValueError(f'late_steps: expected "half", "all" or "last", got {self.late_steps!r}')
        for c in self.capture:
            if c.rows not in ("action", "text", "last"):
                raise ValueError(f'queries: expected "action", "text" or "last", got {c.rows!r}')
            if c.over not in ("visual", "all"):
                raise ValueError(f'over: expected "visual" or "all", got {c.over!r}')
            if self.cut is None or not 0 <= c.layer < self.cut.layer:
                raise ValueError(f"capture: layer {c.layer} is not computed before the cut {self.cut}")

    def for_depth(self, depth: int) -> "Plan":
        """The same plan with non-negative late layers, checked against a model of `depth` layers."""
        if self.cut and self.cut.layer >= depth:
            raise ValueError(f"cut: expected a layer index below the model's depth {depth}, got {self.cut.layer}")
        late = tuple(l % depth for l in self.late_layers if -depth <= l < depth)
        if len(late) != len(self.late_layers):
            raise ValueError(f"late_layers: expected layer indices of a model of depth {depth}, got {self.late_layers}")
        return Plan(self.cut, self.capture, late, self.late_steps)


@struct.dataclass
class Evidence:
    """What a pruner may look at, for one robot.

    Args:
      since_full: int32 scalar, control steps since the last full pass (1 = the previous step was one);
        `NO_HISTORY` on the first step, after a reset and whenever the set of alive cameras changed.
      visual: [n, d] visual tokens Z as they enter the language model.
      alive: [n] bool.
      camera: [n] int32, camera of each token.
      saliency: one [n] float32 per `plan.capture`.
      late: [|L_d|, n] float32, saliency of the last full pass per `plan.late_layers`; zeros without history.
      key: PRNG key of this step.
    """

    since_full: Array
    visual: Array
    alive: Array
    camera: Array
    saliency: tuple[Array, ...]
    late: Array
    key: Array


@struct.dataclass
class Selection:
    """What a pruner decided for one robot.

    Args:
      index: [k] int32, kept visual slots, ascending and unique.
      alive: [k] bool, false where the slot is padding.
      keyframe: bool scalar; the step must run all alive tokens.
      score: [n] float32 that the choice was made by.
      kappa: float32 scalar κ of Eq. 6, NaN where a method has none.
    """

    index: Array
    alive: Array
    keyframe: Array
    score: Array
    kappa: Array


@dataclass(frozen=True)
class Pruner:
    """A named method; see the module's docstring. Two calls of a factory make unequal pruners."""

    name: str
    plan: Plan
    init: Callable[[Evidence], State]
    step: Callable[[State, Evidence], tuple[State, Selection]]


def finite(*arrays: Array) -> Array:
    """Bool scalar: every entry of every array is finite. A pruner refreshes (keyframe) when its evidence is not."""
    return jnp.stack([jnp.isfinite(a).all() for a in arrays]).all()


def stateless(evidence: Evidence) -> State:
    """The `init` of a pruner that remembers nothing."""
    return ()
