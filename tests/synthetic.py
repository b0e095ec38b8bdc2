"""Synthetic robots that pruners are tried on, and the engine's part in it for one of them.

A *case* is a name of `PRUNERS` with choices. A synthetic robot is an `Evidence` with a leading time axis, whose `late`
is what a full pass of that step would leave behind. `control_step` plays the engine for one robot: it hands the pruner
the feedback of the steps before.
"""

import typing
from dataclasses import dataclass
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from safe_pruner_jax.pruners import PRUNERS, Evidence, Pruner, Selection
from safe_pruner_jax.pruners.base import NO_HISTORY

N, D, CAMERAS, STEPS, DEPTH = 24, 8, 2, 9, 6
T, PIXELS, HORIZON, ACTION, HEADS = 5, 12, 3, 7, 2


@dataclass(frozen=True)
class Case:
    """A pruner under test: its name and the choices that differ from the factory's defaults."""

    name: str
    choices: tuple[tuple[str, typing.Any], ...] = ()

    def __str__(self):
        return self.name + "".join(f",{k}={v}" for k, v in self.choices)

    @property
    def pruner(self) -> Pruner:
        return make(self)


def case(name: str, **choices) -> Case:
    return Case(name, tuple(choices.items()))


@cache
def make(case: Case) -> Pruner:
    return PRUNERS[case.name](**dict(case.choices))


# ── synthetic robots ──────────────────────────────────────────────────────────────────────────────────────────────────


def softmax(logits: np.ndarray, alive: np.ndarray) -> np.ndarray:
    e = np.where(alive, np.exp(logits), 0.0)
    return e / np.maximum(e.sum(-1, keepdims=True), 1e-30)


def episode(
    seed: int,
    pruner: Pruner,
    *,
    steps: int = STEPS,
    n: int = N,
    dead: int | np.ndarray = 0,
    shifts: tuple[int, ...] = (4,),
    noise: float = 0.1,
    moving: bool = True,
    depth: int = DEPTH,
) -> Evidence:
    """Evidence of one robot with leading axis [steps].

    The scene moves by one token slot per step, so that the right correspondence is not the identity; at every step
    in `shifts` attention jumps to other tokens.

    Args:
      seed: of everything.
      pruner: whose plan says which saliencies there are.
      steps, n: length and number of visual slots.
      dead: how many slots (drawn at random) are dead, or the [n] bool mask of dead ones.
      shifts: steps at which a new subtask begins.
      noise: standard deviation of tokens and saliency logits within a subtask.
      moving: False pins every token to its slot.
      depth: layers of the model, which a plan may be scaled to.
    """
    rng = np.random.default_rng(seed)
    mask = np.zeros(n, bool)
    if isinstance(dead, np.ndarray):
        mask |= dead
    else:
        mask[rng.permutation(n)[:dead]] = True
    alive = np.broadcast_to(~mask, (steps, n))
    plan = pruner.plan.for_depth(depth)
    scene = rng.normal(size=(n, D)) * rng.uniform(0.5, 3.0, (n, 1))
    subtask = np.searchsorted(np.asarray(shifts), np.arange(steps), side="right")

    def move(x: np.ndarray) -> np.ndarray:  # [steps, ..., n]
        return np.stack([np.roll(x[t], t * moving, -1) for t in range(steps)])

    def attention(*leading: int) -> np.ndarray:
        logits = 2.0 * rng.normal(size=(len(shifts) + 1, *leading, n))[subtask]
        logits = move(logits + noise * rng.normal(size=logits.shape))
        return softmax(logits, alive.reshape(steps, *[1] * len(leading), n)).astype(np.float32)

    visual = scene.T + noise * rng.normal(size=(steps, D, n))
    visual = np.swapaxes(move(visual), 1, 2) + 0.0
    visual[:, mask] = 1e4 * rng.normal(size=(steps, mask.sum(), D))  # what a dead slot holds must not matter
    camera = np.repeat(np.arange(CAMERAS), -(-n // CAMERAS))[:n]
    captured = {
        "each": lambda: np.stack([attention() / T for _ in range(T)], axis=1) * text_alive[:, None],
        "heads_to_text": lambda: np.stack([attention() for _ in range(HEADS)], axis=1),
        "entropy": lambda: rng.uniform(0.5, 3.0, steps).astype(np.float32),
        "text_entropy": lambda: rng.uniform(0.5, 3.0, steps).astype(np.float32),
    }
    text_alive = np.arange(T) < T - 1
    patches = np.broadcast_to(rng.integers(0, 256, (n, PIXELS)), (steps, n, PIXELS)).astype(np.uint8)
    changing = rng.integers(0, n, (steps, 2))  # two tokens of a static scene differ from the step before
    patches = patches.copy()
    for t in range(1, steps):
        patches[t] = patches[t - 1]
        patches[t, changing[t]] = rng.integers(0, 256, (2, PIXELS))
    return Evidence(
        since_full=np.full(steps, NO_HISTORY, np.int32),
        visual=visual.astype(np.float32),
        alive=alive,
        running=alive,
        camera=np.broadcast_to(camera.astype(np.int32), (steps, n)),
        saliency=tuple(captured.get(c.rows, attention)() for c in plan.capture),
        late=attention(len(plan.late_layers)),
        key=jax.random.split(jax.random.key(seed), steps),
        text=rng.normal(size=(steps, T, D)).astype(np.float32),
        text_alive=np.broadcast_to(text_alive, (steps, T)),
        hidden=(visual + noise * rng.normal(size=visual.shape)).astype(np.float32),
        patches=patches,
        past=tuple(captured.get(c.rows, attention)() for c in plan.remember),
        actions=rng.uniform(-1, 1, (steps, HORIZON, ACTION)).astype(np.float32),
    )


def is_key(a) -> bool:
    return jnp.issubdtype(a.dtype, jax.dtypes.prng_key)


def host(tree):
    """The same pytree in NumPy (PRNG keys excepted): indexing it is cheap, and nothing changes it."""
    return jax.tree.map(lambda a: a if is_key(a) else np.asarray(a), tree)


def at(tree, t):
    return jax.tree.map(lambda a: a[t], tree)


def stack(trees):
    return jax.tree.map(lambda *a: jnp.stack(a) if is_key(a[0]) else np.stack(a), *trees)


def put(a: np.ndarray, where, value) -> np.ndarray:
    """A copy of `a` with `a[where] = value`."""
    a = np.array(a)
    a[where] = value
    return a


# ── the engine's part, for one robot ──────────────────────────────────────────────────────────────────────────────────


def fresh(pruner: Pruner, seen: Evidence):
    """Carry of a robot that has seen nothing: pruner state, steps since full, alive mask, late saliency, the rest."""
    rest = jax.tree.map(np.zeros_like, (seen.past, seen.actions))
    return host(pruner.init(seen)), np.int32(NO_HISTORY), np.zeros_like(seen.alive), np.zeros_like(seen.late), rest


def control_step(pruner: Pruner, carry, seen: Evidence):
    """One control step: evidence with the feedback of earlier steps in, the pruner's choice and new feedback out."""
    state, since, alive, late, rest = carry
    history = (since != NO_HISTORY) & (alive == seen.alive).all()
    since = jnp.where(history, since + 1, NO_HISTORY).astype(jnp.int32)
    known = lambda tree: jax.tree.map(lambda a: jnp.where(history, a, 0.0), tree)
    evidence = seen.replace(since_full=since, late=known(late), past=known(rest[0]), actions=known(rest[1]))
    state, selection = pruner.step(state, evidence)
    since = jnp.where(selection.keyframe, 0, since)
    if pruner.plan.late_from == "every":
        ran = jnp.zeros(seen.alive.shape, bool).at[selection.index].max(selection.alive) | selection.keyframe
        left = jnp.where((ran & seen.alive)[None], seen.late, 0.0)
        late = left / left.sum(-1, keepdims=True)
    else:
        late = jnp.where(selection.keyframe, seen.late, late)
    return (state, since, seen.alive, late, (seen.past, seen.actions)), selection


TRACES: dict[Case, int] = {}
"""How often the program of `run` was traced."""


@cache
def compiled(case: Case):
    def counted(carry, seen):
        TRACES[case] = TRACES.get(case, 0) + 1
        return control_step(case.pruner, carry, seen)

    return jax.jit(counted)


def run(case: Case, carry, seen: Evidence):
    """`control_step`, compiled once for all laws."""
    return host(compiled(case)(carry, seen))


def play(case: Case, seen: Evidence, carry=None):
    """A Python loop over the steps of `seen`; the carry and the selection after each."""
    carry = fresh(case.pruner, at(seen, 0)) if carry is None else carry
    carries, selections = [], []
    for t in range(seen.since_full.shape[0]):
        carry, selection = run(case, carry, at(seen, t))
        carries.append(carry)
        selections.append(selection)
    return carries, selections


def same(a, b, rtol: float = 1e-5, atol: float = 1e-7) -> None:
    """Equal pytrees: floats to rounding, everything else exactly."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype
        if is_key(x):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        if jnp.issubdtype(x.dtype, jnp.floating):
            np.testing.assert_allclose(x, y, rtol=rtol, atol=atol)
        else:
            np.testing.assert_array_equal(x, y)


def all_finite(tree) -> bool:
    floats = [a for a in jax.tree.leaves(tree) if jnp.issubdtype(a.dtype, jnp.floating)]
    return all(bool(np.isfinite(a).all()) for a in floats)


def kept(selection: Selection) -> set[int]:
    """The alive tokens of a selection of one robot."""
    return set(np.asarray(selection.index)[np.asarray(selection.alive)].tolist())
