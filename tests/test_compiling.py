"""Programs get this machine's options where they are outermost, and compute the same inside another one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safe_pruner_jax.engine import xla


@pytest.fixture
def fresh():
    """`options` asks again, also afterwards."""
    xla.options.cache_clear()
    yield
    xla.options.cache_clear()


def test_the_environment_leaves_everything_to_xla(fresh, monkeypatch):
    monkeypatch.setenv("SAFE_PRUNER_XLA", "default")
    assert xla.options() == {}


def test_an_option_that_this_jax_does_not_know_is_left_out(fresh, monkeypatch):
    monkeypatch.delenv("SAFE_PRUNER_XLA", raising=False)
    monkeypatch.setattr(xla, "CPU", {"xla_cpu_no_such_option": ""})
    assert xla.options() == {}
    assert xla.jit(jnp.sin)(0.0) == 0


def test_a_program_is_the_same_outside_and_inside_another():
    x, w = (jnp.asarray(np.random.default_rng(i).standard_normal((64, 64)), jnp.float32) for i in range(2))
    program = xla.jit(lambda x, w: jnp.tanh(x @ w))
    outside, inside = program(x, w), jax.jit(lambda x, w: program(x, w) + 0)(x, w)
    assert np.allclose(outside, np.tanh(np.asarray(x) @ np.asarray(w)), atol=1e-4)
    assert np.allclose(outside, inside, atol=1e-5)
    assert jax.eval_shape(program, x, w).shape == (64, 64)
    assert np.allclose(program.lower(x, w).compile()(x, w), outside, atol=1e-5)
    rows = jax.vmap(program, in_axes=(0, None))(x[:, None], w)
    assert np.allclose(rows[:, 0], outside, atol=1e-5)


def test_a_program_takes_the_options_of_the_machine():
    if not xla.options():
        assert type(xla.jit(jnp.sin)) is type(jax.jit(jnp.sin))
        return
    x = jnp.ones((256, 256))
    text = lambda jit: jit(lambda x: x @ x).lower(x).compile().as_text()
    assert "ynn" in text(jax.jit) and "ynn" not in text(xla.jit)
