"""8-bit weights: what a column loses, what a product with them is, and what a whole model makes of it."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_engine import prepared, reference

from safe_pruner_jax import load_policy
from safe_pruner_jax.model import pi0, quantisation
from safe_pruner_jax.model.matrix import Scaled, columns, dense
from safe_pruner_jax.policy.embedded import embedded_folder
from safe_pruner_jax.policy.identity import describe
from safe_pruner_jax.pruners import full, safe


def matrix(rows: int = 64, width: int = 24) -> np.ndarray:
    """Columns of very different size, one of them zero."""
    w = np.random.default_rng(0).standard_normal((rows, width)).astype(np.float32) * np.geomspace(1e-4, 1e2, width)
    w[:, 3] = 0
    return w.astype(np.float32)


@pytest.mark.parametrize(("to", "steps"), [("int8", 0.5 / 127), ("fp8", 2.0**-4)])
def test_every_column_has_a_scale_of_its_own(to, steps):
    w = matrix()
    s = quantisation.scaled(jnp.asarray(w), to)
    assert s.dtype == quantisation.STORED[to][0] and s.shape == w.shape and s.scale.shape == (w.shape[1],)
    back = np.asarray(s.values.astype(jnp.float32)) * np.asarray(s.scale)
    assert (back[:, 3] == 0).all()
    # int8 is even over a column, fp8 relative to every value: half a step of 3 mantissa bits
    allowed = steps * np.abs(w).max(0) if to == "int8" else steps * np.abs(w) + 1e-3 * np.abs(w).max(0)
    assert (np.abs(back - w) <= allowed * 1.001).all()


@pytest.mark.parametrize("to", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_product_is_that_with_the_widened_matrix(to, dtype):
    s = quantisation.scaled(jnp.asarray(matrix()), to)
    x = jax.random.normal(jax.random.key(1), (2, 5, 64)).astype(dtype)
    y = dense(x, s)
    assert y.dtype == x.dtype and y.shape == (2, 5, 24)
    exact = np.asarray(x, np.float64) @ np.asarray(s.values.astype(jnp.float32), np.float64) * np.asarray(s.scale)
    tolerance = 1e-5 if dtype == "float32" else 2**-8
    assert (np.abs(np.asarray(y, np.float64) - exact) <= tolerance * np.abs(exact).max((0, 1))).all()
    part = columns(s, 7)
    np.testing.assert_array_equal(part.values, s.values[:, 7:])
    np.testing.assert_array_equal(part.scale, s.scale[7:])
    some = np.asarray(dense(x, part), np.float64)  # another shape, perhaps another order of sums
    assert (np.abs(some - exact[..., 7:]) <= tolerance * np.abs(exact).max((0, 1))[7:]).all()


@pytest.fixture(scope="module")
def tiny():
    return reference().config, prepared()


@pytest.mark.parametrize("to", ["int8", "fp8"])
def test_a_model_keeps_its_actions_within_the_rounding(tiny, to):
    config, weights = tiny
    small = quantisation.reduce(weights, to)
    stored = {
        w.dtype for layer in small.prefix + small.expert for w in (layer.qkv, layer.out, layer.gate_up, layer.down)
    }
    assert stored == {jnp.dtype(quantisation.STORED[to][0])}
    assert small.vision is weights.vision and small.embedding is weights.embedding
    x = jax.random.normal(jax.random.key(2), (1, 20, config.prefix.width))
    mask = jnp.ones((1, 20), bool)

    def actions(w):
        rows = pi0.Rows(x, pi0.positions(mask), mask)
        _, segments, _ = pi0.prefix_layers(w, config, rows, range(config.depth))
        noise = jax.random.normal(jax.random.key(3), (1, config.action_horizon, config.action_dim))
        return np.asarray(
            pi0.sample(w, config, pi0.Prefix(segments, rows.count), jnp.zeros((1, config.action_dim)), noise)[0]
        )

    exact, got = actions(weights), actions(small)
    error = np.abs(got - exact).max() / np.abs(exact).max()
    assert 0 < error < {"int8": 0.05, "fp8": 0.2}[to]


def test_wrong_choices_are_told(tiny):
    _, weights = tiny
    with pytest.raises(ValueError, match="quantise: expected one of int8, fp8, got 'int4'"):
        quantisation.reduce(weights, "int4")
    with pytest.raises(ValueError, match="got 8 bits; load the checkpoint again"):
        quantisation.reduce(quantisation.reduce(weights, "int8"), "int8")


def test_a_device_without_fp8_takes_int8_and_says_so(monkeypatch, caplog):
    def refuse(w, to):
        if to in refused:
            raise RuntimeError("float8 is not supported here\nand a long trace")
        return precision_scaled(w, to)

    precision_scaled, refused = quantisation.scaled, {"fp8"}
    monkeypatch.setattr(quantisation, "scaled", refuse)
    with caplog.at_level(logging.WARNING):
        assert quantisation.usable("fp8", "float32") == "int8"
    assert "cannot run them (float8 is not supported here)" in caplog.text and "int8 weights are used" in caplog.text
    assert "long trace" not in caplog.text
    refused.add("int8")
    with caplog.at_level(logging.WARNING):
        assert quantisation.usable("fp8", "bfloat16") is None
    assert "weights stay in bfloat16" in caplog.text


@pytest.mark.nightly
def test_a_policy_loads_with_them_and_records_tell_it():
    policy = load_policy("mini_libero", pruner=safe(keep=0.2), quantise="int8")
    assert isinstance(policy.engine.weights.prefix[0].qkv, Scaled)
    about = describe("mini_libero", embedded_folder(), full(), {}, quantise="int8")
    assert about.precision == "float32, int8 weights"
