"""SpecPrune-VLA and VLA-Cache, which remember frames, against their formulas: loops in float64, one robot."""

import importlib

import numpy as np
import pytest
import synthetic
from oracles.peers import slow_controller, slow_cosine, slow_rank, slow_shares, slow_updated
from oracles.selection import slow_top_k
from synthetic import at, case, episode, kept, play, put

from safe_pruner_jax.pruners import frames
from safe_pruner_jax.tokens import budget

# the names of the package are the factories
specprune_module, vla_cache_module = (
    importlib.import_module(f"safe_pruner_jax.pruners.{name}") for name in ("specprune", "vla_cache")
)


# SpecPrune


def test_the_controller_enters_downwards_and_leaves_fast():
    slow, fast = [0.1, 0.1, -0.1, 0, 0, 0.1, 1], [0.6, 0, 0, 0, 0, 0, 1]
    lift, turn = [0.1, 0, 0.3, 0, 0, 0, 1], [0.1, 0, -0.1, 0.3, 0, 0, 1]
    fine, modes = False, []
    for action in (lift, slow, lift, turn, lift, slow, fast, lift):
        _, fine = specprune_module.controller(np.array([action], np.float32), fine, 0.5, 0.2, (0, 1, 2), (3, 4, 5))
        modes.append(bool(fine))
    assert modes == [False, True, True, False, False, True, False, False]


@pytest.mark.parametrize("variant", ["as_described", "as_released"])
def test_specprune_keeps_the_union_of_its_sets(variant):
    c = case("specprune", variant=variant, keep=0.8, alpha=1.5, executed=1)
    tau, slow = (0.95, 0.5) if variant == "as_described" else (0.986, 0.4)
    used, modes, counts = {"global": 0, "dynamic": 0, "local": 0}, set(), set()
    for seed in range(3):
        seen = episode(70 + seed, c.pruner, dead=2 * seed, shifts=(3, 6))
        seen = seen.replace(actions=0.25 * seen.actions)
        fine = False
        carries, selections = play(c, seen)
        for t, (carry, selection) in enumerate(zip(carries, selections, strict=True)):
            assert selection.keyframe == (t == 0)
            if t == 0:
                continue
            alive, camera = seen.alive[t], seen.camera[t]
            living = np.flatnonzero(alive).tolist()
            action = seen.actions[t - 1][0].astype(np.float64)
            if slow == 0.4 and np.linalg.norm(action[:3]) > 0.4:
                fine, v = False, np.linalg.norm(action[:3])
            else:
                v, fine = slow_controller(action, fine)
            modes.add(bool(fine))
            back = min(int(np.floor(7 - v)) + 4, t)
            similarity = slow_cosine(seen.patches[t], seen.patches[t - back])
            size = lambda base: lambda c: round(1.5 / 256 * base * sum(alive & (camera == c)))  # noqa: B023
            local = (40 if fine else 24) if variant == "as_described" else (70 if fine else 54)
            first, second = (seen.saliency[i][t].astype(np.float64) for i in (0, 1))
            sets = {
                "dynamic": slow_rank(
                    -similarity, [v for v in living if similarity[v] < tau], camera, size(10 if fine else 20)
                ),
                "local": slow_rank(first, living, camera, size(local)) | slow_rank(second, living, camera, size(local)),
                "global": set(),
            }
            if variant == "as_described":
                past = sum(p[t - 1].astype(np.float64) for p in seen.past[:2]) / 2
                sets["global"] = slow_rank(past, living, camera, size(30))
            union = set().union(*sets.values())
            score = np.array([(v in union) + (first[v] + second[v]) / 2 for v in range(synthetic.N)])
            np.testing.assert_allclose(selection.score, score, rtol=1e-5, atol=1e-6)
            most = budget(0.8, len(living))
            assert kept(selection) == (union if len(union) <= most else set(slow_top_k(score, alive, 0.8)))
            counts.add(len(kept(selection)))
            for name, tokens in sets.items():
                others = set().union(*(s for other, s in sets.items() if other != name))
                used[name] += bool(tokens - others)
            importance = np.zeros(synthetic.N)
            for l in range(2 if variant == "as_released" else 0):
                # the entropy of the first step, whatever that of this one
                entropy = seen.past[l][0]
                importance = slow_updated(importance, seen.saliency[l][t][None], entropy, alive)
            np.testing.assert_allclose(carry[0].importance, importance, rtol=1e-4, atol=1e-7)
    assert len(counts) > 2  # the union decides how many
    assert used["dynamic"] and used["local"] and (used["global"] > 0) == (variant == "as_described")
    assert modes == {True, False}


def test_specprune_keeps_more_in_fine_work():
    c = case("specprune", keep=0.9, executed=1)
    seen = episode(5, c.pruner, steps=2)
    counts = []
    for action in ([0.1, 0.1, -0.1, 0, 0, 0.1, 1], [0.9, 0.9, 0.1, 0, 0, 0, 1]):
        actions = np.broadcast_to(np.array(action, np.float32), seen.actions.shape)
        selection = play(c, seen.replace(actions=actions))[1][1]
        counts.append(len(kept(selection)))
        assert len(selection.index) == budget(0.9, synthetic.N)
    assert counts[1] < counts[0] < synthetic.N


def test_specprune_drops_the_least_important_of_those_left():
    """From the layers behind the first cut on (Section 5.1), by ranks of every head and the first step's entropy."""
    c = case("specprune", keep=0.5)
    p = c.pruner
    plan = p.plan.for_depth(18)
    assert [cut.layer for cut in plan.cuts] == [2, 6, 8, 11, 14]
    assert [x.layer for x in plan.later[0].capture] == [2, 3, 4, 5]
    assert {x.rows for x in plan.later[0].capture} == {"heads_to_text"}
    assert [x.layer for x in plan.remember] == [8, 16, *range(17)]
    np.testing.assert_allclose([cut.keep for cut in plan.cuts], 0.5 * 0.9 ** np.arange(5))
    seen = episode(3, p, steps=3, shifts=(), noise=0.01, depth=18)
    state, e = play(c, seen)[0][2][0], at(seen, 2)
    assert not np.asarray(state.importance).any()
    rng, running = np.random.default_rng(0), np.arange(synthetic.N) % 2 == 0
    heads = [rng.random((2, synthetic.N)).astype(np.float32) * running for _ in range(4)]
    after, selection = p.later(state, e.replace(running=running, saliency=tuple(heads)), 0)
    importance = np.zeros(synthetic.N)
    for layer, a in zip((2, 3, 4, 5), heads, strict=True):
        importance = slow_updated(importance, a, seen.past[2 + layer][0], running)
    np.testing.assert_allclose(after.importance, importance, rtol=1e-4)
    assert kept(selection) == set(sorted(np.flatnonzero(running), key=lambda v: -importance[v])[:11])  # 0.9 · 12
    mean = np.zeros(synthetic.N)
    for layer, a in zip((2, 3, 4, 5), heads, strict=True):
        mean = slow_updated(mean, a.mean(0)[None], seen.past[2 + layer][0], running)
    assert not np.allclose(after.importance, mean, rtol=1e-2)  # ranks of the head mean are others


def test_specprune_as_released_asks_the_prompt_and_updates_in_three_layers():
    plan = case("specprune", variant="as_released").pruner.plan.for_depth(18)
    assert [c.rows for c in plan.capture] == ["text", "text"]
    assert [cut.layer for cut in plan.cuts] == [2, 3, 6, 8, 11, 14]
    assert [[c.layer for c in cut.capture] for cut in plan.later] == [[], [], [7], [], []]
    np.testing.assert_allclose([cut.keep for cut in plan.cuts], 0.3 * 0.8 ** np.arange(6))


# VLA-Cache


def test_reuse_grows_slowly_with_confidence():
    entropy = np.random.default_rng(0).uniform(1, 3, 9).astype(np.float32)
    got = np.asarray(vla_cache_module.reuse_shares(entropy, 0.55))
    np.testing.assert_allclose(got, slow_shares(entropy.astype(np.float64)), rtol=1e-4, atol=1e-6)
    assert not np.allclose(got, slow_shares(entropy, growth=1.0))
    flat = np.asarray(vla_cache_module.reuse_shares(np.full(4, 2.0, np.float32), 0.55))
    assert np.isfinite(flat).all()


@pytest.mark.parametrize("variant", ["as_described", "as_released"])
def test_vla_cache_reuses_static_tokens_that_do_not_matter(variant):
    c = case("vla_cache", variant=variant, keep=0.6)
    p, K = c.pruner, budget(0.6, synthetic.N)
    layers = [cut.layer for cut in p.plan.for_depth(synthetic.DEPTH).cuts]
    more = 0
    for seed in range(3):
        seen = episode(90 + seed, p, shifts=(4,))
        carries, selections = play(c, seen)
        for t in range(1, synthetic.STEPS):
            similarity = slow_cosine(seen.patches[t], seen.patches[t - 1])
            attention = seen.past[0][t - 1].astype(np.float64)
            camera, everybody = seen.camera[t], range(synthetic.N)
            calm = similarity.round(6) - (1e-9 * attention if variant == "as_described" else 0)
            static = slow_rank(
                calm, [v for v in everybody if similarity[v] >= 0.996], camera, lambda c: round(0.7 * 12)
            )
            relevant = slow_rank(attention, everybody, camera, lambda c: round(0.3 * 12))
            reusable = static - relevant
            assert selections[t].keyframe == (len(reusable) < synthetic.N - K)
            order = sorted(reusable) if variant == "as_released" else sorted(reusable, key=(-calm).__getitem__)
            share = slow_shares([float(h[t - 1]) for h in seen.past[1:]])
            running, gone = np.ones(synthetic.N, bool), 0
            for i, layer in enumerate(layers):
                missing = synthetic.N - budget(1 - (i + 1) / 4 * 0.4, synthetic.N)
                count = min(max(int(share[min(layer, synthetic.DEPTH - 2)] * len(reusable)), missing), synthetic.N - K)
                more += count > missing
                count = gone = max(count, gone)  # a row that is not computed does not come back
                state = carries[t][0]
                e = at(seen, t).replace(running=running)
                selection = selections[t] if i == 0 else p.later(state, e, i - 1)[1]
                if not selections[t].keyframe:
                    assert set(range(synthetic.N)) - kept(selection) == set(order[:count]), (seed, t, i)
                running = np.isin(np.arange(synthetic.N), list(kept(selection)))
    assert more  # entropy asked for more than the rows at some cut


def test_vla_cache_runs_everything_when_the_scene_moves():
    c = case("vla_cache", keep=0.5)
    seen = episode(1, c.pruner, shifts=())
    quiet = play(c, seen)[1]
    assert [bool(s.keyframe) for s in quiet] == [True] + [False] * (synthetic.STEPS - 1)
    rng = np.random.default_rng(0)
    moved = put(seen.patches, 4, rng.integers(0, 256, seen.patches[4].shape))
    keyframes = [bool(s.keyframe) for s in play(c, seen.replace(patches=moved))[1]]
    assert keyframes == [True, False, False, False, True, True, False, False, False]


# Frames


def test_patch_similarity_and_ranks():
    rng = np.random.default_rng(5)
    a, b = rng.integers(0, 256, (2, 9, 12)).astype(np.uint8)
    a[0] = b[0] = 0
    a[1], b[2] = 0, 0
    got = np.asarray(frames.patch_similarity(a, b))
    assert got[:3].tolist() == [1, 0, 0]
    np.testing.assert_allclose(got[3:], slow_cosine(a[3:], b[3:]), rtol=1e-5)
    score = np.array([1, 3, 3, 2, 5, 9], np.float32)
    candidate, camera = np.array([1, 1, 1, 0, 1, 1], bool), np.array([0, 0, 0, 0, 1, 1])
    assert np.asarray(frames.rank_in_camera(score, candidate, camera)).tolist() == [2, 0, 1, 6, 1, 0]
    assert np.asarray(frames.camera_count(candidate, camera)).tolist() == [3, 3, 3, 3, 2, 2]
