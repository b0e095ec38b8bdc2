"""What a pruner is: a static plan and two pure functions.

    plan   what the engine must know to compile: where tokens are dropped, how many stay, what to capture
    init   evidence (shapes only) → state
    step   (state, evidence) → (state, selection)

The engine runs the layers before the cut, hands the pruner its evidence, and finishes the step either with all
alive tokens (`selection.keyframe`) or with the selected ones. What a finished step learned is evidence of the
next one, so there is no third function. Everything here is written for ONE robot; the engine maps it over robots.

Three instances, from nothing to everything:

    full     plan without a cut: every alive token stays                            no state
    fastv    keeps the tokens that all rows look at in layer 2                      no state
    safe     forecasts what late layers will look at from the last keyframe         unit tokens + one saliency

A method that decides again deeper in the network adds `later`, one call per further cut of its plan; the others
never see it. Evidence is in slots at every cut: arrays have all n visual slots, and `running` says who is left.

Adding one is one file with a factory and one line in `PRUNERS`, or an entry point of another package
(docs/new_pruner.py).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import struct

from safe_pruner_jax.arrays import Array
from safe_pruner_jax.pruners.checks import check_layer, whole
from safe_pruner_jax.pruners.plan import Capture, Cut, Later, Plan

__all__ = [
    "NO_HISTORY",
    "Capture",
    "Cut",
    "Evidence",
    "Later",
    "Plan",
    "Pruner",
    "Selection",
    "State",
    "check_layer",
    "finite",
    "stateless",
    "whole",
]

State = Any
"""A pytree of arrays whose structure, shapes and dtypes never change from step to step."""

NO_HISTORY = -1
"""`Evidence.since_full` when nothing earlier may be used."""


@struct.dataclass
class Evidence:
    """What a pruner may look at, for one robot.

    Args:
      since_full: int32 scalar, control steps since the last full pass (1 = the previous step was one);
        `NO_HISTORY` on the first step, after a reset and whenever the set of alive cameras changed.
      visual: [n, d] visual tokens Z as they enter the language model.
      alive: [n] bool.
      running: [n] bool, alive tokens that no earlier cut has dropped; `alive` at the first cut.
      camera: [n] int32, camera of each token.
      saliency: one array per `plan.capture` (at a later cut: per capture of that cut), float32; shapes in `Capture`.
      late: [|L_d|, n] float32, saliency of the last full pass (or step) per `plan.late_layers`; zeros without history.
      key: PRNG key of this step.
      text: [T, d] prompt tokens as they enter the language model.
      text_alive: [T] bool.
      hidden: [n, d] rows of the visual tokens at this cut; 0 where a token does not run.
      patches: [n, 3·patch²] uint8, the pixels of each token.
      past: one float32 array per `plan.remember`, left behind by the previous step; zeros without history.
      actions: [A, action_dim] float32, what the previous step returned, normalised; zeros without history.
    """

    since_full: Array
    visual: Array
    alive: Array
    running: Array
    camera: Array
    saliency: tuple[Array, ...]
    late: Array
    key: Array
    text: Array
    text_alive: Array
    hidden: Array
    patches: Array
    past: tuple[Array, ...]
    actions: Array


@struct.dataclass
class Selection:
    """What a pruner decided for one robot.

    Args:
      index: [k] int32, kept visual slots, ascending and unique.
      alive: [k] bool, false where the slot is padding.
      keyframe: bool scalar; the step must run all alive tokens. Without meaning at a later cut.
      score: [n] float32 that the choice was made by.
      kappa: float32 scalar κ of Eq. 6, NaN where a method has none.
      rows: [k, d] what the kept slots hold from here on, for methods that merge tokens; None: what they held.
    """

    index: Array
    alive: Array
    keyframe: Array
    score: Array
    kappa: Array
    rows: Array | None = None


@dataclass(frozen=True)
class Pruner:
    """A named method; see the module's docstring. Two calls of a factory make unequal pruners.

    Args:
      name: of the method.
      plan: its static side.
      init, step: see the module's docstring.
      later: (state, evidence, i) → (state, selection) at `plan.later[i]`, on the pruned path only.
    """

    name: str
    plan: Plan
    init: Callable[[Evidence], State]
    step: Callable[[State, Evidence], tuple[State, Selection]]
    later: Callable[[State, Evidence, int], tuple[State, Selection]] | None = None


def finite(*arrays: Array) -> Array:
    """Bool scalar: every entry of every array is finite. A pruner refreshes (keyframe) when its evidence is not.

    Row by row first, so that a GPU asks while it reads a row for something else, and at the end for all rows at once.
    """
    rows = lambda x: x.reshape(-1, x.shape[-1]).all(-1) if x.ndim > 1 else x.reshape(-1)
    fine: dict[int, Array] = {}
    for one in (rows(jnp.isfinite(a)) for a in arrays):
        fine[len(one)] = fine[len(one)] & one if len(one) in fine else one
    return jnp.stack([one.all() for one in fine.values()]).all()


def stateless(evidence: Evidence) -> State:
    """The `init` of a pruner that remembers nothing."""
    return ()
