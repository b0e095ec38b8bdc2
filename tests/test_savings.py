"""What programs do for fewer launches computes what they computed without it, alone and together."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import observation, prepare, random_tree, small
from tiers import by_day
from tiny_engine import close, same

from safe_pruner_jax.engine import xla
from safe_pruner_jax.engine.engine import Engine
from safe_pruner_jax.engine.state import Inputs
from safe_pruner_jax.model import gemma, pi0, room
from safe_pruner_jax.model.config import SAVINGS
from safe_pruner_jax.pruners import PRUNERS

ALONE = [(name,) for name in SAVINGS]


def chunk(config, params, keep=None):
    """Actions, late saliency, and visual tokens of two robots; with `keep` the later layers see fewer tokens."""
    weights = prepare(params, config)
    images, camera_mask, tokens, token_mask, state, noise = observation(config)
    rows = pi0.embed_prefix(weights, config, images, camera_mask, tokens, token_mask)
    visual = rows.mask[:, : len(config.cameras) * config.tokens_per_camera]
    _, segments, _ = pi0.prefix_layers(weights, config, rows, range(config.depth))
    if keep is not None:
        fewer = [gemma.Segment(s.k[:, :keep], s.v[:, :keep], s.mask[..., :keep]) for s in segments[1:]]
        segments = (segments[0], *fewer)
    prefix = pi0.Prefix(segments, rows.count)
    late = {"visual_alive": visual, "late_layers": (0,)} if keep is None else {}
    actions, maps = jax.jit(lambda w, p: pi0.sample(w, config, p, jnp.asarray(state), jnp.asarray(noise), **late))(
        weights, prefix
    )
    return actions, maps, rows.x


@functools.cache
def plain(pi05: bool, keep: int | None):
    """What is computed without any of them."""
    config = small(pi05)
    return chunk(config, random_tree(config), keep)


CASES = [*itertools.product(ALONE, (True, False)), (SAVINGS, True), (SAVINGS, False)]


@pytest.mark.parametrize(
    ("savings", "pi05"),
    by_day(lambda case: case[1] or case[0] == SAVINGS, CASES),
    ids=lambda value: "+".join(value) if isinstance(value, tuple) else None,
)
def test_a_chunk_is_the_same(savings, pi05):
    config = small(pi05)
    params = random_tree(config)
    if not pi05 and "stacked" in savings:
        savings = tuple(name for name in savings if name != "stacked") or ("room",)  # π0 has no adaptive norms
    for keep in (None, 7):
        want = plain(pi05, keep)
        got = chunk(config.replace(savings=savings), params, keep)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert a.shape == b.shape
            close(a, b, 2e-5)


def test_a_room_holds_the_prefix_and_the_chunks_own_and_nothing_else():
    draw = lambda *shape: jnp.asarray(np.random.default_rng(len(shape)).standard_normal(shape), jnp.float32)
    segment = gemma.Segment(
        draw(2, 5, 1, 4), draw(2, 5, 1, 4), jnp.arange(5)[None, None] < jnp.array([5, 3])[:, None, None]
    )
    own = np.tril(np.ones((1, 3, 3), bool))
    place = room.make(segment, jnp.asarray(own))
    assert place.mask.shape == (2, 3, room.KEYS) and place.kv.shape == (2, 2, room.KEYS, 1, 4)
    k, v, filled = place.put(draw(2, 3, 1, 4), 2 * draw(2, 3, 1, 4))
    np.testing.assert_array_equal(
        k, np.concatenate([segment.k, draw(2, 3, 1, 4), np.zeros((2, room.KEYS - 8, 1, 4))], 1)
    )
    np.testing.assert_array_equal(v[:, 5:8], 2 * draw(2, 3, 1, 4))
    np.testing.assert_array_equal(place.mask[1, :, :5].any(0), [True, True, True, False, False])
    np.testing.assert_array_equal(place.mask[:, :, 5:8], np.repeat(own, 2, 0))
    assert not place.mask[:, :, 8:].any()
    again = filled.put(draw(2, 3, 1, 4), draw(2, 3, 1, 4))[1]
    np.testing.assert_array_equal(again[:, :5], segment.v)  # the next step finds the prefix where it was


def test_steps_of_an_engine_are_the_same():
    """A keyframe and pruned steps, to the last bit: with a top-K that counts, and no copies of what is handed on."""
    config, pruner = small(), PRUNERS["safe"](keep=0.5, cut=1, every=3)
    weights = prepare(random_tree(config), config)
    engines = [Engine(weights, config.replace(savings=names), pruner) for names in ((), ("counting", "arguments"))]
    controls, keyframes = [engine.init((7, 8), len(config.cameras)) for engine in engines], []
    for seed in range(3):
        *seen, state, _ = map(jnp.asarray, observation(config, seed=seed))
        out = []
        for i, engine in enumerate(engines):
            actions, controls[i], info = engine.step(controls[i], Inputs(*seen, state))
            out.append((actions, controls[i], info.selection))
        same(*out)
        keyframes.append(info.keyframe.all())
    assert keyframes == [True, False, False]


def test_a_machine_without_launches_saves_none(monkeypatch):
    monkeypatch.delenv("SAFE_PRUNER_XLA", raising=False)
    assert xla.savings("cpu") == () and xla.savings("gpu") == SAVINGS
    monkeypatch.setenv("SAFE_PRUNER_XLA", "default")
    assert xla.savings("gpu") == ()
    with pytest.raises(ValueError, match=r"savings: expected some of stacked, room, .*, graph, got speed"):
        small(savings=("speed",))


def test_savings_are_different_programs():
    """Otherwise the tests above would compare a program with itself."""
    config = small()
    params = random_tree(config)
    graph = ("stacked", "graph")
    weights = {names: prepare(params, config.replace(savings=names)) for names in [(), *ALONE, graph]}
    shapes = {names: [a.shape for a in jax.tree.leaves(w)] for names, w in weights.items()}
    assert shapes["stacked",] != shapes[()] and shapes["vision",] != shapes[()]

    def text(names):
        own = config.replace(savings=names)
        images, camera_mask, tokens, token_mask, state, noise = observation(own)
        rows = pi0.embed_prefix(weights[names], own, images, camera_mask, tokens, token_mask)
        _, segments, _ = pi0.prefix_layers(weights[names], own, rows, range(own.depth))
        run = lambda w, p: pi0.sample(w, own, p, jnp.asarray(state), jnp.asarray(noise))
        return jax.jit(run).lower(weights[names], pi0.Prefix(segments, rows.count)).as_text()

    loops = [text(names) for names in [(), ("room",), ("rotation",), ("stacked",), graph]]
    assert all(a != b for a, b in itertools.combinations(loops, 2))
