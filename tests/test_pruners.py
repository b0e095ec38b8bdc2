"""Every pruner under the laws; `safe` played for many steps against Algorithms 1 and 2; plans and the registry."""

import inspect

import laws
import numpy as np
import pytest
import synthetic
from oracles.algorithm_1 import algorithm_1
from oracles.forecasts import slow_unit
from oracles.selection import slow_top_k
from synthetic import case, episode, kept, play, put
from tiers import by_day

from safe_pruner_jax.pruners import PRUNERS, Capture, Cut, Plan, make
from safe_pruner_jax.pruners.base import finite


@pytest.mark.parametrize(
    ("law", "case"),
    by_day(laws.is_quick, laws.PAIRS),
    ids=lambda value: value.__name__ if callable(value) else str(value),
)
def test_law(law, case):
    law(case)


# SAFE against Algorithms 1 and 2


def at_steps(seen, stop, start=0):
    """Some steps of an episode."""
    return synthetic.at(seen, slice(start, stop))


PLAYS = [
    *(c for c in laws.CASES if c.name == "safe"),
    case("safe", match="camera", threshold=0.6, keep=0.4, fuse=1.0),
    case("safe", every=4, max_age=3, variant="as_released", fuse=0.25, per_camera=3),
]


@pytest.mark.parametrize("case", PLAYS, ids=str)
def test_safe_is_algorithm_1(case):
    pruned = set()
    for seed in range(3):
        seen = episode(100 + seed, case.pruner, dead=3 * seed, noise=0.05 + 0.1 * seed)
        if seed == 2:  # a camera's tokens change
            alive = put(seen.alive, slice(6, None), ~seen.alive[6] | (np.arange(synthetic.N) < 12))
            seen = seen.replace(alive=alive, saliency=tuple(np.where(alive, s, 0) for s in seen.saliency))
        log = algorithm_1(seen, **dict(case.choices))
        _, selections = play(case, seen)
        for t, (expected, got) in enumerate(zip(log, selections, strict=True)):
            assert got.keyframe == expected["keyframe"], t
            np.testing.assert_allclose(got.kappa, expected["kappa"], rtol=1e-5)
            if expected["age"] is not None:
                assert expected["margin"] > 1e-4  # rounding decides nothing
                if dict(case.choices).get("pool", 1) == 1:
                    np.testing.assert_allclose(got.score, expected["score"], rtol=1e-4, atol=1e-6)
                assert kept(got) == expected["kept"], t
            pruned.add(bool(expected["keyframe"]))
    assert pruned == {True, False}


def test_safe_follows_moving_tokens_and_notices_a_new_subtask():
    seen = episode(0, case("safe").pruner, shifts=(5,), noise=0.0)
    keyframes = [bool(s.keyframe) for s in play(case("safe"), seen)[1]]
    assert keyframes == [True, False, False, False, False, True, False, False, False]
    kappas = [float(s.kappa) for s in play(case("safe"), seen)[1]]
    assert np.isnan(kappas[0]) and kappas[5] < 0.92
    np.testing.assert_allclose([k for i, k in enumerate(kappas) if i not in (0, 5)], 1.0, atol=1e-6)


def test_safe_remembers_the_unit_tokens_and_tested_saliency_of_the_keyframe():
    for c in (case("safe"), case("safe", variant="as_released", keep=5, queries="last")):
        seen = episode(1, c.pruner, shifts=(), noise=0.01, dead=4, moving=False)
        carries, selections = play(c, seen)
        assert [bool(s.keyframe) for s in selections] == [True] + [False] * 8
        for state, *_ in carries:
            z = np.where(seen.alive[0][:, None], slow_unit(seen.visual[0]), 0)
            np.testing.assert_allclose(state.reference, z, rtol=1e-5, atol=1e-6)
            np.testing.assert_array_equal(state.shallow, seen.saliency[-1][0])


@pytest.mark.parametrize(("kappa", "keyframe"), [(0.919, True), (0.921, False), (-0.5, True)])
def test_safe_compares_kappa_with_gamma(kappa, keyframe):
    c = case("safe")
    seen = episode(2, c.pruner, steps=2, shifts=(), noise=0.0, moving=False)
    s = np.zeros((2, synthetic.N), np.float32)
    s[0, 3], s[1, 3], s[1, 7] = 1.0, kappa, np.sqrt(1 - kappa**2)
    selection = play(c, seen.replace(saliency=(s,)))[1][1]
    np.testing.assert_allclose(selection.kappa, kappa, atol=1e-6)
    assert selection.keyframe == keyframe


def test_safe_with_a_pool_keeps_one_of_two_that_are_alike():
    c = case("safe", pool=2, keep=2, every=9)
    seen = episode(5, c.pruner, steps=2, shifts=(), noise=0.0, moving=False)
    s = np.zeros((2, synthetic.N), np.float32)
    s[:, :4] = [0.4, 0.35, 0.15, 0.1]
    visual = seen.visual.copy()
    visual[:, 1] = visual[:, 0]  # the second best shows the same as the best
    alike = seen.replace(saliency=(s,), visual=visual, late=np.broadcast_to(s[:, None], seen.late.shape))
    (one,) = kept(play(c, alike)[1][1]) & {0, 1}
    assert kept(play(c, alike)[1][1]) - {one} < {2, 3}
    assert kept(play(case("safe", keep=2, every=9), alike)[1][1]) == {0, 1}


def test_safe_at_kappa_equal_to_gamma_prunes():
    # orthogonal saliency: κ is exactly 0
    c = case("safe", threshold=0.0)
    seen = episode(2, c.pruner, steps=2, shifts=(), noise=0.0, moving=False)
    s = np.zeros((2, synthetic.N), np.float32)
    s[0, 3], s[1, 7] = 1.0, 1.0
    selection = play(c, seen.replace(saliency=(s,)))[1][1]
    assert selection.kappa == 0 and not selection.keyframe


def test_safe_with_nothing_to_compare_runs_everything():
    """κ of an all-zero saliency is not a number: no reason to trust the forecast, whatever γ."""
    c = next(c for c in laws.CASES if dict(c.choices).get("threshold") == -1.0)
    seen = episode(2, c.pruner, steps=2, shifts=())
    assert not play(c, seen)[1][1].keyframe
    assert play(c, seen.replace(saliency=(put(seen.saliency[0], 1, 0.0),)))[1][1].keyframe


def test_safe_without_forecast_does_not_need_late_saliency():
    c = case("safe", every=3, keep=0.5, fuse=0.0)
    seen = episode(3, c.pruner)
    clean = play(c, seen)[1]
    sick = play(c, seen.replace(late=np.full_like(seen.late, np.nan)))[1]
    for a, b in zip(clean, sick, strict=True):
        synthetic.same(a, b)
    assert not all(s.keyframe for s in clean)


def test_safe_defaults_are_the_papers():
    defaults = {n: p.default for n, p in inspect.signature(PRUNERS["safe"]).parameters.items()}
    assert (defaults["threshold"], defaults["cut"]) == (0.92, 3)
    described, released = make("safe").plan, make("safe", variant="as_released").plan
    assert described.capture == (Capture(2, "action"),) and described.late_over == "visual"
    assert released.capture == (Capture(2, "action", "all"), Capture(0, "last", "all")) and released.late_over == "all"
    assert described.for_depth(18).late_layers == (0, 16, 17) and released.for_depth(18).late_layers == (17,)
    assert make("safe", queries="text", cut=5).plan.capture == (Capture(4, "text"),)
    prefix = make("safe", late="prefix", queries="all", over="all").plan.for_depth(18)
    assert prefix.remember == tuple(Capture(l, "all", "all") for l in (0, 15, 16)) and prefix.late_layers == ()
    assert [c.rows for c in make("safe", late="prefix").plan.remember] == ["text"] * 3


def test_safe_does_not_trust_a_sick_reference():
    """A keyframe with a NaN token leaves a reference that every later token would match; see it refreshed."""
    c = case("safe")
    seen = episode(4, c.pruner, shifts=(), noise=0.01, moving=False)
    flat = np.full_like(seen.saliency[0], 1 / synthetic.N) + 1e-4 * np.arange(synthetic.N, dtype=np.float32)
    seen = seen.replace(saliency=(flat,), visual=put(seen.visual, (2, 3, 0), np.nan))
    carries, selections = play(c, seen)
    assert selections[2].keyframe and selections[3].keyframe
    assert synthetic.all_finite(carries[-1][0])


# the other pruners


@pytest.mark.parametrize("queries", ["all", "last"])
def test_fastv_scores_by_all_rows_or_the_last(queries):
    c = case("fastv", queries=queries)
    assert c.pruner.plan == Plan(Cut(3, 0.2), capture=(Capture(2, queries, over="all"),))
    assert make("fastv", cut=7).plan.capture == (Capture(6, "all", over="all"),)
    seen = episode(0, c.pruner, dead=3)
    for t, selection in enumerate(play(c, seen)[1]):
        np.testing.assert_array_equal(selection.score, seen.saliency[0][t])
        assert kept(selection) == set(slow_top_k(seen.saliency[0][t], seen.alive[t], 0.2))
        assert not selection.keyframe


def test_random_draws_anew_from_the_key_alone():
    c = case("random")
    seen = episode(0, c.pruner, steps=60, dead=4)
    selections = play(c, seen)[1]
    assert not any(s.keyframe for s in selections)
    counts = np.bincount([v for s in selections for v in kept(s)], minlength=synthetic.N)
    assert (counts[~seen.alive[0]] == 0).all()
    # 60 draws of 4 of 20: 12 each on average, standard deviation 3.1
    assert counts.sum() == 60 * 4 and (counts[seen.alive[0]] >= 2).all() and counts.max() <= 24
    other = episode(1, c.pruner, steps=60, dead=~seen.alive[0]).replace(key=seen.key)
    synthetic.same(play(c, other)[1][7], selections[7])


def test_safe_matches_hidden_rows_where_tokens_look_alike():
    c, z = case("safe", features="hidden", threshold=-1.0), case("safe", threshold=-1.0)
    seen = episode(0, c.pruner, shifts=(), noise=0.0, steps=4)
    alike = seen.replace(visual=np.ones_like(seen.visual))
    np.testing.assert_allclose([s.kappa for s in play(c, alike)[1][1:]], 1, atol=1e-5)
    assert max(s.kappa for s in play(z, alike)[1][1:]) < 0.9


def test_safe_refers_to_the_last_full_pass_whoever_asked_for_it():
    """A step that runs in full against the pruner's own decision is its keyframe all the same."""
    c = case("safe", threshold=-1.0)
    seen = episode(3, c.pruner, steps=3, shifts=(1,), noise=0.3)
    carries, _ = play(c, at_steps(seen, 2))
    state, since, *rest = carries[1]
    assert since == 1  # it would have pruned
    forced = (state, np.int32(0), rest[0], seen.late[1], rest[2])
    kappa = play(c, at_steps(seen, 3, 2), forced)[1][0].kappa
    log = algorithm_1(seen, threshold=2.0)  # every step a keyframe
    np.testing.assert_allclose(kappa, log[2]["kappa"], rtol=1e-5)
    assert abs(kappa - play(c, seen)[1][2].kappa) > 1e-3


def test_full_is_always_a_keyframe_and_cuts_nothing():
    c = case("full")
    assert c.pruner.plan == Plan() and c.pruner.plan.cut is None
    assert all(s.keyframe for s in play(c, episode(0, c.pruner))[1])


def test_finite_looks_at_every_array():
    ones = np.ones(3, np.float32)
    assert finite(ones, ones)
    for value in (np.nan, np.inf, -np.inf):
        assert not finite(ones, put(ones, 1, value)) and not finite(put(ones, 2, value), ones)


# plans


def test_plans_know_their_model():
    plan = Plan(Cut(3, 0.2), late_layers=(0, -2, -1), late_steps="last")
    assert plan.for_depth(18) == Plan(Cut(3, 0.2), (), (0, 16, 17), "last")
    for bad in ((18,), (-19,), (0, 99)):
        with pytest.raises(ValueError, match=r"late_layers: expected .* depth 18, got"):
            Plan(Cut(3, 0.2), late_layers=bad).for_depth(18)
    with pytest.raises(ValueError, match=r"cut: expected .* below .* 18, got 18"):
        Plan(Cut(18, 0.2)).for_depth(18)
    Plan(Cut(17, 0.2)).for_depth(18)


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: Cut(-1, 0.2), "cut: expected .* got -1"),
        (lambda: Cut(3, 0), "keep: expected .* got 0"),
        (lambda: Plan(late_steps="first"), "late_steps: expected .* got 'first'"),
        (lambda: Plan(Cut(3, 0.2), (Capture(2, "rows"),)), "queries: expected .* got 'rows'"),
        (lambda: Plan(Cut(3, 0.2), (Capture(3, "last"),)), "capture: layer 3 is not computed before"),
        (lambda: Plan(capture=(Capture(0, "last"),)), "capture: layer 0 is not computed before"),
    ],
)
def test_plans_reject_what_cannot_run(build, text):
    with pytest.raises(ValueError, match=text):
        build()


def test_pruners_that_decide_differently_are_not_equal():
    a, b = make("safe", threshold=0.9), make("safe", threshold=0.8)
    assert a.plan == b.plan and a != b


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("fastv", {"cut": 2.5}),
        ("safe", {"every": 1.5}),
        ("safe", {"max_age": 1.5}),
        ("safe", {"per_camera": 0.5}),
        ("safe", {"late_layers": (0.5,)}),
    ],
    ids=str,
)
def test_factories_reject_fractions_of_whole_numbers(name, choices):
    with pytest.raises(ValueError, match=r"expected.*got"):
        make(name, **choices)


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        *((name, {}) for name in ("fastv", "random", "vla_pruner")),
        ("safe", {"fuse": 0.0}),
        ("safe", {"variant": "as_released"}),
    ],
    ids=str,
)
def test_only_a_forecast_can_decide_before_the_first_layer(name, choices):
    with pytest.raises(ValueError, match=r"expected.*got"):
        make(name, cut=0, **choices)


def test_safe_before_the_first_layer_keeps_what_mattered_and_notices_when_it_is_gone():
    c = case("safe", cut=0, threshold=0.9, keep=3)
    seen = episode(5, c.pruner, steps=3, shifts=(), noise=0.0, moving=False)
    late = np.zeros_like(seen.late)
    late[..., [2, 7, 11]] = [0.5, 0.3, 0.2]
    visual = put(seen.visual, 2, seen.visual[2][::-1])  # the last frame shows everything elsewhere
    log = play(c, seen.replace(late=late, visual=visual))[1]
    assert c.pruner.plan.capture == () and [bool(s.keyframe) for s in log] == [True, False, False]
    assert kept(log[1]) == {2, 7, 11} and kept(log[2]) == {synthetic.N - 1 - v for v in (2, 7, 11)}
    np.testing.assert_allclose([s.kappa for s in log[1:]], 1.0, atol=1e-6)
    gone = put(visual, 2, -visual[2])
    assert play(c, seen.replace(late=late, visual=gone))[1][2].keyframe


def test_late_layers_may_be_a_list():
    assert hash(make("safe", late_layers=[0, -1]).plan) == hash(make("safe", late_layers=(0, -1)).plan)


# the registry


def test_make_is_the_factory():
    for name, factory in PRUNERS.items():
        assert make(name).plan == factory().plan and make(name).name == name
    assert make("safe", keep=64).plan.cut == Cut(3, 64)


@pytest.mark.parametrize(("name", "hint"), [("saef", "safe"), ("fast_v", "fastv"), ("randm", "random")])
def test_make_suggests_a_name(name, hint):
    with pytest.raises(ValueError, match=f"got '{name}'; did you mean '{hint}'") as error:
        make(name)
    assert all(known in str(error.value) for known in PRUNERS)


def test_make_does_not_guess_wildly():
    with pytest.raises(ValueError, match=r"expected one of .*, got 'zzz'$"):
        make("zzz")


def test_make_passes_on_what_the_factory_says():
    with pytest.raises(TypeError, match="keeps"):
        make("fastv", keeps=0.2)
    with pytest.raises(TypeError, match="keep"):
        make("full", keep=0.2)
    with pytest.raises(ValueError, match=r"match: expected .* got 'cameras'"):
        make("safe", match="cameras")
