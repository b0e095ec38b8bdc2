"""Correspondence and forecast (Algorithm 2), κ (Eq. 6) and fusion (Eq. 4-5) against float64 loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from oracles.forecasts import (
    slow_forecast,
    slow_fuse,
    slow_kappa,
    slow_match,
    slow_soft_forecast,
    slow_soft_match,
    slow_unit,
)

from safe_pruner_jax.pruners import forecast

SIZES = (1, 7, 12)  # few, so that few programs are compiled


masks = lambda size: st.lists(st.booleans(), min_size=size, max_size=size).map(lambda x: np.array(x, bool))
generators = st.integers(0, 2**32 - 1).map(np.random.default_rng)
MATCH = jax.jit(forecast.correspondence)
SOFT = jax.jit(forecast.soft_correspondence, static_argnames="temperature")
FORECAST = jax.jit(forecast.forecast)
KAPPA = jax.jit(forecast.kappa)
FUSE = jax.jit(forecast.fuse, static_argnums=2)


@given(generators, st.sampled_from(SIZES), st.sampled_from([1e-6, 1.0, 1e6]))
def test_unit_rows(rng, n, scale):
    z = (scale * rng.normal(size=(n, 4))).astype(np.float32)
    z[rng.uniform(size=n) < 0.2] = 0.0
    np.testing.assert_allclose(forecast.unit(z), slow_unit(z), rtol=1e-5, atol=1e-7)


def test_unit_rows_of_bfloat16_are_float32():
    z = jnp.asarray(np.random.default_rng(0).normal(size=(7, 4)), jnp.bfloat16)
    got = forecast.unit(z)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, slow_unit(np.asarray(z, np.float32)), rtol=1e-5)


def test_unit_shows_non_finite_rows_and_spares_the_others():
    z = np.ones((3, 4), np.float32)
    z[0, 1], z[2, 0] = np.nan, np.inf
    finite = np.isfinite(forecast.unit(z))
    assert not finite[0].all() and finite[1].all() and not finite[2].all()


@given(generators, st.sampled_from(SIZES), st.data(), st.booleans())
def test_correspondence_of_exact_ties_takes_the_lowest_index(rng, n, data, same_camera):
    # entries of ±1/2 in four dimensions: unit rows of which many coincide, similarities exact in float32
    z, reference = (rng.choice([-0.5, 0.5], size=(n, 4)).astype(np.float32) for _ in range(2))
    alive = data.draw(masks(n))
    camera = rng.integers(0, 2, n).astype(np.int32) if same_camera else None
    got = MATCH(z, reference, alive, camera)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, slow_match(z, reference, alive, camera))


@given(generators, st.sampled_from(SIZES), st.data(), st.booleans())
def test_correspondence_is_algorithm_2(rng, n, data, same_camera):
    z, reference = (slow_unit(rng.normal(size=(n, 8))) for _ in range(2))
    alive = data.draw(masks(n))
    camera = rng.integers(0, 2, n).astype(np.int32) if same_camera else None
    reference[~alive] = z[: (~alive).sum()]  # the best match of some token, but dead
    similarity = np.sort(z @ reference.T, axis=1)
    assume(n == 1 or np.diff(similarity, axis=1).min() > 1e-5)
    got = MATCH(z.astype(np.float32), reference.astype(np.float32), alive, camera)
    np.testing.assert_array_equal(got, slow_match(z, reference, alive, camera))


def test_correspondence_multiplies_in_full_precision():
    # accelerators round matmul operands by default, which makes ties of near-equal tokens; a CPU does not
    jaxpr = jax.make_jaxpr(forecast.correspondence)(np.eye(7), np.eye(7), np.ones(7, bool))
    products = [e for e in jaxpr.eqns if e.primitive.name == "dot_general"]
    assert [e.params["precision"] for e in products] == [(jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)]


def test_correspondence_without_a_candidate_is_zero():
    eye = np.eye(7, dtype=np.float32)
    assert MATCH(eye, eye, np.zeros(7, bool)).tolist() == [0] * 7
    camera = np.array([0, 0, 0, 1, 1, 1, 1], np.int32)
    assert MATCH(eye, eye, camera == 1, camera).tolist() == [0, 0, 0, 3, 4, 5, 6]


@given(generators, st.sampled_from(SIZES), st.data())
def test_forecast_transfers_by_match(rng, n, data):
    s = rng.uniform(size=(3, n)).astype(np.float32)
    pi, alive = rng.integers(0, n, n).astype(np.int32), data.draw(masks(n))
    s[:, rng.uniform(size=n) < 0.1] = np.nan
    got = np.asarray(FORECAST(s, pi, alive))
    for layer in range(3):
        np.testing.assert_array_equal(got[layer], slow_forecast(s[layer], pi, alive).astype(np.float32))
    np.testing.assert_array_equal(FORECAST(s[0], pi, alive), got[0])


@given(generators, st.sampled_from(SIZES), st.data(), st.booleans(), st.sampled_from([0.05, 0.3]))
def test_soft_correspondence_inherits_from_all_partners(rng, n, data, same_camera, temperature):
    z, reference = (slow_unit(rng.normal(size=(n, 8))) for _ in range(2))
    alive = data.draw(masks(n))
    camera = rng.integers(0, 2, n).astype(np.int32) if same_camera else None
    s = rng.uniform(size=(3, n)).astype(np.float32)
    now, then = z.astype(np.float32), reference.astype(np.float32)
    weights, most = SOFT(now, then, alive, camera, temperature=temperature)
    np.testing.assert_array_equal(most, jax.jit(forecast.nearest)(now, then, alive, camera)[1])
    got = np.asarray(FORECAST(s, weights, alive))
    partners = slow_soft_match(z, reference, alive, temperature, camera)
    for layer in range(3):
        np.testing.assert_allclose(got[layer], slow_soft_forecast(s[layer], partners, alive), rtol=1e-4, atol=1e-6)


def test_a_cold_soft_correspondence_is_the_hard_one():
    z, reference = (slow_unit(np.random.default_rng(i).normal(size=(12, 8))).astype(np.float32) for i in (0, 1))
    alive, s = np.arange(12) != 5, np.arange(12, dtype=np.float32)
    weights, _ = SOFT(z, reference, alive, temperature=1e-4)
    np.testing.assert_allclose(FORECAST(s, weights, alive), FORECAST(s, MATCH(z, reference, alive), alive), atol=1e-5)


def test_soft_correspondence_shows_a_token_that_is_not_finite():
    z = np.eye(7, dtype=np.float32)
    z[2, 0] = np.nan
    weights, most = SOFT(z, np.eye(7, dtype=np.float32), np.ones(7, bool), temperature=0.1)
    assert np.isnan(weights[2]).all() and np.isnan(most[2]) and np.isfinite(np.delete(weights, 2, axis=0)).all()


@given(generators, st.sampled_from(SIZES), st.sampled_from([1e-4, 1.0, 1e4]))
def test_kappa_is_eq_6(rng, n, scale):
    a, b = scale * rng.uniform(size=(2, n)).astype(np.float32), rng.normal(size=(2, n)).astype(np.float32)
    for x, y in ((a[0], a[1]), (b[0], b[1]), (a[0], b[0])):
        np.testing.assert_allclose(KAPPA(x, y), slow_kappa(x, y), rtol=1e-4, atol=1e-5)
    assert np.isclose(KAPPA(a[0], 3 * a[0]), 1.0, atol=1e-6)
    assert np.isclose(KAPPA(b[0], -b[0]), -1.0, atol=1e-6)


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_kappa_of_nothing_is_nan(value):
    some, none = np.ones(7, np.float32), np.full(7, value, np.float32)
    for x, y in ((some, none), (none, some), (none, none)):
        assert np.isnan(KAPPA(x, y))


@given(generators, st.sampled_from(SIZES), st.sampled_from([0, 0.0, 0.25, 0.5, 1.0]))
def test_fuse_is_eq_4_and_5(rng, n, weight):
    s, late = rng.uniform(size=n).astype(np.float32), rng.uniform(size=(3, n)).astype(np.float32)
    np.testing.assert_allclose(FUSE(s, late, weight), slow_fuse(s, late, weight), rtol=1e-5)


def test_fuse_without_forecast_never_looks_at_it():
    s = np.arange(7, dtype=np.float32)
    np.testing.assert_array_equal(FUSE(s, np.full((3, 7), np.nan, np.float32), 0.0), s)
