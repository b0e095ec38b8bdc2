"""DivPrune, VLA-Pruner and SparseVLM against their formulas, written slowly: loops in float64, one robot."""

import importlib

import jax
import numpy as np
import pytest
import synthetic
from oracles.peers import slow_cluster, slow_max_min, slow_raters
from oracles.selection import slow_top_k
from synthetic import at, case, episode, kept, make, play

from safe_pruner_jax.pruners import Capture, Cut, Plan
from safe_pruner_jax.pruners.diversity import max_min
from safe_pruner_jax.tokens import budget

sparsevlm_module = importlib.import_module("safe_pruner_jax.pruners.sparsevlm")  # the package's name is the factory


# Diversity


@pytest.mark.parametrize("neighbour", [1, 2])
def test_max_min_is_the_greedy_algorithm(neighbour):
    rng = np.random.default_rng(neighbour)
    z = rng.normal(size=(20, 6)).astype(np.float32)
    candidate = rng.uniform(size=20) < 0.7
    pool = np.flatnonzero(candidate).tolist()
    for k in (1, 5, len(pool), 20):
        score = np.asarray(max_min(z, candidate, k, neighbour=neighbour))
        picks = slow_max_min(z, pool, k, neighbour)
        want = np.zeros(20)
        want[picks] = k - np.arange(len(picks))
        np.testing.assert_array_equal(score, want)
    assert not np.asarray(max_min(z, np.zeros(20, bool), 5)).any()


def test_divprune_prefers_what_differs():
    """Ten copies of one token and three others: the copies get one place."""
    c = case("divprune", keep=4)
    seen = at(episode(0, c.pruner, steps=1, n=13), 0)
    z = np.tile(np.eye(synthetic.D)[0], (13, 1)).astype(np.float32)
    z[[2, 5, 11]] = np.eye(synthetic.D)[1:4]
    selection = c.pruner.step((), seen.replace(visual=z))[1]
    assert {2, 5, 11} < kept(selection) and not selection.keyframe
    assert c.pruner.plan == Plan(Cut(0, 4), compares=(("visual", "visual"),))


def test_divprune_is_the_greedy_algorithm_over_alive_tokens():
    c = case("divprune", keep=0.4)
    for seed in range(4):
        e = at(episode(20 + seed, c.pruner, steps=1, dead=3 * seed), 0)
        alive = np.flatnonzero(e.alive).tolist()
        selection = c.pruner.step((), e)[1]
        score = np.asarray(selection.score)
        k = budget(0.4, len(alive))
        got = sorted(np.flatnonzero(score), key=lambda v: -score[v])[:k]
        assert kept(selection) == set(got)
        assert got == slow_max_min(e.visual, alive, k, 1)


# VLA-Pruner


@pytest.mark.parametrize("variant", ["as_described", "as_released"])
def test_vla_pruner_is_algorithm_2(variant):
    c = case("vla_pruner", variant=variant, keep=0.3, decay=0.6)
    alone = {"semantic": 0, "action": 0}
    for seed in range(3):
        seen = episode(30 + seed, c.pruner, dead=2 * seed, steps=8, noise=0.4, shifts=(2, 3, 4, 5, 6, 7))
        carries, selections = play(c, seen)
        for t, selection in enumerate(selections):
            assert selection.keyframe == (t < 3), t
            if t < 3:
                continue
            living = np.flatnonzero(seen.alive[t]).tolist()
            past = [carries[t - i][3].astype(np.float64).mean(0) for i in (1, 2, 3)]  # what step t - i left behind
            weight = [0.6, 0.36, 0.216] if variant == "as_described" else [0.36, 0.6, 1.0]
            action = sum(w * s for w, s in zip(weight, past, strict=True))
            k = budget(0.3, len(living))
            best = [set(slow_top_k(s, seen.alive[t], 0.3)) for s in (seen.saliency[0][t], action)]
            pool = sorted(best[0] | best[1])
            want = slow_max_min(seen.visual[t], pool, k, 2 if variant == "as_described" else 1)
            assert kept(selection) == set(want), (seed, t)
            alone["semantic"] += kept(selection) != best[0]
            alone["action"] += kept(selection) != best[1]
    assert min(alone.values()) > 5  # neither of the two levels alone would do


def test_vla_pruner_looks_at_every_step_and_at_all_rows():
    plan = make(case("vla_pruner")).plan
    assert plan.capture == (Capture(2, "all", over="all"),) and plan.late_from == "every"
    assert plan.for_depth(18).late_layers == tuple(range(9, 18))


# SparseVLM


def test_cluster_is_density_peaks():
    rng = np.random.default_rng(3)
    for count in (1, 2, 4):
        x = rng.normal(size=(14, 5)).astype(np.float32)
        valid = np.arange(14) < 11
        x[~valid] = 0
        centre, mean = map(np.asarray, sparsevlm_module.cluster(x, valid, count))
        want = slow_cluster(x[valid].astype(np.float64), count)
        assert set(np.flatnonzero(centre)) == set(want)
        for c, row in want.items():
            np.testing.assert_allclose(mean[c], row, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_sparsevlm_rates_and_recycles(version):
    c = case("sparsevlm", version=version, keep=0.4)
    p, merged, filtered = c.pruner, 0, 0
    step, later = jax.jit(p.step), jax.jit(p.later, static_argnums=2)
    shares = [cut.keep for cut in p.plan.cuts]
    for seed in range(4):
        e = at(episode(50 + seed, p, steps=1, dead=2 * seed), 0)
        chosen = slow_raters(e.visual, e.text, e.alive, e.text_alive)
        filtered += len(chosen) < e.text_alive.sum()
        running = np.flatnonzero(e.alive)
        for stage in range(3):
            selection = step((), e)[1] if stage == 0 else later((), e, stage - 1)[1]
            score = np.mean([e.saliency[0][j].astype(np.float64) for j in chosen], axis=0)
            order = sorted(running, key=lambda v: (-score[v], v))
            total = budget(shares[stage], int(e.alive.sum()))
            stay, candidates, new = sparsevlm_module.split(len(order), total) if version == "v1" else (total, 0, 0)
            want = {v: e.hidden[v] for v in order[:stay]}
            if new:
                pool = order[stay : stay + candidates]
                clusters = slow_cluster(e.hidden[pool].astype(np.float64), new)
                want |= {pool[i]: row for i, row in clusters.items()}
                merged += new
            assert kept(selection) == set(want), (seed, stage)
            if version == "v1":
                for slot, row in zip(selection.index, np.asarray(selection.rows), strict=True):
                    if int(slot) in want:
                        np.testing.assert_allclose(row, want[int(slot)], rtol=1e-4, atol=1e-5)
            else:
                assert selection.rows is None
            running = np.array(sorted(want))
            e = e.replace(running=np.isin(np.arange(synthetic.N), running))
    assert filtered and (merged > 0) == (version == "v1")


def test_sparsevlm_fills_its_budget_with_kept_and_merged_tokens():
    split = sparsevlm_module.split
    assert split(512, 160) == (149, 109, 11) and split(100, 100) == (100, 0, 0)
    for entering in range(2, 200, 7):
        for staying in range(1, entering, 5):
            kept_, candidates, new = split(entering, staying)
            if not new:  # so few that keeping none would still merge too many: nothing is recycled
                assert (int(0.3 * entering) + 1) // 10 + 1 > staying == kept_
                continue
            assert kept_ + new == staying and new >= candidates // 10 + 1
            assert candidates == int(0.3 * (entering - kept_)) + 1 <= entering - kept_


def test_sparsevlm_cuts_behind_the_layers_it_looks_at():
    plan = make(case("sparsevlm")).plan
    assert [c.layer for c in plan.for_depth(32).cuts] == [3, 7, 16]
    assert [c.layer for c in plan.for_depth(18).cuts] == [2, 4, 9]
    assert [c.layer for c in plan.for_depth(8).cuts] == [2, 4]  # π0.5's layers, as far as there are any
    assert [l.capture[0].layer for l in plan.for_depth(18).later] == [3, 8]
    np.testing.assert_allclose([c.keep for c in plan.cuts], [0.2 * 300 / 192, 0.2 * 200 / 192, 0.2 * 110 / 192])
