"""The engine and the session on openpi's small π0.5: what runs on how many tokens, for whom, and what is remembered.

Programs are compiled once: most tests share one engine, whose layout is two cameras and 48 prompt slots.
"""

import copy
import inspect
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safe_pruner_jax import parity
from safe_pruner_jax.engine import BATCH_SIZES, Engine, Inputs, batch_size
from safe_pruner_jax.loading import embedded_params
from safe_pruner_jax.model import gemma, pi0, siglip
from safe_pruner_jax.model.config import GemmaConfig, Pi0Config, SiglipConfig, pi05
from safe_pruner_jax.model.params import param_shapes
from safe_pruner_jax.observation import Example
from safe_pruner_jax.policy import Policy, all_slots, layout_of, pack
from safe_pruner_jax.pruners import PRUNERS
from safe_pruner_jax.pruners.base import NO_HISTORY
from safe_pruner_jax.tokens import PrefixLayout

DATA = Path(__file__).parent / "data"
SLOTS = 48
CUT = 2
compilations = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: compilations.append(event) if event.endswith("backend_compile_duration") else None
)


def close(got, want, atol=1e-5):
    np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=0, atol=atol)


def same(got, want):
    """Equal to the last bit, over whole pytrees; keys by their bits."""
    bits = lambda a: jax.random.key_data(a) if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else a
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(bits(a), bits(b)), got, want)


@pytest.fixture(scope="module")
def ref():
    return parity.load_reference(DATA / "openpi_pi05_tiny.npz")


@pytest.fixture(scope="module")
def weights(ref):
    return jax.jit(lambda p: pi0.prepare(p, ref.config))(ref.params)


@pytest.fixture(scope="module")
def engine(ref, weights):
    """SAFE on prompt rows, so that κ does not depend on the noise: the same frame has κ = 1, another scene 0.976."""
    return Engine(weights, ref.config, PRUNERS["safe"](keep=0.2, cut=CUT, threshold=0.988, queries="text"))


@pytest.fixture(scope="module")
def full_engine(ref, weights):
    return Engine(weights, ref.config, PRUNERS["full"]())


@pytest.fixture(scope="module")
def scenes(ref):
    """Two scenes [camera, 224, 224, 3], and the first with a bright square that wanders."""
    with np.load(DATA / "safe_tiny_text.npz") as file:
        a = file["frames"][0]
    b = np.stack([ref.arrays[f"in/image/{c}"][1] for c in ref.config.cameras[:2]])
    squares = []
    for i in range(4):
        square = a.copy()
        square[0, 40 * i : 40 * i + 28, 56:98] = 230
        squares.append(square)
    return {"a": a, "b": b} | {f"a{i}": s for i, s in enumerate(squares)}


def example(config, images, *, mask=(True, True), length=37, seed=0):
    tokens = np.random.default_rng(seed).integers(0, config.vocab_size, length).astype(np.int32)
    cameras = config.cameras[: len(images)]
    return Example(
        dict(zip(cameras, images, strict=True)),
        dict(zip(cameras, mask, strict=True)),
        np.zeros(config.action_dim, np.float32),
        tokens,
    )


def inputs_of(config, *examples, cameras=2, slots=SLOTS):
    layout = PrefixLayout(config.cameras[:cameras], config.tokens_per_camera, slots)
    return jax.device_put(pack(examples, layout))


# Dead tokens


@pytest.fixture(scope="module")
def golden_examples(ref):
    def one(i):
        cameras = ref.config.cameras
        return Example(
            {c: ref.arrays[f"in/image/{c}"][i] for c in cameras},
            {c: bool(ref.arrays[f"in/image_mask/{c}"][i]) for c in cameras},
            ref.arrays["in/state"][i],
            ref.arrays["in/tokenized_prompt"][i][ref.arrays["in/tokenized_prompt_mask"][i]],
        )

    return [one(0), one(1)]


def test_leaving_dead_tokens_out_gives_openpis_actions(ref, full_engine, golden_examples):
    noise = ref.arrays["in/noise"]
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


@pytest.mark.parametrize("keep, kept", [(0.3, 154), (0.2, 102), (0.1, 51)])
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
    assert len(out[0][1]) == 51 and out[0][1].max() < 256
    close(out[0][2], out[1][2])


# Pruning


@pytest.mark.parametrize("name", sorted(set(PRUNERS) - {"full"}))
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
        mask = carry.mask & jnp.concatenate([kept, jnp.ones((1, SLOTS), bool)], axis=1)
        after = range(CUT, config.depth)
        _, segments, _ = pi0.prefix_layers(weights, config, carry.x, positions, mask, after)
        return pi0.sample(weights, config, carry.segments + segments, count, carry.state, carry.noise)[0]

    kept = np.zeros((1, 512), bool)
    kept[0, np.asarray(carry.selection.index[0])[np.asarray(carry.selection.alive[0])]] = True
    assert kept.sum() == 102
    alive = np.asarray(carry.mask)
    count = alive.sum(1, dtype=np.int32)
    assert count == 512 + 37
    run = partial(masked, engine.weights, carry, kept)
    close(run(np.asarray(carry.positions), count), got)
    # what renumbering would give is something else
    left = alive & np.concatenate([kept, np.ones((1, SLOTS), bool)], axis=1)
    renumbered = (np.cumsum(left, axis=1) - 1).astype(np.int32)
    assert np.abs(run(renumbered, count) - got).max() > 1e-2
    assert np.abs(run(np.asarray(carry.positions), left.sum(1, dtype=np.int32)) - got).max() > 1e-2


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


# What is carried


@pytest.fixture(scope="module")
def alone(ref, engine, scenes):
    """One robot through quiet steps, a scene cut and a lost camera: every control state and info."""
    control, out = engine.init((7,), 2), []
    plan = [("a", True), ("a0", True), ("a1", True), ("b", True), ("b", True), ("b", False), ("b", False), ("b", True)]
    for frame, second in plan:
        inputs = inputs_of(ref.config, example(ref.config, scenes[frame], mask=(True, second)))
        actions, control, info = engine.step(control, inputs)
        out.append((np.asarray(actions), control, info))
    return out


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
        remembered = lambda c: jax.device_get((c.late, c.pruner))
        if info.keyframe[0]:
            changed = jax.tree.map(lambda a, b: (a != b).any(), remembered(before), remembered(after))
            assert all(jax.tree.leaves(changed))
        else:
            same(remembered(after), remembered(before))
    late = np.asarray(alone[0][1].late[0])
    assert late.shape == (3, 512)
    close(late.sum(1), np.ones(3))
    one_camera = np.asarray(alone[5][1].late[0])
    close(one_camera[:, :256].sum(1), np.ones(3))
    assert not one_camera[:, 256:].any()


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


def test_what_does_not_fit_the_model_is_refused(ref, weights):
    make = lambda **choices: Engine(weights, ref.config, PRUNERS["safe"](**choices))
    with pytest.raises(ValueError, match="keep: expected at most 512 visual tokens"):
        make(keep=513).init((0,), 2)
    assert make(keep=513).init((0,), 3).alive.shape == (1, 768)
    assert make(keep=512).init((0, 1), 2).alive.shape == (2, 512)
    with pytest.raises(ValueError, match="cut: expected a layer index below the model's depth 4, got 4"):
        make(cut=4)
    for late in ((4,), (-5,), (0, 7)):
        with pytest.raises(ValueError, match="late_layers: expected layer indices of a model of depth 4"):
            make(late_layers=late)
    assert make(late_layers=(0, -2, -1)).plan.late_layers == (0, 2, 3)


# Numbers that are none


def poisoned(engine, where):
    """The same compiled programs on weights with one NaN."""
    spoil = lambda a: a.at[(0,) * a.ndim].set(jnp.nan)
    w, out = engine.weights, copy.copy(engine)
    if where == "vision":
        out.weights = w.replace(vision=w.vision.replace(head=w.vision.head.replace(w=spoil(w.vision.head.w))))
    elif where == "before the cut":
        out.weights = w.replace(prefix=(w.prefix[0].replace(down=spoil(w.prefix[0].down)), *w.prefix[1:]))
    else:
        out.weights = w.replace(
            prefix=(*w.prefix[:-1], w.prefix[-1].replace(qkv=jnp.full_like(w.prefix[-1].qkv, jnp.nan)))
        )
    return out


@pytest.mark.parametrize("where", ["vision", "before the cut", "after the cut"])
def test_evidence_that_is_not_finite_makes_a_keyframe(ref, engine, scenes, where):
    bad, inputs = poisoned(engine, where), inputs_of(ref.config, example(ref.config, scenes["a"]))
    _, control, info = engine.step(engine.init((0,), 2), inputs)
    for _ in range(2):
        actions, control, info = bad.step(control, inputs)
        assert not np.isfinite(actions).all()
        index = np.asarray(info.selection.index[0])
        assert ((index >= 0) & (index < 512)).all() and (np.diff(index) > 0).all()
        if where != "after the cut":  # there the evidence before the cut is still good
            assert info.keyframe[0]
    _, control, info = engine.step(control, inputs)
    _, control, info = engine.step(control, inputs)
    if where != "after the cut":  # NaN in the memory refreshes it once
        assert not info.keyframe[0]
    assert np.isfinite(control.late).all()


# π0


@pytest.mark.parametrize("queries", ["action", "text", "last"])
def test_pi0_runs_with_its_state_token(queries):
    config = Pi0Config(
        False,
        prefix=GemmaConfig(12, 3, 20, 4, 2, 6),
        expert=GemmaConfig(8, 3, 16, 4, 2, 6),
        vision=SiglipConfig(10, 1, 14, 2),
        vocab_size=31,
        action_dim=5,
        action_horizon=4,
        max_token_len=6,
        image_size=28,
        dtype="float32",
    )
    weights = jax.jit(partial(pi0.prepare, config=config, num_steps=3))(embedded_params(config))
    engine = Engine(weights, config, PRUNERS["safe"](keep=1.0, cut=1, threshold=-1, queries=queries))
    rng = np.random.default_rng(0)
    one = example(config, rng.integers(0, 256, (2, 28, 28, 3), np.uint8), length=4)
    transform = FakeTransform(config)
    transform.config = SimpleNamespace(robot=SimpleNamespace(example=lambda _: transform.request(one)))
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


# Sessions


class BadRequest(ValueError):
    pass


class FakeTransform:
    """A robot whose request already is a network input."""

    def __init__(self, config):
        self.model, self.finished = config, []

    @staticmethod
    def request(one, prompt="go", **more):
        return {"example": one, "prompt": prompt} | more

    def prepare(self, request):
        if "example" not in request:
            raise BadRequest("example: expected a network input, got none")
        return request["example"], request.get("context")

    def finish(self, actions, context):
        assert actions.shape == (self.model.action_horizon, self.model.action_dim)
        return {"actions": actions.astype(np.float64)[:, :7], "context": context}


@pytest.fixture
def policy(ref, engine):
    return Policy(engine, FakeTransform(ref.config), prompt_lengths=(SLOTS,), seed=7, metadata={"robot": "fake"})


@pytest.fixture
def ask(ref, scenes):
    """A request: the frame's name, the cameras that are real, and anything else."""

    def request(frame="a", mask=(True, True), **more):
        return FakeTransform.request(example(ref.config, scenes[frame], mask=mask), **more)

    return request


def test_a_reply_has_openpis_keys_and_says_what_was_pruned(policy, ask, alone):
    session = policy.session()
    first, second = session.infer(ask("a", context="c")), session.infer(ask("a0"))
    assert set(first) == {"actions", "context", "policy_timing", "pruning"}
    assert first["context"] == "c" and policy.metadata == {"robot": "fake"}
    # the session is the engine with the policy's seed
    np.testing.assert_array_equal(first["actions"], alone[0][0][0, :, :7])
    np.testing.assert_array_equal(second["actions"], alone[1][0][0, :, :7])
    for reply in (first, second):
        timing = reply["policy_timing"]
        assert set(timing) == {"infer_ms", "shallow_ms", "rest_ms"} and min(timing.values()) > 0
        assert timing["infer_ms"] == pytest.approx(timing["shallow_ms"] + timing["rest_ms"])
        assert all(type(v) is float for v in timing.values())
        pruning = reply["pruning"]
        assert set(pruning) == {"kept", "alive", "keyframe", "kappa", "index"}
        assert pruning["alive"] == 512 and pruning["kept"] == len(pruning["index"])
        assert type(pruning["keyframe"]) is bool
        assert pruning["index"].dtype == np.int32 and (np.diff(pruning["index"]) > 0).all()
    assert first["pruning"]["keyframe"] and first["pruning"]["kept"] == 512 and first["pruning"]["kappa"] is None
    assert not second["pruning"]["keyframe"] and second["pruning"]["kept"] == 102
    assert 0.988 < second["pruning"]["kappa"] <= 1.0001


def test_a_policy_can_keep_its_thoughts_to_itself(engine, ref, ask):
    quiet = Policy(engine, FakeTransform(ref.config), prompt_lengths=(SLOTS,), describe=False)
    assert set(quiet.session().infer(ask())) == {"actions", "context", "policy_timing"}


def test_a_policy_that_decides_nothing_times_the_whole(full_engine, ref, ask, golden_examples):
    session = Policy(full_engine, FakeTransform(ref.config), prompt_lengths=(SLOTS,)).session()
    request = FakeTransform.request(golden_examples[0])
    reply = session.infer(request, noise=ref.arrays["in/noise"][0].astype(np.float64))
    assert set(reply["policy_timing"]) == {"infer_ms"}
    close(reply["actions"], ref.arrays["out_posemb64/b1/actions"][0, :, :7])
    assert (reply["pruning"]["kept"], reply["pruning"]["keyframe"], reply["pruning"]["kappa"]) == (512, True, None)


def started_afresh(reply):
    return reply["pruning"]["keyframe"] and reply["pruning"]["kappa"] is None


def test_what_starts_an_episode_afresh(policy, ask):
    session = policy.session()
    first = session.infer(ask())
    assert started_afresh(first)
    assert not session.infer(ask("a0"))["pruning"]["keyframe"]
    again = session.infer(ask(reset=True))
    assert started_afresh(again)
    np.testing.assert_array_equal(again["actions"], first["actions"])  # the noise starts anew as well
    assert not session.infer(ask(reset=False))["pruning"]["keyframe"]
    assert started_afresh(session.infer(ask(prompt="stop")))
    assert not session.infer(ask(prompt="stop"))["pruning"]["keyframe"]
    assert started_afresh(session.infer(ask(prompt="stop", mask=(True, False))))
    assert not session.infer(ask(prompt="stop", mask=(True, False)))["pruning"]["keyframe"]
    assert started_afresh(session.infer(ask(prompt="stop")))
    session.reset()
    assert started_afresh(session.infer(ask(prompt="stop")))


def test_sessions_do_not_share_anything(policy, ask):
    one, two = policy.session(), policy.session()
    first = one.infer(ask())
    assert started_afresh(two.infer(ask("b")))
    assert not one.infer(ask("a0"))["pruning"]["keyframe"]
    np.testing.assert_array_equal(policy.session().infer(ask())["actions"], first["actions"])


def test_a_bad_request_leaves_the_session_as_it_was(policy, ask, alone, ref, scenes):
    session = policy.session()
    session.infer(ask())
    too_long = FakeTransform.request(example(ref.config, scenes["a"], length=201), prompt="another", reset=True)
    with pytest.raises(BadRequest):
        session.infer({"prompt": "another", "reset": True})
    with pytest.raises(ValueError, match="at most 200 tokens, got 201"):
        session.infer(too_long)
    reply = session.infer(ask("a0"))
    assert not reply["pruning"]["keyframe"]
    np.testing.assert_array_equal(reply["actions"], alone[1][0][0, :, :7])


def test_actions_that_are_not_finite_are_an_error_and_reset_the_session(policy, engine, ask, alone):
    session = policy.session()
    session.infer(ask())
    policy.engine = poisoned(engine, "after the cut")
    with pytest.raises(FloatingPointError, match=r"expected finite actions.* memory was reset"):
        session.infer(ask("a0"))
    policy.engine = engine
    reply = session.infer(ask())
    assert started_afresh(reply)
    np.testing.assert_array_equal(reply["actions"], alone[0][0][0, :, :7])


def test_a_session_copies_nothing_implicitly(policy, ask):
    session = policy.session()
    session.infer(ask())
    session.infer(ask("a0"))
    before = len(compilations)
    with jax.transfer_guard("disallow"):
        pruned, keyframe = session.infer(ask("a1")), session.infer(ask("b"))
    assert not pruned["pruning"]["keyframe"] and keyframe["pruning"]["keyframe"]
    assert len(compilations) == before
