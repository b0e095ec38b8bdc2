"""Laws every pruner obeys.

Every name of `PRUNERS` is a case by itself, so a new pruner is under the laws as soon as it is registered. A law is a
function of a case; `LAWS` lists them, `test_pruners.py` runs the product. Cases are in `pruner_cases.py`, robots in
`synthetic.py`.
"""

import inspect
import math
import typing
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pruner_cases import BAD, CASES, COUNTED, SLOTWISE, TIED
from synthetic import (
    DEPTH,
    HEADS,
    STEPS,
    TRACES,
    Case,
    D,
    N,
    T,
    all_finite,
    at,
    control_step,
    episode,
    fresh,
    host,
    kept,
    play,
    put,
    run,
    same,
    softmax,
    stack,
)

from safe_pruner_jax import tokens
from safe_pruner_jax.pruners import PRUNERS, Capture, Evidence, Pruner
from safe_pruner_jax.pruners.base import NO_HISTORY

WARM = 5
"""Steps after which every pruner with a quiet scene has a history."""


def budget(case: Case, alive: int) -> int:
    """Tokens a robot with so many alive ones keeps: the share rounded half to even, a count capped."""
    cut = case.pruner.plan.cut
    keep = 1.0 if cut is None else cut.keep
    return min(alive, round(keep * alive) if keep <= 1 else int(keep))


def state_keeps_structure_shapes_and_dtypes(case: Case):
    """Also where jax promotes no type that nobody asked it to."""
    p = case.pruner
    for dtype in (jnp.float32, jnp.bfloat16):  # of the network; no business of the state's
        e = at(episode(0, p, steps=1), 0)
        e = e.replace(visual=e.visual.astype(dtype))
        shapes = jax.eval_shape(lambda e: e, e)
        state = p.init(shapes)  # shapes are enough, and the prompt may be shorter than they say
        before = jax.eval_shape(lambda s: s, state)
        with jax.numpy_dtype_promotion("strict"):
            after, selection = jax.eval_shape(p.step, state, shapes)
        assert jax.tree.structure(after) == jax.tree.structure(before)
        avals = lambda tree: [(a.shape, a.dtype, a.weak_type) for a in jax.tree.leaves(tree)]
        assert avals(after) == avals(before)
        k = budget(case, N)
        assert [(a.shape, a.dtype) for a in jax.tree.leaves(selection)] == [
            ((k,), jnp.int32),
            ((k,), jnp.bool_),
            ((), jnp.bool_),
            ((N,), jnp.float32),
            ((), jnp.float32),
            *([((k, D), shapes.hidden.dtype)] if selection.rows is not None else []),
        ]


def second_call_does_not_trace(case: Case):
    play(case, episode(1, case.pruner, steps=1))
    traced = TRACES[case]
    play(case, episode(1, case.pruner, steps=3))
    assert TRACES[case] == traced


def scan_over_a_batch_equals_each_robot_alone(case: Case):
    """jit(scan(vmap(step))) against a Python loop per robot: neither time nor neighbours change anything."""
    # different dead tokens, keyframes at different steps; the second robot is sick for a while
    robots = [episode(10 + i, case.pruner, dead=4 * i, noise=0.1 + i) for i in range(3)]
    robots[1] = robots[1].replace(visual=put(robots[1].visual, slice(3, 5), np.nan))
    batched = jax.vmap(partial(control_step, case.pruner))
    carry = stack([fresh(case.pruner, at(r, 0)) for r in robots])
    seen = jax.tree.map(lambda a: a.swapaxes(0, 1), stack(robots))
    carry, selection = host(jax.jit(lambda c, s: jax.lax.scan(batched, c, s))(carry, seen))
    for i, robot in enumerate(robots):
        carries, selections = play(case, robot)
        same(at(carry, i), carries[-1])
        same(jax.tree.map(lambda a, i=i: a[:, i], selection), stack(selections))


def selection_is_well_formed(case: Case):
    """Ascending, unique, in range; alive tokens first; as many alive as the robot's own budget; the best by score."""
    rng = np.random.default_rng(4)
    dead = rng.uniform(size=(40, N)) < rng.uniform(size=(40, 1))
    dead[0], dead[1], dead[2] = True, False, np.arange(N) != 5
    robots = [at(episode(i, case.pruner, steps=1, dead=d), 0) for i, d in enumerate(dead)]
    selections = [run(case, fresh(case.pruner, r), r)[1] for r in robots]
    index, alive, score = (np.stack([getattr(s, a) for s in selections]) for a in ("index", "alive", "score"))
    assert (index >= 0).all() and (index < N).all()
    assert (np.diff(index, axis=1) > 0).all()
    for i in range(len(robots)):
        living = ~dead[i]
        assert alive[i].sum() == budget(case, living.sum())
        assert not (alive[i] & ~living[index[i]]).any()
        assert living[index[i]].sum() == min(len(index[i]), living.sum())
        if not dict(case.choices).get("per_camera"):
            best = sorted(np.flatnonzero(living), key=lambda v: (-score[i, v], v))
            assert kept(selections[i]) == set(best[: alive[i].sum()])


def later_cuts_choose_among_those_that_run(case: Case):
    """Well formed like the first choice, within the cut's own budget; the state keeps its shapes; 1.0 drops nobody."""
    if not case.pruner.plan.later:
        return
    for tried in (case, with_everything(case)):
        pruner, plan = tried.pruner, tried.pruner.plan
        seen = episode(13, pruner, shifts=(), noise=0.01, dead=4, steps=WARM + 1, depth=32)
        carry, now = play(tried, seen)[0][-2], at(seen, WARM)
        (state, *_), selection = run(tried, carry, now)
        later = jax.jit(pruner.later, static_argnums=2)
        for i, cut in enumerate(plan.for_depth(32).later):
            running = np.isin(np.arange(N), list(kept(selection)))
            now = now.replace(
                running=running,
                hidden=np.where(running[:, None], now.hidden, 0),
                saliency=tuple(attention(i, c, running) for c in cut.capture),
            )
            with jax.numpy_dtype_promotion("strict"):
                before, (state, selection) = state, later(state, now, i)
            same(*(jax.tree.map(np.zeros_like, host(s)) for s in (before, state)))
            index, chosen = np.asarray(selection.index), kept(selection)
            assert (np.diff(index) > 0).all() and index[0] >= 0 and index[-1] < N
            assert len(index) == tokens.budget(cut.keep, N)
            assert chosen <= set(np.flatnonzero(running).tolist())
            most = min(tokens.budget(cut.keep, N - 4), running.sum())
            assert len(chosen) == most or (case.name in COUNTED and 0 < len(chosen) < most)
            assert np.isfinite(selection.score).all()


def attention(seed: int, capture: Capture, running: np.ndarray) -> np.ndarray:
    """One capture of a layer in which some tokens run."""
    shape = {"each": (T, N), "heads_to_text": (HEADS, N)}.get(capture.rows, N)
    return softmax(np.random.default_rng(seed).normal(size=shape), running).astype(np.float32)


def without_history_it_is_safe(case: Case):
    """A keyframe, or history is ignored; either way nothing of the past is left in the state."""
    seen = episode(5, case.pruner, shifts=())
    carries, _ = play(case, seen)
    last = at(seen, -1)
    junk = np.full_like(last.late, 7.0)
    first_state, first = run(case, fresh(case.pruner, last), last)
    other = jax.tree.map(lambda a: ~a if a.dtype == bool else a + np.ones((), a.dtype), carries[3][0])
    for state in (carries[-2][0], other):
        rest = jax.tree.map(lambda a: np.full_like(a, 7.0), (last.past, last.actions))
        carry, selection = run(case, (state, np.int32(NO_HISTORY), last.alive, junk, rest), last)
        same(carry[0], first_state[0])
        same(selection.keyframe, first.keyframe)
        assert np.isnan(selection.kappa)
        if not selection.keyframe:
            same(selection, first)
            # a robot that is no keyframe without history never looks at history
            for since in (0, 1, 100):
                same(run(case, (state, np.int32(since), last.alive, junk, rest), last)[1], first)


def with_everything(case: Case) -> Case:
    """The same case with a budget of all tokens."""
    if case.pruner.plan.cut is None:
        return case
    return Case(case.name, tuple((dict(case.choices) | {"keep": 1.0}).items()))


def keep_one_keeps_everything(case: Case):
    everything = with_everything(case)
    for dead in (0, 7):
        seen = episode(6, everything.pruner, steps=2, dead=dead)
        for t, selection in enumerate(play(everything, seen)[1]):
            assert kept(selection) == set(np.flatnonzero(seen.alive[t]).tolist())
            np.testing.assert_array_equal(selection.index, np.arange(N))


def finite_evidence_gives_finite_scores(case: Case):
    for dead, scale in ((0, 1.0), (5, 1e-6), (N - 1, 1e6), (N, 1.0)):
        seen = episode(7, case.pruner, dead=dead)
        visual = put(seen.visual, slice(2, 4), seen.visual[2:4] * np.float32(scale))
        seen = seen.replace(visual=put(visual, (5, slice(3)), 0.0))
        carries, selections = play(case, seen)
        for carry, selection in zip(carries, selections, strict=True):
            assert np.isfinite(selection.score).all()
            assert all_finite(carry[0])


def poisoned(seen: Evidence, value: float, token: int):
    """The same evidence with one non-finite entry, for every field that can have one."""
    yield "visual", seen.replace(visual=put(seen.visual, (token, 0), value))
    for i in range(len(seen.saliency)):
        broken = put(seen.saliency[i], token, value)
        yield f"saliency {i}", seen.replace(saliency=(*seen.saliency[:i], broken, *seen.saliency[i + 1 :]))


def non_finite_evidence_gives_a_keyframe(case: Case):
    seen = episode(8, case.pruner, shifts=(), noise=0.01, steps=WARM + 1)
    carries, selections = play(case, seen)
    carry, token = carries[-2], 3
    assert not selections[-1].keyframe or case.pruner.plan.cut is None  # clean evidence would not be one
    for value in (math.nan, math.inf, -math.inf):
        for what, bad in poisoned(at(seen, WARM), value, token):
            _, selection = run(case, carry, bad)
            assert selection.keyframe, f"{value} in {what}"


def non_finite_late_gives_a_keyframe_or_is_unused(case: Case):
    seen = episode(8, case.pruner, shifts=(), noise=0.01, steps=WARM + 1)
    carry = play(case, seen)[0][-2]
    _, clean = run(case, carry, at(seen, WARM))
    assert not clean.keyframe or case.pruner.plan.cut is None
    for layer in range(seen.late.shape[1]):
        for value in (math.nan, math.inf, -math.inf):
            _, selection = run(case, (*carry[:3], put(carry[3], layer, value), carry[4]), at(seen, WARM))
            if not selection.keyframe:
                same(selection, clean)
    for i in range(len(seen.past)):
        for value in (math.nan, math.inf, -math.inf):
            sick = put(carry[4][0][i], ..., value)
            past = (*carry[4][0][:i], sick, *carry[4][0][i + 1 :])
            _, selection = run(case, (*carry[:4], (past, carry[4][1])), at(seen, WARM))
            if not selection.keyframe:
                same(selection, clean)


def recovers_from_non_finite_evidence(case: Case):
    """After a sick step, and the nonsense its full pass left behind, clean evidence heals the pruner."""
    seen = episode(9, case.pruner, shifts=(5,))
    carry = play(case, seen)[0][1]
    for what, bad in poisoned(at(seen, 2), math.nan, 3):
        bad = bad.replace(late=np.full_like(bad.late, np.nan))
        sick, _ = run(case, carry, bad)
        remembers = bool(jax.tree.leaves(sick[0]))
        healed = not remembers
        for t in range(3, STEPS):
            if t == STEPS - 1:  # a reset
                sick = (sick[0], np.int32(NO_HISTORY), *sick[2:])
            was_healed = healed
            sick, selection = run(case, sick, at(seen, t))
            assert selection.keyframe or np.isfinite(selection.score).all(), what
            assert not was_healed or np.isfinite(selection.score).all(), what
            healed |= bool(selection.keyframe) or t == STEPS - 1
            assert not healed or all_finite(sick[0]), what
        assert healed, what


def permuting_tokens_permutes_scores(case: Case):
    seen = episode(11, case.pruner, dead=3)
    perm = np.random.default_rng(0).permutation(N)
    shuffle = lambda a: a[..., perm]
    shuffled = seen.replace(
        visual=seen.visual[:, perm],
        alive=shuffle(seen.alive),
        running=shuffle(seen.alive),
        camera=shuffle(seen.camera),
        saliency=jax.tree.map(shuffle, seen.saliency),
        late=shuffle(seen.late),
        hidden=seen.hidden[:, perm],
        patches=seen.patches[:, perm],
        past=jax.tree.map(lambda a: shuffle(a) if a.ndim > 1 else a, seen.past),
    )
    for a, b in zip(play(case, seen)[1], play(case, shuffled)[1], strict=True):
        same(a.score[perm], b.score)
        same(a.kappa, b.kappa)
        assert a.keyframe == b.keyframe
        assert a.keyframe or kept(a) == {int(perm[v]) for v in kept(b)}


def plan_is_hashable_and_prints_on_one_line(case: Case):
    plan = case.pruner.plan
    again = PRUNERS[case.name](**dict(case.choices)).plan
    assert plan == again and hash(plan) == hash(again)
    hash(case.pruner)
    for text in (repr(plan), str(plan)):
        assert "\n" not in text and " at 0x" not in text
    assert plan.for_depth(DEPTH) == plan.for_depth(DEPTH).for_depth(DEPTH)
    assert case.pruner.name == case.name


def factory_arguments_are_documented_and_checked(case: Case):
    factory = PRUNERS[case.name]
    doc = inspect.getdoc(factory) or ""
    documented = doc.partition("\nArgs:")[2].partition("\n\n")[0]
    hints = typing.get_type_hints(factory)
    assert hints["return"] is Pruner
    assert doc.splitlines()[0].endswith(".")
    for name, parameter in inspect.signature(factory).parameters.items():
        assert parameter.kind is parameter.KEYWORD_ONLY, name
        assert parameter.default is not parameter.empty, f"{name} has no default"
        assert name in hints, f"{name} has no annotation"
        assert any(line.strip().startswith(f"{name}: ") for line in documented.splitlines()), f"{name} has no text"
        assert name in BAD, f"{name}: add values out of range to pruner_cases.BAD"
        for value in BAD[name]:
            with pytest.raises(ValueError, match=r"(?s)expected.*got") as error:
                factory(**{name: value})
            assert "\n" not in str(error.value) and str(value) in str(error.value)
    with pytest.raises(TypeError, match="kep"):
        factory(kep=0.2)


LAWS = [
    state_keeps_structure_shapes_and_dtypes,
    second_call_does_not_trace,
    scan_over_a_batch_equals_each_robot_alone,
    selection_is_well_formed,
    later_cuts_choose_among_those_that_run,
    without_history_it_is_safe,
    keep_one_keeps_everything,
    finite_evidence_gives_finite_scores,
    non_finite_evidence_gives_a_keyframe,
    non_finite_late_gives_a_keyframe_or_is_unused,
    recovers_from_non_finite_evidence,
    permuting_tokens_permutes_scores,
    plan_is_hashable_and_prints_on_one_line,
    factory_arguments_are_documented_and_checked,
]

PAIRS = [
    (law, case)
    for law in LAWS
    for case in CASES
    if not (law is permuting_tokens_permutes_scores and (case.name in SLOTWISE or case in TIED))
]


def is_quick(pair: tuple) -> bool:
    """Whether a law and its case are judged by day: every pruner as it comes, under every law."""
    return not pair[1].choices
