"""Full steps for any method, at moments that no saliency tells: the first steps, and those after a grasp.

    warm(random(keep=0.2), 3)              a pruner made of a pruner: the first three steps of an episode in full
    after_grasp(fastv(keep=0.2), (6,))     the first step, and those after the gripper's command changed

    with_full_steps(random)(keep=0.2, warm_start=3)     the same through the factory, as the command line has it

The method sees every step and remembers what it would; only its keyframe bit is overruled. What a method gains by
choosing can only be told from what it gains by its full steps if every method may have the same ones.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import struct

from safe_pruner_jax.arrays import Array
from safe_pruner_jax.pruners.base import NO_HISTORY, Evidence, Pruner, Selection, State, whole
from safe_pruner_jax.pruners.checks import require

Ask = Callable[[State, Evidence], tuple[State, Array]]
"""(state, evidence) → (state, bool scalar: the step runs everything)."""


@struct.dataclass
class Overruled:
    """The state of the method, and of who overrules it."""

    inner: State
    own: State


def warm(pruner: Pruner, w: int) -> Pruner:
    """The pruner with `w` ≥ 1 steps in full at the start of an episode, and after the set of alive cameras changes.

    Raises:
      ValueError: w is no whole number of at least 1.

    References:
      VLA-Pruner, Section 4.2: "We warm-start VLA-Pruner with w steps".
    """
    require(whole(w, 1), "warm_start", "a whole number of steps >= 1 or None", w)

    def ask(steps: Array, e: Evidence) -> tuple[Array, Array]:
        steps = jnp.where(e.since_full == NO_HISTORY, 0, steps)
        return jnp.minimum(steps + 1, w).astype(jnp.int32), steps < w

    return _overrule(pruner, lambda _: jnp.zeros((), jnp.int32), ask)


def after_grasp(pruner: Pruner, grippers: tuple[int, ...]) -> Pruner:
    """The pruner with the first step in full, and those that follow a change of a gripper's command.

    A command is the sign of the last of the actions that a step returned, normalised, executed or not. Where fewer are
    executed than returned, the full step comes by that much early. Where subtasks begin and end with the gripper, this
    finds their boundaries; κ is the method's own test.

    Args:
      pruner: any.
      grippers: indices of action values; LIBERO's is 6.

    Raises:
      ValueError: no whole numbers of at least 0; from `init`, indices that the robot's actions do not have.

    References:
      Ours. `libero.demonstrations.subtasks` finds subtasks in the same way.
    """
    grippers = tuple(grippers)
    fine = len(grippers) > 0 and all(whole(g, 0) for g in grippers)
    require(fine, "grippers", "indices of action values, whole numbers >= 0", grippers)

    def init(e: Evidence) -> tuple[Array, Array]:
        values = e.actions.shape[-1]
        require(max(grippers) < values, "grippers", f"indices below {values}, the number of action values", grippers)
        return jnp.zeros(len(grippers), bool), jnp.zeros((), jnp.int32)

    def ask(state: tuple[Array, Array], e: Evidence) -> tuple[tuple[Array, Array], Array]:
        closed, steps = state
        steps = jnp.where(e.since_full == NO_HISTORY, 0, steps)
        now = e.actions[-1, jnp.array(grippers)] > 0
        changed = (steps == 0) | (steps > 1) & (now != closed).any()  # at the second step a command is known at last
        return (now, jnp.minimum(steps + 1, 2).astype(jnp.int32)), changed

    return _overrule(pruner, init, ask)


def _overrule(pruner: Pruner, start: Callable[[Evidence], State], ask: Ask) -> Pruner:
    """The pruner whose steps also run everything where `ask` says so."""
    if pruner.plan.cut is None:
        return pruner
    decide = pruner.later

    def init(e: Evidence) -> Overruled:
        return Overruled(pruner.init(e), start(e))

    def step(state: Overruled, e: Evidence) -> tuple[Overruled, Selection]:
        inner, selection = pruner.step(state.inner, e)
        own, everything = ask(state.own, e)
        return Overruled(inner, own), selection.replace(keyframe=selection.keyframe | everything)

    def later(state: Overruled, e: Evidence, i: int) -> tuple[Overruled, Selection]:
        inner, selection = decide(state.inner, e, i)
        return state.replace(inner=inner), selection

    return replace(pruner, init=init, step=step, later=later if decide else None)


class Choice(NamedTuple):
    """A keyword that `with_full_steps` adds: who obeys it, its type, and what it is."""

    wrapper: Callable[[Pruner, Any], Pruner]
    kind: Any
    about: str


CHOICES = {
    "warm_start": Choice(warm, int | None, "w ≥ 1 steps at the start of an episode that run everything. None: {none}."),
    "grippers": Choice(
        after_grasp,
        tuple[int, ...] | None,
        "indices of the action values that open and close grippers; the step after one of them changed sign runs "
        "everything, and so does the first. None: they are not looked at.",
    ),
}
"""What `with_full_steps` adds to a factory, by keyword; each is None unless it is given."""


def with_full_steps(factory: Callable[..., Pruner], follows: str | None = None) -> Callable[..., Pruner]:
    """The factory with the choices of `CHOICES` that it does not have itself.

    Args:
      factory: keyword-only, with an "Args:" section in its docstring.
      follows: the choice whose value w is unless it is given; None: without `warm_start` there is no warm start.
    """
    signature, doc = inspect.signature(factory), inspect.cleandoc(factory.__doc__ or "")
    added = {name: choice for name, choice in CHOICES.items() if name not in signature.parameters}
    if not added:
        return factory

    @functools.wraps(factory)
    def made(**choices: Any) -> Pruner:
        asked = {name: choices.pop(name, None) for name in added}
        pruner = factory(**choices)
        if follows and asked["warm_start"] is None:
            asked["warm_start"] = choices.get(follows, signature.parameters[follows].default)
        for name, value in asked.items():
            pruner = pruner if value is None else CHOICES[name].wrapper(pruner, value)
        return pruner

    del made.__wrapped__  # who unwraps it to read its types would not see these choices
    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=choice.kind)
        for name, choice in added.items()
    ]
    made.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *parameters])
    made.__annotations__ = {name: choice.kind for name, choice in added.items()} | factory.__annotations__
    made.__doc__ = _described(doc, added, f"those of `{follows}`" if follows else "none")
    return made


def _described(doc: str, added: Mapping[str, Choice], none: str) -> str:
    """A factory's docstring with what was added; without a warm start of its own there is `none`."""
    head, section, rest = doc.partition("\nArgs:\n")
    body, gap, rest = rest.partition("\n\n")
    text = "\n".join(f"  {name}: {choice.about.format(none=none)}" for name, choice in added.items())
    return f"{head}{section or chr(10) * 2 + 'Args:' + chr(10)}{body}\n{text}{gap}{rest}"
