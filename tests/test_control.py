"""What the engine carries from step to step, numbers that are none, and π0 with its state token."""

from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import small
from tiers import at_night
from tiny_engine import FakeTransform, close, compilations, example, inputs_of, poisoned, same

from safe_pruner_jax.engine.engine import Engine
from safe_pruner_jax.model import pi0
from safe_pruner_jax.model.params import draw_params
from safe_pruner_jax.policy.policy import Policy
from safe_pruner_jax.pruners import PRUNERS
from safe_pruner_jax.pruners.base import NO_HISTORY


def test_steps_since_the_last_full_pass_are_counted(engine, alone):
    assert [bool(info.keyframe[0]) for *_, info in alone] == [True, False, False, True, False, True, False, True]
    assert [int(control.since_full[0]) for _, control, _ in alone] == [0, 1, 2, 0, 1, 0, 1, 0]
    assert engine.init((7,), 2).since_full.tolist() == [NO_HISTORY]
    # without a history κ is undefined: first step, camera lost, camera back
    undefined = [bool(np.isnan(info.selection.kappa[0])) for *_, info in alone]
    assert undefined == [True, False, False, False, False, True, False, True]
    assert alone[3][2].selection.kappa[0] < 0.988 < alone[4][2].selection.kappa[0]


def test_only_a_full_pass_replaces_what_is_remembered(alone):
    for (_, before, _), (_, after, info) in pairwise(alone):
        remembered = lambda c: jax.device_get((c.late, c.pruner.reference, c.pruner.shallow))
        if info.keyframe[0]:
            changed = jax.tree.map(lambda a, b: (a != b).any(), remembered(before), remembered(after))
            assert all(jax.tree.leaves(changed))
        else:
            same(remembered(after), remembered(before))
    late = np.asarray(alone[0][1].late[0])
    assert late.shape == (3, 32)
    close(late.sum(1), np.ones(3))
    one_camera = np.asarray(alone[5][1].late[0])
    close(one_camera[:, :16].sum(1), np.ones(3))
    assert not one_camera[:, 16:].any()


def test_a_fresh_state_forgets_and_a_seed_repeats(ref, engine, scenes, alone):
    inputs = inputs_of(ref.config, example(ref.config, scenes["a"]))
    actions, control, info = engine.step(engine.init((7,), 2), inputs)
    np.testing.assert_array_equal(actions, alone[0][0])
    same(control, alone[0][1])
    same(info.selection, alone[0][2].selection)
    other, _, _ = engine.step(engine.init((8,), 2), inputs)
    assert np.abs(other - actions).max() > 1e-2


def test_noise_is_drawn_as_openpi_draws_it(ref, engine, scenes):
    """The policy's key is split once per call; the second half draws, with a batch axis of one."""
    rng, control = jax.random.key(5), engine.init((5, 6), 2)
    for frame in ("a", "a0"):
        two = (example(ref.config, scenes[frame]),) * 2
        carry = jax.eval_shape(engine.shallow, engine.weights, control, inputs_of(ref.config, *two), None)
        assert carry.noise.shape == (2, 10, 32)
    control = engine.init((5,), 2)
    for frame in ("a", "a0"):
        carry = engine.shallow(engine.weights, control, inputs_of(ref.config, example(ref.config, scenes[frame])), None)
        rng, drawn = jax.random.split(rng)
        np.testing.assert_array_equal(carry.noise, jax.random.normal(drawn, (1, 10, 32)))
        control = carry.control
        np.testing.assert_array_equal(jax.random.key_data(control.key[0]), jax.random.key_data(rng))


@pytest.mark.parametrize("temperature", [0.5, *at_night(0.0)])
def test_the_temperature_scales_the_noise_that_is_drawn_and_no_other(ref, weights, scenes, temperature):
    engine = Engine(weights, ref.config.replace(temperature=temperature), PRUNERS["safe"](keep=0.2))
    inputs, own = inputs_of(ref.config, example(ref.config, scenes["a"])), np.ones((1, 10, 32), np.float32)
    carry = engine.shallow(engine.weights, engine.init((5,), 2), inputs, None)
    drawn = temperature * jax.random.normal(jax.random.split(jax.random.key(5))[1], (1, 10, 32))
    np.testing.assert_allclose(carry.noise, drawn, rtol=1e-6)  # XLA may fold the factor into others
    np.testing.assert_array_equal(engine.shallow(engine.weights, engine.init((5,), 2), inputs, own).noise, own)


def test_what_does_not_fit_the_model_is_refused(ref, weights):
    make = lambda **choices: Engine(weights, ref.config, PRUNERS["safe"](**choices))
    with pytest.raises(ValueError, match="keep: expected at most 32 visual tokens"):
        make(keep=33).init((0,), 2)
    assert make(keep=33).init((0,), 3).alive.shape == (1, 48)
    assert make(keep=32).init((0, 1), 2).alive.shape == (2, 32)
    with pytest.raises(ValueError, match="cut: expected a layer index below the model's depth 4, got 4"):
        make(cut=4)
    for late in ((4,), (-5,), (0, 7)):
        with pytest.raises(ValueError, match="late_layers: expected layer indices of a model of depth 4"):
            make(late_layers=late)
    assert make(late_layers=(0, -2, -1)).plan.late_layers == (0, 2, 3)


@pytest.mark.parametrize("where", ["vision", "before the cut", "after the cut"])
def test_evidence_that_is_not_finite_makes_a_keyframe(ref, engine, scenes, where):
    bad, inputs = poisoned(engine, where), inputs_of(ref.config, example(ref.config, scenes["a"]))
    _, control, info = engine.step(engine.init((0,), 2), inputs)
    for _ in range(2):
        actions, control, info = bad.step(control, inputs)
        assert not np.isfinite(actions).all()
        index = np.asarray(info.selection.index[0])
        assert ((index >= 0) & (index < 32)).all() and (np.diff(index) > 0).all()
        if where != "after the cut":  # there the evidence before the cut is still good
            assert info.keyframe[0]
    _, control, info = engine.step(control, inputs)
    _, control, info = engine.step(control, inputs)
    if where != "after the cut":  # NaN in the memory refreshes it once
        assert not info.keyframe[0]
    assert np.isfinite(control.late).all()


# π0


@pytest.mark.parametrize("queries", ["action", *at_night("text", "last")])
def test_pi0_runs_with_its_state_token(queries):
    config = small(pi05=False)
    weights = jax.jit(partial(pi0.prepare, config=config, num_steps=3))(draw_params(config))
    engine = Engine(weights, config, PRUNERS["safe"](keep=1.0, cut=1, threshold=-1, queries=queries))
    rng = np.random.default_rng(0)
    one = example(config, rng.integers(0, 256, (2, 28, 28, 3), np.uint8), length=4)
    transform = FakeTransform(config)
    transform.example = lambda _: transform.request(one)
    policy = Policy(engine, transform)
    policy.warmup()
    control, inputs = engine.init((0,), 2), inputs_of(config, one, slots=6)
    moved = inputs_of(config, one, slots=6).replace(state=jnp.ones((1, 5)))
    before = len(compilations)
    first, control, info = engine.step(control, inputs)
    assert info.keyframe[0] and first.shape == (1, 4, 5)
    carry = engine.shallow(weights, control, inputs, None)
    pruned, _ = engine.pruned(weights, carry, None)
    assert len(compilations) == before  # warmup compiled both halves
    assert not carry.selection.keyframe[0]
    close(carry.selection.score.sum(), 1.0)
    full, _ = engine.full(weights, carry, None)
    close(pruned, full)
    other, _ = engine.full(weights, engine.shallow(weights, control, moved, None), None)
    assert np.abs(other - full).max() > 1e-3  # the state matters to π0
