"""The engine on openpi's small π0.5: what runs on how many tokens, and for whom."""

import copy
import inspect
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import small
from tiers import at_night, by_day
from tiny_engine import CUT, SLOTS, close, compilations, example, inputs_of, prepared, reference

from safe_pruner_jax.engine.engine import BATCH_SIZES, Engine, Inputs, batch_size
from safe_pruner_jax.engine.programs import finish, shallow
from safe_pruner_jax.model import gemma, pi0, siglip
from safe_pruner_jax.model.config import pi05
from safe_pruner_jax.model.params import param_shapes
from safe_pruner_jax.policy.policy import all_slots, layout_of, pack
from safe_pruner_jax.pruners import PRUNERS


def test_a_new_episode_starts_from_one_blank_state(ref, weights):
    made = []
    pruner = PRUNERS["safe"]()
    counted = replace(pruner, init=lambda e: made.append(e.visual.shape[0]) or pruner.init(e))
    engine = Engine(weights, ref.config, counted)
    first, second, both = engine.init((1,), 2), engine.init((2,), 2), engine.init((1, 2), 1)
    assert made == [32, 16]  # once for each number of cameras
    assert jax.tree.map(jnp.shape, first) == jax.tree.map(jnp.shape, second) and both.alive.shape == (2, 16)
    keys = [jax.random.key_data(state.key) for state in (first, second)]
    np.testing.assert_array_equal(jax.random.key_data(both.key), np.concatenate(keys))
    assert not np.array_equal(*keys)


# Dead tokens


def test_leaving_dead_tokens_out_gives_openpis_actions(golden_examples):
    ref = reference()
    noise, full_engine = ref.arrays["in/noise"], Engine(prepared(), ref.config, PRUNERS["full"]())
    everything = jax.device_put(pack(golden_examples, all_slots(ref.config)))
    assert everything.images.shape[1] == 3 and everything.tokens.shape[1] == 200
    np.testing.assert_array_equal(everything.token_mask, ref.arrays["in/tokenized_prompt_mask"])
    all_actions, _, info = full_engine.step(full_engine.init((0, 1), 3), everything, jax.device_put(noise))
    assert info.keyframe.all() and info.decided_at is None
    close(all_actions, ref.arrays["out_posemb64/b2/actions"])

    layout = layout_of(golden_examples[0], ref.config)
    assert (layout.cameras, layout.text) == (ref.config.cameras[:2], SLOTS)
    alive = jax.device_put(pack(golden_examples[:1], layout))
    actions, _, _ = full_engine.step(full_engine.init((0,), 2), alive, jax.device_put(noise[:1]))
    close(actions, ref.arrays["out_posemb64/b1/actions"])
    close(actions[0], all_actions[0])


@pytest.fixture
def seen(monkeypatch):
    """(part, rows, keys before its own) of every layer traced."""
    log = []
    layer, keys, encode = gemma.layer, gemma.keys_and_values, siglip.encode

    def spy_layer(c, w, x, cos_sin, mask, cache=(), mod=None, place=None):
        log.append(("expert" if cache else "prefix", x.shape[1], sum(s.k.shape[1] for s in cache)))
        return layer(c, w, x, cos_sin, mask, cache, mod, place)

    def spy_keys(c, w, x, cos_sin):
        log.append(("keys", x.shape[1], 0))
        return keys(c, w, x, cos_sin)

    def spy_encode(w, config, images):
        log.append(("image", images.shape[0], 0))
        return encode(w, config, images)

    monkeypatch.setattr(gemma, "layer", spy_layer)
    monkeypatch.setattr(gemma, "keys_and_values", spy_keys)
    monkeypatch.setattr(siglip, "encode", spy_encode)

    def take():
        out = log.copy()
        log.clear()
        return out

    return take


@pytest.fixture(scope="module")
def released():
    """π0.5 at its released size, shapes only."""
    config = pi05(action_horizon=10)
    return config, jax.eval_shape(lambda p: pi0.prepare(p, config), param_shapes(config))


def trace(engine, layout, seen):
    """What each program of an engine runs on, by name."""
    config, shape = engine.config, jax.ShapeDtypeStruct
    C, T, S = len(layout.cameras), layout.text, config.image_size
    inputs = Inputs(
        shape((1, C, S, S, 3), np.uint8),
        shape((1, C), bool),
        shape((1, T), np.int32),
        shape((1, T), bool),
        shape((1, config.action_dim), np.float32),
    )
    control = jax.eval_shape(lambda: engine.init((0,), C))
    carry = jax.eval_shape(engine.shallow, engine.weights, control, inputs, None)
    out = {"shallow": seen()}
    for name in ("full", "pruned") if engine.plan.cut else ("full",):
        actions, after = jax.eval_shape(getattr(engine, name), engine.weights, carry, None)
        assert actions.shape == (1, config.action_horizon, config.action_dim)
        assert jax.tree.structure(after) == jax.tree.structure(control)
        out[name] = seen()
    return out


def layout_for(config, cameras, prompt):
    masks = {c: i < cameras for i, c in enumerate(config.cameras)}
    return layout_of(SimpleNamespace(image_mask=masks, tokens=range(prompt)), config)


def test_full_runs_every_slot_of_its_layout_once(released, seen):
    config, shapes = released
    engine = Engine(shapes, config, PRUNERS["full"]())
    for layout, cameras, slots in ((all_slots(config), 3, 968), (layout_for(config, 2, 23), 2, 544)):
        got = trace(engine, layout, seen)
        assert got["shallow"] == [("image", cameras, 0)]
        prefix = [("prefix", slots, 0)] * 17 + [("keys", slots, 0)]
        assert got["full"] == prefix + [("expert", 10, slots)] * 18


@pytest.mark.parametrize("keep, kept", [(0.2, 102), *at_night((0.3, 154), (0.1, 51))])
def test_pruned_runs_the_kept_tokens_after_the_cut(released, seen, keep, kept):
    config, shapes = released
    engine = Engine(shapes, config, PRUNERS["safe"](keep=keep))
    got = trace(engine, layout_for(config, 2, 23), seen)
    # the first denoise step's action tokens ask for the saliency, through the layers before the cut
    assert got["shallow"] == [("image", 2, 0)] + [("prefix", 544, 0)] * 3 + [("expert", 10, 544)] * 3
    assert got["full"] == [("prefix", 544, 0)] * 14 + [("keys", 544, 0)] + [("expert", 10, 544)] * 18
    after = kept + 32
    expert = [("expert", 10, 544)] * 3 + [("expert", 10, after)] * 15
    assert got["pruned"] == [("prefix", after, 0)] * 14 + [("keys", after, 0)] + expert


def test_a_dead_camera_in_the_layout_is_the_same_as_none(ref, engine, scenes):
    """The pruned path too: the budget is taken of the alive tokens, the rest of the slots is padding."""
    out = []
    for cameras in (1, 2):
        control = engine.init((3,), cameras)
        for name in ("a", "a0"):
            one = example(ref.config, scenes[name], mask=(True, False))
            actions, control, info = engine.step(control, inputs_of(ref.config, one, cameras=cameras))
        assert not info.keyframe[0]
        index, alive = (np.asarray(x[0]) for x in (info.selection.index, info.selection.alive))
        out.append((actions, index[alive], info.selection.kappa))
    close(out[0][0], out[1][0])
    np.testing.assert_array_equal(out[0][1], out[1][1])
    assert len(out[0][1]) == 3 and out[0][1].max() < 16
    close(out[0][2], out[1][2])


# Pruning


BY_DAY = ("safe", "sparsevlm", "vla_cache")
"""One cut, several with merged tokens, and reused keys; the others are among them in what they compile."""


@pytest.mark.parametrize("name", by_day(BY_DAY.__contains__, sorted(set(PRUNERS) - {"full"})))
def test_keeping_everything_is_the_full_path(ref, weights, full_engine, scenes, name):
    wanted = {"keep": 1.0, "threshold": -1.0, "window": 1}
    known = inspect.signature(PRUNERS[name]).parameters
    engine = Engine(weights, ref.config, PRUNERS[name](**{k: v for k, v in wanted.items() if k in known}))
    noise = jax.device_put(ref.arrays["in/noise"][:1])
    control, plain = engine.init((0,), 2), full_engine.init((0,), 2)
    for frame in ("a", "b"):
        inputs = inputs_of(ref.config, example(ref.config, scenes[frame]))
        actions, control, info = engine.step(control, inputs, noise)
        want, plain, _ = full_engine.step(plain, inputs, noise)
        close(actions, want)
    assert engine.plan.cut is None or not info.keyframe[0]


def test_pruning_is_masking_after_the_cut(ref, engine, scenes):
    """Kept tokens keep their RoPE position and the action tokens start at the unpruned count."""
    config, steps = ref.config, ("a", "a1")
    control = engine.init((0,), 2)
    first, second = (inputs_of(config, example(config, scenes[s])) for s in steps)
    _, control, _ = engine.step(control, first)
    carry = engine.shallow(engine.weights, control, second, None)
    assert not carry.selection.keyframe[0]
    got, _ = engine.pruned(engine.weights, carry, None)

    @jax.jit
    def masked(weights, carry, kept, positions, count):
        mask = carry.rows.mask & jnp.concatenate([kept, jnp.ones((1, SLOTS), bool)], axis=1)
        after = range(CUT, config.depth)
        _, segments, _ = pi0.prefix_layers(weights, config, pi0.Rows(carry.rows.x, positions, mask), after)
        prefix = pi0.Prefix(carry.segments + segments, count)
        return pi0.sample(weights, config, prefix, carry.state, carry.noise)[0]

    kept = np.zeros((1, 32), bool)
    kept[0, np.asarray(carry.selection.index[0])[np.asarray(carry.selection.alive[0])]] = True
    assert kept.sum() == 6
    alive = np.asarray(carry.rows.mask)
    count = alive.sum(1, dtype=np.int32)
    assert count == 32 + 37
    run = partial(masked, engine.weights, carry, kept)
    close(run(np.asarray(carry.rows.positions), count), got)
    # what renumbering would give is something else
    left = alive & np.concatenate([kept, np.ones((1, SLOTS), bool)], axis=1)
    renumbered = (np.cumsum(left, axis=1) - 1).astype(np.int32)
    assert np.abs(run(renumbered, count) - got).max() > 1e-2
    assert np.abs(run(np.asarray(carry.rows.positions), left.sum(1, dtype=np.int32)) - got).max() > 1e-2


# Batches

STEPS = 4
ROBOTS = (
    # prompt, cameras and frames of each; step 1 cuts robot 1's scene, at step 3 robot 3 loses a camera
    dict(length=5, mask=[(True, True)] * 4, frames=("a", "a0", "a1", "a2")),
    dict(length=37, mask=[(True, True)] * 4, frames=("a", "b", "b", "b")),
    dict(length=20, mask=[(True, False)] * 4, frames=("b", "b", "b", "b")),
    dict(length=48, mask=[(True, True)] * 3 + [(True, False)], frames=("a3", "a3", "a", "a0")),
)
KEYFRAMES = np.array([[1, 1, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]], bool)


def robot_example(config, scenes, robot, step):
    r = ROBOTS[robot]
    return example(config, scenes[r["frames"][step]], mask=r["mask"][step], length=r["length"], seed=robot)


@pytest.fixture(scope="module")
def episode(ref, engine, scenes):
    """Four robots played together, then each alone; and which program ran on which rows."""
    calls, spied = [], copy.copy(engine)

    def spy(name):
        def call(weights, carry, rows):
            calls.append((name, None if rows is None else np.asarray(rows).tolist()))
            return getattr(engine, name)(weights, carry, rows)

        return call

    spied.full, spied.pruned = spy("full"), spy("pruned")
    control, batch = engine.init((0, 1, 2, 3), 2), []
    for step in range(STEPS):
        inputs = inputs_of(ref.config, *(robot_example(ref.config, scenes, r, step) for r in range(4)))
        actions, control, info = spied.step(control, inputs)
        batch.append((actions, control, info))
    alone = []
    for r in range(4):
        control, steps = engine.init((r,), 2), []
        for step in range(STEPS):
            actions, control, info = engine.step(
                control, inputs_of(ref.config, robot_example(ref.config, scenes, r, step))
            )
            steps.append((actions, control, info))
        alone.append(steps)
    return SimpleNamespace(batch=batch, alone=alone, calls=calls)


def test_every_robot_of_a_batch_equals_the_robot_alone(episode):
    for step, (actions, control, info) in enumerate(episode.batch):
        np.testing.assert_array_equal(info.keyframe, KEYFRAMES[step])
        for r in range(4):
            alone, own, single = (x for x in episode.alone[r][step])
            assert bool(single.keyframe[0]) == KEYFRAMES[step, r]
            close(actions[r], alone[0])
            np.testing.assert_array_equal(info.selection.alive[r], single.selection.alive[0])
            if not KEYFRAMES[step, r]:
                np.testing.assert_array_equal(info.selection.index[r], single.selection.index[0])
            close(info.selection.kappa[r], single.selection.kappa[0])
            close(info.selection.score[r], single.selection.score[0], 1e-6)
            np.testing.assert_array_equal(control.since_full[r], own.since_full[0])
            np.testing.assert_array_equal(jax.random.key_data(control.key[r]), jax.random.key_data(own.key[0]))
            close(control.late[r], own.late[0], 1e-6)
            np.testing.assert_array_equal(control.alive[r], own.alive[0])
            close(control.pruner.shallow[r], own.pruner.shallow[0], 1e-6)
            close(control.pruner.reference[r], own.pruner.reference[0])
    # robots differ, or equality would say little
    actions = np.asarray(episode.batch[-1][0])
    assert min(np.abs(actions[i] - actions[j]).max() for i in range(4) for j in range(i)) > 1e-2


def test_mixed_batches_run_each_program_on_its_own_rows(episode):
    """Padding repeats rows, up to a compiled size."""
    assert episode.calls == [
        ("full", None),
        ("full", [1]),
        ("pruned", [0, 2, 3, 0]),
        ("pruned", None),
        ("full", [3]),
        ("pruned", [0, 1, 2, 0]),
    ]


def test_batch_sizes():
    assert BATCH_SIZES == (1, 2, 4, 8)
    assert [batch_size(r) for r in (1, 2, 3, 4, 5, 8, 9, 16, 17, 33)] == [1, 2, 4, 4, 8, 8, 16, 16, 32, 64]


def test_the_second_time_nothing_is_compiled_or_copied_implicitly(ref, engine, scenes, episode):
    fresh = {B: engine.init(tuple(range(B)), 2) for B in (1, 4)}
    plays = [
        (B, [inputs_of(ref.config, *(robot_example(ref.config, scenes, r, s) for r in range(B))) for s in range(STEPS)])
        for B in (4, 1)
    ]
    before, kinds = len(compilations), set()
    assert before  # the listener works
    with jax.transfer_guard("disallow"):
        for B, play in plays:
            control = fresh[B]
            for inputs in play:
                actions, control, info = engine.step(control, inputs)
                kinds.add((B, bool(info.keyframe.any()), bool(info.keyframe.all())))
        jax.block_until_ready(actions)
    assert kinds == {(4, True, True), (4, True, False), (4, False, False), (1, True, True), (1, False, False)}
    assert len(compilations) == before
    host = jax.device_get(inputs)
    with pytest.raises(Exception, match=r"[Dd]isallowed host-to-device"), jax.transfer_guard("disallow"):
        engine.step(control, host)  # the guard works


# Types


@pytest.mark.parametrize("name", ["full", "safe", "specprune", "vla_cache", "sparsevlm"])
def test_programs_promote_no_type_unasked(name):
    """In bfloat16, where promotion would hide that half a network computes in float32."""
    config = small(max_token_len=16, dtype="bfloat16")
    weights = jax.eval_shape(lambda params: pi0.prepare(params, config, num_steps=2), param_shapes(config))
    engine = Engine(weights, config, PRUNERS[name](**({"cut": 2} if name == "safe" else {})))
    control, shape = engine.init((0,), 2), jax.ShapeDtypeStruct
    images = shape((1, 2, config.image_size, config.image_size, 3), jnp.uint8)
    masks = [shape((1, n), bool) for n in (2, 16)]
    inputs = Inputs(images, masks[0], shape((1, 16), jnp.int32), masks[1], shape((1, config.action_dim), jnp.float32))
    with jax.numpy_dtype_promotion("strict"):
        carry = jax.eval_shape(partial(shallow, config, engine.pruner), weights, control, inputs, None)
        for pruned in (False, True) if engine.plan.cut else (False,):
            finished = jax.eval_shape(partial(finish, config, engine.pruner, pruned), weights, carry)
            assert finished[0].dtype == jnp.float32
