"""Plans with several cuts, merged tokens, reused keys and attention of every step, through the compiled programs.

The reference never gathers: every layer runs all slots, masks say who counts, and keys of reused tokens are put back
with `where`. Both get the same decisions, since the decisions themselves are tested in `test_peers.py`.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import at_night, by_day

from safe_pruner_jax.engine.engine import Engine, Inputs
from safe_pruner_jax.model import gemma, pi0
from safe_pruner_jax.model.config import GemmaConfig, Pi0Config, SiglipConfig
from safe_pruner_jax.model.params import draw_params, param_shapes
from safe_pruner_jax.pruners import PRUNERS, make
from safe_pruner_jax.pruners.base import NO_HISTORY

CONFIG = Pi0Config(
    True,
    prefix=GemmaConfig(16, 4, 32, 2, 1, 8),
    expert=GemmaConfig(8, 4, 16, 2, 1, 8),
    vision=SiglipConfig(12, 1, 16, 2),
    vocab_size=31,
    action_dim=8,
    action_horizon=4,
    max_token_len=8,
    image_size=56,
    dtype="float32",
)
N, T, STEPS = 2 * CONFIG.tokens_per_camera, 8, 5
CHOICES = {
    "vla_pruner": {"keep": 0.3, "cut": 2, "window": 2},
    "specprune": {"keep": 0.6, "executed": 2, "layers": (5,)},
    "vla_cache": {"keep": 0.5, "threshold": 0.9},
    "sparsevlm": {"keep": 0.4, "layers": (1, 3, 4)},
    "divprune": {"keep": 0.3},
}
BY_DAY = ("specprune", "vla_cache", "sparsevlm")
"""Several cuts, reused keys, merged tokens."""

compilations = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: compilations.append(event) if event.endswith("backend_compile_duration") else None
)


@pytest.fixture(scope="module")
def weights():
    params = jax.tree.map(lambda a: 2 * a, draw_params(CONFIG))  # attention that is not flat
    return jax.jit(partial(pi0.prepare, config=CONFIG, num_steps=2))(params)


@pytest.fixture(scope="module")
def engines(weights):
    made = {}

    def get(name):
        if name not in made:
            made[name] = Engine(weights, CONFIG, make(name, **CHOICES.get(name, {})))
        return made[name]

    return get


def frames(seed: int) -> np.ndarray:
    """[STEPS, 2, S, S, 3] of a static scene in which a square wanders."""
    rng = np.random.default_rng(seed)
    S = CONFIG.image_size
    out = np.broadcast_to(rng.integers(0, 256, (2, S, S, 3)), (STEPS, 2, S, S, 3)).astype(np.uint8)
    for t in range(STEPS):
        out[t, :, 14 * (t % 4) : 14 * (t % 4) + 14, :14] = rng.integers(0, 256, 3)
    return out


FRAMES = [frames(seed) for seed in range(3)]
MASKS = [(True, True), (True, True), (True, False)]
LENGTHS = [5, 8, 3]


def inputs(robots, t: int) -> Inputs:
    rng = np.random.default_rng(7)
    tokens = rng.integers(0, CONFIG.vocab_size, (3, T)).astype(np.int32)
    return jax.device_put(
        Inputs(
            images=np.stack([FRAMES[r][t] for r in robots]),
            camera_mask=np.array([MASKS[r] for r in robots]),
            tokens=tokens[list(robots)],
            token_mask=np.array([np.arange(T) < LENGTHS[r] for r in robots]),
            state=np.zeros((len(robots), CONFIG.action_dim), np.float32),
        )
    )


def play(engine, robots, seeds=None):
    control = engine.init(tuple(robots if seeds is None else seeds), 2)
    for t in range(STEPS):
        before = control
        actions, control, info = engine.step(control, inputs(robots, t))
        yield t, before, actions, control, info


def close(got, want, atol=1e-4):
    np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=0, atol=atol)


# The reference


@partial(jax.jit, static_argnums=0)
def masked_step(engine, weights, before, x, carry):
    """A pruned step on all slots: actions, late saliency, keys and values, and who ran after each cut."""
    plan, c = engine.plan, CONFIG.prefix
    mask, B = carry.rows.mask, carry.rows.mask.shape[0]
    h = pi0.embed_prefix(weights, CONFIG, x.images, x.camera_mask, x.tokens, x.token_mask).x
    rotation = gemma.rope(pi0.positions(mask), c.head_dim)
    running, text = mask[:, :N], mask[:, N:]
    state, selection = carry.control.pruner, carry.selection
    segments, ran, seen, logits = [], [], [], {}
    cuts = {cut.layer: i for i, cut in enumerate(plan.cuts)}
    for l in range(CONFIG.depth):
        if l in cuts:
            if cuts[l]:
                i = cuts[l] - 1
                found = evidence(plan.later[i].capture, carry, h, running, text, logits)
                state, selection = jax.vmap(lambda s, e, i=i: engine.pruner.later(s, e, i))(state, found)
            hot = jax.nn.one_hot(selection.index, N) * selection.alive[..., None]
            kept = hot.sum(1) > 0
            if selection.rows is not None:
                put = jnp.einsum("bkn,bkd->bnd", hot, selection.rows, precision="highest")
                h = jnp.concatenate([jnp.where(kept[..., None], put, h[:, :N]), h[:, N:]], axis=1)
            running = running & kept
            ran.append(running)
        rows = jnp.concatenate([running, text], axis=1)
        keys = mask if plan.dropped == "reuse" else rows
        place = None
        if plan.dropped == "reuse" and l >= plan.cut.layer:
            place = partial(put_back, before.kv[l - plan.cut.layer], rows)
        if l == CONFIG.depth - 1:
            k, v = gemma.keys_and_values(c, weights.prefix[l], h, rotation)
            k, v = place(k, v) if place else (k, v)
        else:
            own = rows[:, :, None] & keys[:, None, :]
            h, (k, v), logits[l] = gemma.layer(c, weights.prefix[l], h, rotation, own, place=place)
        segments.append(gemma.Segment(k, v, keys[:, None, :]))
        seen.append(keys[:, :N])
    actions, late = pi0.sample(
        weights,
        CONFIG,
        pi0.Prefix(tuple(segments), mask.sum(1, dtype=jnp.int32)),
        carry.state,
        carry.noise,
        visual_alive=mask[:, :N],
        columns={l: (jnp.broadcast_to(jnp.arange(N), (B, N)), m) for l, m in enumerate(seen)},
        late_layers=plan.late_layers,
    )
    return actions, late, segments, ran


def put_back(old, rows, k, v):
    """New keys and values where a row runs, old ones elsewhere."""
    text = jnp.zeros_like(k[:, N:])
    return tuple(
        jnp.where(rows[:, :, None, None], new, jnp.concatenate([o, text], axis=1))
        for new, o in zip((k, v), old, strict=True)
    )


def evidence(captures, carry, h, running, text, logits):
    out = []
    for c in captures:
        p = jax.nn.softmax(logits[c.layer], axis=-1).mean(1)
        if c.rows == "each":
            out.append(p[:, N:, :N] * text[:, :, None] * running[:, None, :])
        else:
            assert c.rows == "heads_to_text"
            heads = jax.nn.softmax(logits[c.layer], axis=-1)[:, :, :N, N:]
            mean = (heads * text[:, None, None, :]).sum(-1) / text.sum(1)[:, None, None]
            out.append(mean * running[:, None, :])
    hidden = jnp.where(running[:, :, None], h[:, :N], 0)
    return carry.evidence.replace(running=running, hidden=hidden, saliency=tuple(out))


@pytest.mark.parametrize("name", by_day(BY_DAY.__contains__, CHOICES))
def test_pruning_is_masking_at_every_cut(engines, name):
    """Kept tokens keep their positions, merged ones take their centre's, dropped ones leave or keep their old keys."""
    engine, pruned = engines(name), 0
    for t, before, actions, control, info in play(engine, (0, 2)):
        if info.keyframe.any():
            continue
        pruned += 1
        x = inputs((0, 2), t)
        carry = engine.shallow(engine.weights, before, x, None)
        want, late, segments, ran = masked_step(engine, engine.weights, before, x, carry)
        close(actions, want)
        sizes = [np.asarray(r).sum(1).tolist() for r in ran]
        assert all(
            a >= b for i in range(2) for a, b in zip([s[i] for s in sizes], [s[i] for s in sizes[1:]], strict=False)
        )
        assert len(ran) == len(engine.plan.cuts) and sizes[-1][0] < N
        np.testing.assert_array_equal(control.running, ran[-1])
        if engine.plan.late_from == "every":
            close(control.late, late, 1e-5)
        if engine.plan.dropped == "reuse":
            for (k, v), s in zip(control.kv, segments[engine.plan.cut.layer :], strict=True):
                alive = np.asarray(x.camera_mask).repeat(CONFIG.tokens_per_camera, 1)
                # the products of both programs have other shapes and add up in another order, step after step
                close(np.asarray(k)[alive], np.asarray(s.k[:, :N])[alive], 5e-4)
                close(np.asarray(v)[alive], np.asarray(s.v[:, :N])[alive], 5e-4)
    assert pruned >= 2


def test_reused_tokens_keep_the_keys_of_the_step_before(engines):
    engine = engines("vla_cache")
    seen = 0
    for _, before, _, control, info in play(engine, (0,)):
        if info.keyframe[0]:
            continue
        index, alive = (np.asarray(a[0]) for a in (info.selection.index, info.selection.alive))
        computed = np.isin(np.arange(N), index[alive])
        k, old = np.asarray(control.kv[0][0][0]), np.asarray(before.kv[0][0][0])
        np.testing.assert_array_equal(k[~computed], old[~computed])
        assert (k[computed] != old[computed]).any()
        seen += 1
    assert seen >= 2


def test_merged_tokens_are_means_of_what_was_dropped(engines):
    engine = engines("sparsevlm")
    for t, before, _, _, _ in play(engine, (0,)):
        carry = engine.shallow(engine.weights, before, inputs((0,), t), None)
        index = np.asarray(carry.selection.index[0])
        rows, held = np.asarray(carry.selection.rows[0]), np.asarray(carry.rows.x[0, :N])
        changed = np.abs(rows - held[index]).max(1) > 1e-6
        assert 0 < changed.sum() < len(index) / 2
        dropped = np.setdiff1d(np.arange(N), index[~changed])
        low, high = held[dropped].min(0) - 1e-5, held[dropped].max(0) + 1e-5
        assert ((rows[changed] >= low) & (rows[changed] <= high)).all()


# Laws of the whole step


@pytest.mark.parametrize("name", by_day(("vla_cache", "sparsevlm").__contains__, CHOICES))
def test_every_robot_of_a_batch_equals_the_robot_alone(engines, name):
    engine = engines(name)
    batch = list(play(engine, (0, 2)))
    for r in range(2):
        for together, alone in zip(batch, play(engine, ((0, 2)[r],)), strict=True):
            _, _, actions, control, info = together
            _, _, one, own, single = alone
            assert info.keyframe[r] == single.keyframe[0]
            close(actions[r], one[0])
            np.testing.assert_array_equal(info.selection.alive[r], single.selection.alive[0])
            if not single.keyframe[0]:
                alive = np.asarray(single.selection.alive[0])
                np.testing.assert_array_equal(info.selection.index[r][alive], single.selection.index[0][alive])
            close(control.actions[r], own.actions[0])
            jax.tree.map(lambda a, b: close(a[r], b[0], 1e-5), control.past, own.past)  # noqa: B023
    alive = [np.asarray(info.selection.alive) for *_, info in batch]
    assert alive[-1][0].sum() > alive[-1][1].sum()  # the budget is taken of the alive tokens


def test_a_step_may_be_run_in_full_whatever_the_pruner_decides(engines):
    """DivPrune makes no keyframe by itself."""
    engine, x = engines("divprune"), inputs((0,), 0)
    control = engine.init((0,), 2)
    pruned, _, info = engine.step(control, x)
    assert not info.keyframe.any()
    actions, _, info = engine.step(control, x, full=True)
    assert info.keyframe.all() and np.abs(actions - pruned).max() > 1e-4
    want, _ = engine.full(engine.weights, engine.shallow(engine.weights, control, x, None), None)
    np.testing.assert_array_equal(actions, want)


@pytest.mark.parametrize("name", by_day(BY_DAY.__contains__, CHOICES))
def test_the_second_episode_compiles_and_copies_nothing(engines, name):
    engine = engines(name)
    list(play(engine, (0,)))
    control, xs = engine.init((0,), 2), [inputs((0,), t) for t in range(STEPS)]
    before, kinds = len(compilations), set()
    with jax.transfer_guard("disallow"):
        for x in xs:
            actions, control, info = engine.step(control, x)
            kinds.add(bool(info.keyframe[0]))
        jax.block_until_ready(actions)
    assert len(compilations) == before and False in kinds


@pytest.mark.parametrize("pi05", [True, *at_night(False)])
@pytest.mark.parametrize("name", sorted(PRUNERS))
def test_what_is_carried_keeps_its_shapes(name, pi05):
    """In bfloat16, for both models, with every factory's defaults; shapes only."""
    config = dataclasses.replace(CONFIG, pi05=pi05, dtype="bfloat16")
    weights = jax.eval_shape(partial(pi0.prepare, config=config, num_steps=2), param_shapes(config))
    engine = Engine(weights, config, make(name))
    control = engine.init((0,), 2)
    shapes = lambda c: jax.tree.map(lambda a: (a.shape, str(a.dtype)), c)
    x = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), inputs((0,), 0))
    carry = jax.eval_shape(engine.shallow, weights, control, x, None)
    for program in (engine.full, *([engine.pruned] if engine.plan.cut else [])):
        _, after = jax.eval_shape(program, weights, carry, None)
        assert shapes(after) == shapes(control)


def test_a_step_remembers_what_the_plan_asks_for(engines):
    """Attention of prefix layers and actions, after full and pruned steps; a reset forgets them."""
    engine = engines("vla_cache")
    assert [c.rows for c in engine.plan.remember] == ["text"] + ["entropy"] * (CONFIG.depth - 1)
    previous = None
    for _, before, actions, control, _ in play(engine, (0,)):
        if previous is not None:
            np.testing.assert_array_equal(before.actions, previous)
        previous = actions
        text, *entropy = control.past
        assert text.shape == (1, N) and all(0 < float(e[0]) < np.log(N + T) for e in entropy)
    fresh = engine.init((0,), 2)
    assert int(fresh.since_full[0]) == NO_HISTORY
    stale = fresh.replace(past=control.past, actions=control.actions, kv=control.kv)
    a, _, _ = engine.step(fresh, inputs((0,), 0))
    b, _, info = engine.step(stale, inputs((0,), 0))
    np.testing.assert_array_equal(a, b)
    assert info.keyframe[0]


def test_late_saliency_of_dropped_tokens_is_zero(engines):
    engine = engines("vla_pruner")
    assert engine.plan.late_layers == (2, 3)
    for _, _, _, control, info in play(engine, (0,)):
        late = np.asarray(control.late[0])
        close(late.sum(1), np.ones(2))
        if not info.keyframe[0]:
            kept = np.asarray(info.selection.index[0])
            dropped = np.setdiff1d(np.arange(N), kept)
            assert (late[:, dropped] == 0).all() and (late[:, kept] > 0).all()


def test_saliency_of_rows_is_saliency_of_slots(engines):
    """`remember` on the full path against the logits themselves."""
    engine = engines("specprune")
    control = engine.init((2,), 2)
    x = inputs((2,), 0)
    _, after, _ = engine.step(control, x)
    rows = pi0.embed_prefix(engine.weights, CONFIG, x.images, x.camera_mask, x.tokens, x.token_mask)
    layers = [c.layer for c in engine.plan.remember]
    run = jax.jit(lambda rows: pi0.prefix_layers(engine.weights, CONFIG, rows, range(4), (0, 1, 2))[2])
    logits = run(rows)
    assert layers == [2, CONFIG.depth - 2, 0, 1, 2]
    alive = np.arange(N) < CONFIG.tokens_per_camera  # the second camera is masked
    for layer, got in zip(layers[:2], after.past[:2], strict=True):
        p = np.asarray(jax.nn.softmax(logits[layer][0], axis=-1)).mean(0)
        close(got[0], p[:N, N : N + LENGTHS[2]].mean(1) * alive, 3e-6)  # shares up to 0.2 in float32
    for layer, got in zip(layers[2:], after.past[2:], strict=True):
        p = np.asarray(jax.nn.softmax(logits[layer][0], axis=-1), np.float64).mean(0)[N : N + LENGTHS[2], :N][:, alive]
        close(got[0], -(p * np.log(p)).sum(1).mean(), 1e-4)


@pytest.mark.nightly
def test_late_saliency_over_all_keys_is_the_models_own(weights):
    """Eq. 1 renormalises over visual keys; over all keys a layer that hardly looks at images has little of it."""
    sums = {}
    for over in ("visual", "all"):
        engine = Engine(weights, CONFIG, make("safe", cut=2, keep=0.3, over=over, queries="text"))
        _, control, _ = engine.step(engine.init((0,), 2), inputs((0,), 0))
        sums[over] = np.asarray(control.late[0])
    close(sums["visual"].sum(1), np.ones(3))
    mass = sums["all"].sum(1)
    assert (mass < 0.99).all() and mass.std() > 1e-3
    assert sums["all"][0, 0] != sums["visual"][0, 0] * mass[0]  # the mean of shares is not the share of means
