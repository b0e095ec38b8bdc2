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


def test_a_graph_is_for_gpus_that_know_it(fresh, monkeypatch):
    """Options of a platform that is not here are read all the same, so this machine says what its jax knows."""
    monkeypatch.delenv("SAFE_PRUNER_XLA", raising=False)
    assert xla.options("gpu") == {} and "xla_gpu_enable_command_buffer" not in xla.options("cpu", graph=True)
    known, unknown = {"xla_gpu_enable_triton_gemm": True}, {"xla_gpu_no_such_option": True}
    for wanted, expected in ((known, known), (unknown, {})):
        xla.options.cache_clear()
        monkeypatch.setattr(xla, "GRAPH", wanted)
        assert xla.options("gpu", graph=True) == expected
    xla.options.cache_clear()
    monkeypatch.setattr(xla, "GRAPH", known)
    monkeypatch.setenv("SAFE_PRUNER_XLA", "default")
    assert xla.options("gpu", graph=True) == {}


def test_what_a_step_hands_on_does_not_leave_its_program():
    program = lambda weights, a, b: {"sum": weights + a["x"], "kept": a["x"], "also": (b, a["x"])}
    arguments = (jnp.ones(3), {"x": jnp.arange(3.0)}, jnp.zeros(2))
    plain, handing = (xla.Step(program, savings) for savings in ((), ("arguments",)))
    outputs = [len(jax.tree.leaves(step.lower(*arguments).out_info)) for step in (plain, handing)]
    assert outputs == [4, 1]
    assert handing(*arguments)["also"][0] is arguments[2]
    jax.tree.map(np.testing.assert_array_equal, handing(*arguments), plain(*arguments))


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
