"""Baselines against what they say they keep."""

import numpy as np
import pytest
import synthetic
from synthetic import at, episode, kept

from safe_pruner_jax import pruners
from safe_pruner_jax.pruners.baselines import BASELINES, evenly

SIDE = 8
CAMERA = np.repeat(np.arange(2, dtype=np.int32), SIDE * SIDE)


def places(score, count):
    """(camera, row, column) of the best."""
    best = sorted(range(len(score)), key=lambda v: (-score[v], v))[:count]
    return {(v // SIDE**2, v % SIDE**2 // SIDE, v % SIDE) for v in best}


def test_a_quarter_of_the_grid_is_every_second_row_and_column():
    score = np.asarray(evenly(CAMERA))
    assert score.max() < 1 and len(set(score.tolist())) == SIDE**2  # no two tokens of a camera alike
    for step in (2, 4):
        every = {(c, y, x) for c in (0, 1) for y in range(0, SIDE, step) for x in range(0, SIDE, step)}
        assert places(score, len(every)) == every
    half = places(score, SIDE**2)
    assert {(y + x) % 2 for _, y, x in half} == {0}  # a checkerboard


def decide(name, e, **choices):
    p = pruners.make(name, **choices)
    return p, p.step(p.init(e), e)[1]


def test_a_dropped_camera_is_gone_and_the_other_whole():
    e = at(episode(0, pruners.make("random"), steps=1), 0)
    for dropped in (0, 1):
        assert kept(decide("baseline/camera", e, dropped=dropped)[1]) == set(np.flatnonzero(e.camera != dropped))
    few = kept(decide("baseline/camera", e, keep=0.25)[1])
    assert len(few) == 6 and not e.camera[list(few)].any()
    with pytest.raises(ValueError, match="dropped: expected"):
        pruners.make("baseline/camera", dropped=-1)


def test_the_prior_keeps_its_slots_whatever_is_seen(tmp_path):
    mean = np.random.default_rng(0).random(synthetic.N).astype(np.float32)
    np.save(tmp_path / "prior.npy", mean)
    want = set(np.argsort(-mean)[:5].tolist())
    for seed in range(2):
        e = at(episode(seed, pruners.make("random"), steps=1), 0)
        assert kept(decide("baseline/prior", e, keep=5, map=str(tmp_path / "prior.npy"))[1]) == want
    np.save(tmp_path / "other.npy", mean[1:])
    with pytest.raises(ValueError, match="one value for each of 24 slots"):
        decide("baseline/prior", e, map=str(tmp_path / "other.npy"))
    with pytest.raises(ValueError, match=r"map: expected a .npy file"):
        pruners.make("baseline/prior")


def test_one_token_is_the_mean_of_what_is_looked_at():
    p = pruners.make("baseline/one_token")
    e = at(episode(3, p, steps=1, dead=4), 0)
    _, selection = decide("baseline/one_token", e)
    (slot,) = kept(selection)
    assert slot == np.argmax(np.where(e.alive, e.saliency[0], 0))
    weight = np.where(e.alive, e.saliency[0], 0).astype(np.float64)
    mean = sum(w * h for w, h in zip(weight, e.hidden.astype(np.float64), strict=True)) / weight.sum()
    np.testing.assert_allclose(np.asarray(selection.rows)[np.asarray(selection.alive)][0], mean, rtol=1e-4, atol=1e-5)
    assert np.abs(mean - e.hidden[slot]).max() > 0.1


def test_baselines_are_known_by_name_take_a_warm_start_and_are_not_listed():
    assert not set(BASELINES) & set(pruners.names())
    assert len({name.split("/")[1] for name in BASELINES}) == 4
    e = at(episode(0, pruners.make("random"), steps=1), 0)
    assert not decide("baseline/grid", e)[1].keyframe and decide("baseline/grid", e, warm_start=2)[1].keyframe
