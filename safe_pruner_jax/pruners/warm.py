"""A warm start for any method: the first steps of an episode run everything, whatever the method decides.

    warm(random(keep=0.2), 3)              a pruner made of a pruner
    warmed(random)(keep=0.2, warm_start=3) the same through the factory, as the command line has it

At the beginning the arm moves fastest and everything in view is new. What a method gains by choosing can only be told
from what it gains by its first steps if every method may have the same ones.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from flax import struct

from safe_pruner_jax.arrays import Array
from safe_pruner_jax.pruners.base import NO_HISTORY, Evidence, Pruner, Selection, State, whole
from safe_pruner_jax.pruners.checks import require

CHOICE = "warm_start"
"""The keyword that `warmed` adds to a factory."""


@struct.dataclass
class WarmState:
    """The method's own state, and the steps of the episode so far [] int32, counted up to w."""

    inner: State
    steps: Array


def warm(pruner: Pruner, w: int) -> Pruner:
    """The pruner with `w` ≥ 1 steps in full at the start of an episode, and after the set of alive cameras changes.

    The method sees every step and remembers what it would; only its keyframe bit is overruled.

    Raises:
      ValueError: w is no whole number of at least 1.

    References:
      VLA-Pruner, Section 4.2: "We warm-start VLA-Pruner with w steps".
    """
    require(whole(w, 1), CHOICE, "a whole number of steps >= 1 or None", w)
    if pruner.plan.cut is None:
        return pruner
    decide = pruner.later

    def init(e: Evidence) -> WarmState:
        return WarmState(pruner.init(e), jnp.zeros((), jnp.int32))

    def step(state: WarmState, e: Evidence) -> tuple[WarmState, Selection]:
        inner, selection = pruner.step(state.inner, e)
        steps = jnp.where(e.since_full == NO_HISTORY, 0, state.steps)
        state = WarmState(inner, jnp.minimum(steps + 1, w).astype(jnp.int32))
        return state, selection.replace(keyframe=selection.keyframe | (steps < w))

    def later(state: WarmState, e: Evidence, i: int) -> tuple[WarmState, Selection]:
        inner, selection = decide(state.inner, e, i)
        return state.replace(inner=inner), selection

    return replace(pruner, init=init, step=step, later=later if decide else None)


def warmed(factory: Callable[..., Pruner], follows: str | None = None) -> Callable[..., Pruner]:
    """The factory with one choice more, `warm_start`.

    Args:
      factory: keyword-only, with an "Args:" section in its docstring.
      follows: the choice whose value w is unless it is given; None: without `warm_start` there is no warm start.
    """
    signature, doc = inspect.signature(factory), inspect.cleandoc(factory.__doc__ or "")
    if CHOICE in signature.parameters:
        return factory

    @functools.wraps(factory)
    def made(*, warm_start: int | None = None, **choices: Any) -> Pruner:
        pruner = factory(**choices)
        if warm_start is None and follows:
            warm_start = choices.get(follows, signature.parameters[follows].default)
        return pruner if warm_start is None else warm(pruner, warm_start)

    del made.__wrapped__  # who unwraps it to read its types would not see this choice
    choice = inspect.Parameter(CHOICE, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=int | None)
    made.__signature__ = signature.replace(parameters=[*signature.parameters.values(), choice])
    made.__annotations__ = {CHOICE: int | None} | factory.__annotations__
    head, section, rest = doc.partition("\nArgs:\n")
    body, gap, rest = rest.partition("\n\n")
    unless = f"those of `{follows}`" if follows else "none"
    text = f"  {CHOICE}: w ≥ 1 steps at the start of an episode that run everything. None: {unless}."
    made.__doc__ = f"{head}{section or chr(10) * 2 + 'Args:' + chr(10)}{body}\n{text}{gap}{rest}"
    return made
