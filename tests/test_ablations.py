"""Ablations of the published methods against their formulas, and that each differs from the method itself."""

import laws
import numpy as np
import pytest
import synthetic
from oracles.peers import slow_updated
from oracles.selection import slow_top_k
from synthetic import Case, at, episode, kept, play

from safe_pruner_jax import pruners
from safe_pruner_jax.analysis import overlap
from safe_pruner_jax.pruners.ablations import ABLATIONS
from safe_pruner_jax.tokens import budget

pytestmark = pytest.mark.newest


@pytest.fixture
def ablated(monkeypatch):
    """A case of an ablation, as if it stood in the table."""

    def make(name, **choices):
        monkeypatch.setitem(pruners.PRUNERS, name, ABLATIONS[name])
        return Case(name, tuple(choices.items()))

    return make


def test_ablations_are_known_by_name_and_not_listed():
    assert len(ABLATIONS) == 11 and not set(ABLATIONS) & set(pruners.names())
    for name in ABLATIONS:
        made, method = pruners.make(name, keep=0.3), name.split("/")[0]
        assert made.name == name and made.plan.cut.layer == pruners.make(method).plan.cut.layer
    with pytest.raises(TypeError, match="vla_pruner/ema: got an unexpected choice 'alpha'"):
        pruners.make("vla_pruner/ema", alpha=0.3)
    with pytest.raises(ValueError, match="window: expected"):
        pruners.make("vla_pruner/ema", window=0)


def slow_relevance(kind, semantic, past, alive):
    """Section 5.4; `past` is S_act of all earlier steps, the oldest first."""
    window = sum(0.8**i * past[-i] for i in (1, 2, 3))
    share = lambda s: s / s[alive].sum()
    fused = 0.5 * share(semantic) + 0.5 * share(window)
    return {"prefill": semantic, "action": window, "fusion": fused}[kind]


@pytest.mark.parametrize("kind", ["prefill", "action", "fusion"])
def test_vla_pruner_of_one_level_or_of_a_fused_score(ablated, kind):
    c, differs = ablated(f"vla_pruner/{kind}", keep=0.3), 0
    seen = episode(30, c.pruner, dead=2, steps=7, noise=0.4, shifts=(3, 5))
    carries, selections = play(c, seen)
    whole = play(Case("vla_pruner", (("keep", 0.3),)), seen)[1]
    for t in range(3, 7):
        past = [carries[i][3].astype(np.float64).mean(0) for i in range(t)]
        score = slow_relevance(kind, seen.saliency[0][t].astype(np.float64), past, seen.alive[t])
        assert kept(selections[t]) == set(slow_top_k(score, seen.alive[t], 0.3)), t
        differs += kept(selections[t]) != kept(whole[t])
    assert differs  # the combination of both, filtered for diversity, keeps others


def test_the_moving_average_is_equation_6(ablated):
    c = ablated("vla_pruner/ema")
    seen = episode(31, c.pruner, steps=6, noise=0.4, shifts=(2, 4))
    carries, selections = play(c, seen)
    for t in range(1, 6):
        smoothed = carries[0][3].astype(np.float64).mean(0)
        for i in range(1, t):
            smoothed = 0.5 * smoothed + 0.5 * carries[i][3].astype(np.float64).mean(0)
        np.testing.assert_allclose(carries[t][0].inner.action[0], smoothed, rtol=1e-5)
    assert [bool(s.keyframe) for s in selections] == [True] * 3 + [False] * 3  # the warm start stays


def test_specprune_without_later_cuts_or_without_sets():
    static, dynamic = (pruners.make(f"specprune/{kind}", keep=0.4).plan for kind in ("static", "dynamic"))
    assert static.later == () and static.cut.keep == 0.4
    assert dynamic.cut.keep == 1.0 and [c.keep for c in dynamic.later] == pytest.approx(0.9 ** np.arange(1, 5))
    c = Case("specprune", (("keep", 0.4),))
    p = pruners.make("specprune/dynamic", keep=0.4)
    seen = episode(2, p, steps=2, shifts=())
    state, e = p.init(at(seen, 0)), at(seen, 1).replace(since_full=np.int32(1))
    assert len(kept(p.step(state, e)[1])) == synthetic.N
    assert len(kept(c.pruner.step(c.pruner.init(at(seen, 0)), e)[1])) <= budget(0.4, synthetic.N)


@pytest.mark.parametrize("kind", ["static-dynamic", "no-reuse"])
def test_specprune_without_controller_or_global_set(kind):
    """Slow and downwards, where the method itself keeps more tokens than in coarse work."""
    choices = {"keep": 0.9, "alpha": 1.5, "executed": 1}
    whole, part = pruners.make("specprune", **choices), pruners.make(f"specprune/{kind}", **choices)
    seen = episode(4, whole, steps=2, shifts=())
    action = np.broadcast_to(np.array([0.1, 0.1, -0.1, 0, 0, 0.1, 1], np.float32), seen.actions[0].shape)
    e = at(seen, 1).replace(since_full=np.int32(1), actions=action)
    own = e.replace(past=e.past[2:]) if kind == "no-reuse" else e
    selections = [p.step(p.init(x), x)[1] for p, x in ((whole, e), (part, own))]
    size = lambda base: round(1.5 / 256 * base * 12)
    rank = lambda s, count: {
        v for c in (0, 1) for v in sorted(np.flatnonzero(e.camera == c), key=lambda v: -s[v])[:count]
    }
    local = size(24) if kind == "static-dynamic" else size(70)
    want = rank(e.saliency[0], local) | rank(e.saliency[1], local)
    if kind == "static-dynamic":
        want |= rank(e.past[0] + e.past[1], size(30))
    assert kept(selections[1]) == want and kept(selections[0]) != want


def test_specprune_weighs_layers_by_their_entropy_and_heads_by_themselves():
    rng, running = np.random.default_rng(0), np.ones(synthetic.N, bool)
    heads = rng.random((4, 2, synthetic.N)).astype(np.float32)
    out = {}
    for kind in ("no-confidence", "mean-ranks", None):
        p = pruners.make(f"specprune/{kind}" if kind else "specprune", keep=0.5)
        e = at(episode(3, p, steps=1, depth=18), 0)
        state = p.init(e).replace(entropy=np.linspace(0.5, 3, 17, dtype=np.float32))
        seen = tuple(h.mean(0) for h in heads) if kind == "mean-ranks" else tuple(heads)
        out[kind] = np.asarray(p.later(state, e.replace(running=running, saliency=seen), 0)[0].importance)
        want = np.zeros(synthetic.N)
        for layer, h in zip((2, 3, 4, 5), heads, strict=True):
            h = h.mean(0)[None] if kind == "mean-ranks" else h
            want = slow_updated(want, h, 1 - 1e-6 if kind == "no-confidence" else state.entropy[layer], running)
        np.testing.assert_allclose(out[kind], want, rtol=1e-4)
    assert not np.allclose(out[None], out["mean-ranks"], rtol=1e-2)
    assert not np.allclose(out[None] / out[None].sum(), out["no-confidence"] / out["no-confidence"].sum(), rtol=1e-3)


@pytest.mark.parametrize("law", [laws.without_history_it_is_safe, laws.non_finite_evidence_gives_a_keyframe])
def test_ablations_obey_the_laws(ablated, law):
    for name in ("vla_pruner/ema", "specprune/no-reuse"):
        law(ablated(name))


def test_the_union_of_both_levels_is_counted_per_call():
    rng, calls = np.random.default_rng(0), 6
    semantic, late = rng.random((calls, 3, 10)), rng.random((calls, 4, 10))

    class Watched:
        alive, depth = np.ones((calls, 10), bool), 4

        def __len__(self):
            return calls

        def captured(self, capture):
            assert (capture.rows, capture.over) == ("all", "all")
            return semantic[:, capture.layer]

        def late(self):
            return late

    rows = overlap.measure(Watched(), cut=3, keeps=(0.3, 1.0))
    for t, got in zip(range(3, calls), rows[0]["ratio"], strict=True):
        past = sum(0.8**i * late[t - i, 2:].mean(0) for i in (1, 2, 3))
        best = [set(np.argsort(-s)[:3].tolist()) for s in (semantic[t, 2], past)]
        assert got == pytest.approx(len(best[0] | best[1]) / 3, abs=1e-6)
    assert rows[1]["ratio"] == [1.0] * 3 and max(rows[0]["ratio"]) > 1
    assert "| 30.0% | 3 |" in overlap.table(rows)
    assert len(overlap.figure(rows).axes[0].lines) == 2
