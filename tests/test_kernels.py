"""Kernels against the XLA path, interpreted; what the tuner makes of good, slow, wrong and broken ones."""

import itertools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_programs import by_kernel
from tiers import at_night
from tiny_engine import close

from safe_pruner_jax.engine import autotune
from safe_pruner_jax.model import config as sizes
from safe_pruner_jax.model import gemma, kernels, pi0, quantisation, siglip, vision_kernels
from safe_pruner_jax.model.config import GemmaConfig, SiglipConfig
from safe_pruner_jax.model.expert import action_saliency
from safe_pruner_jax.model.params import init_params


def draw(i, *shape, dtype="float32"):
    return jax.random.normal(jax.random.key(i), shape).astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("kv_heads", "keys", "rows"), [(2, 64, 5), *at_night((1, 128, 10), (1, 192, 16))])
def test_attention_is_that_of_the_model(dtype, kv_heads, keys, rows):
    B, N, H = 2, 4, 16
    q, k, v = draw(0, B, rows, N, H, dtype=dtype), *(draw(i, B, keys, kv_heads, H, dtype=dtype) for i in (1, 2))
    own = [draw(i, B, rows, kv_heads, H, dtype=dtype) for i in (3, 4)]
    seen = jnp.arange(keys)[None] < jnp.array([[keys], [keys - 37]])  # the second robot has dead slots
    allowed = np.ones((1, rows, rows), bool)
    allowed[:, 0, 1:] = False  # π0's state row sees itself alone
    got = kernels.attention(q, k, v, seen, *own, jnp.asarray(allowed))
    segments = (gemma.Segment(k, v, seen[:, None]), gemma.Segment(*own, jnp.asarray(allowed)))
    want, _ = gemma.attend(q, segments)
    assert got.dtype == want.dtype and got.shape == want.shape
    # values up to 3 are sums of up to 208 products, whose order depends on the machine's vectors
    close(got.astype(jnp.float32), want.astype(jnp.float32), 5e-6 if dtype == "float32" else 3e-2)
    # what is masked does not count, however large
    spoiled = jnp.where(seen[..., None, None], k, 1e9)
    again = kernels.attention(q, spoiled, v, seen, *own, jnp.asarray(allowed))
    close(again.astype(jnp.float32), got.astype(jnp.float32), 0)


@pytest.mark.parametrize("to", [None, "int8"])
@pytest.mark.parametrize("shape", [(3, 11, 128), *at_night(((1, 10, 64),), ((40, 64),))])
def test_gated_mlp_is_that_of_the_model(to, shape):
    x, w = draw(0, *shape), draw(1, shape[-1], 2 * 192) * shape[-1] ** -0.5
    w = w if to is None else quantisation.scaled(w, to)
    got, want = kernels.gated_mlp(x, w), gemma.gate_and_up(x, w)
    assert got.shape == want.shape == (*shape[:-1], 192)
    close(got, want, 1e-5)


def test_sizes_a_block_does_not_divide_are_told():
    with pytest.raises(ValueError, match=r"expected a multiple of 64 keys, got 100; use kernels\.padded"):
        q = draw(0, 1, 4, 2, 16)
        kernels.attention(q, *[draw(1, 1, 100, 1, 16)] * 2, jnp.ones((1, 100), bool), *[q[:, :, :1]] * 2, None)
    with pytest.raises(ValueError, match="multiples of 64, got 64 and 100"):
        kernels.gated_mlp(draw(0, 4, 64), draw(1, 64, 200))


@pytest.fixture(scope="module")
def model():
    layer = GemmaConfig(width=64, depth=3, mlp_dim=64, num_heads=4, num_kv_heads=1, head_dim=16)
    vision = SiglipConfig(16, 1, 32, 2)
    config = sizes.mini(prefix=layer, expert=layer, vision=vision, image_size=56, action_horizon=4)
    prepared = jax.jit(lambda key: pi0.prepare(init_params(key, config), config, num_steps=3))
    return config, prepared(jax.random.key(0))


@pytest.mark.nightly
def test_denoise_steps_with_kernels_are_those_without(model):
    config, weights = model
    keys = 41  # not a multiple of a block
    segments = tuple(
        gemma.Segment(draw(i, 2, keys, 1, 16), draw(i + 9, 2, keys, 1, 16), jnp.arange(keys)[None, None] < 39)
        for i in range(3)
    )
    segments = tuple(s.replace(mask=jnp.broadcast_to(s.mask, (2, 1, keys))) for s in segments)
    prefix, noise = pi0.Prefix(segments, jnp.full(2, 39)), draw(20, 2, 4, 8)
    late = {"visual_alive": jnp.ones((2, 32), bool), "late_layers": (1,)}
    run = lambda c: pi0.sample(weights, c, prefix, noise[:, 0], noise, **late)
    want = run(config)
    for names in ((kernels.ATTENTION,), (kernels.GATED_MLP,), (kernels.ATTENTION, kernels.GATED_MLP)):
        actions, saliency = run(config.replace(kernels=names))
        close(actions, want[0], 1e-5)
        close(saliency, want[1], 1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("tokens", "width"), [(64, 72), *at_night((16, 5), (192, 16))])
def test_attention_of_the_tower_is_that_of_the_model(dtype, tokens, width):
    qkv = draw(0, 2, tokens, 3, 2, width, dtype=dtype)
    got, want = vision_kernels.attend(qkv), siglip._attend(qkv)
    assert got.dtype == want.dtype and got.shape == want.shape
    # the model rounds logits to the activation dtype, the kernel does not
    close(got.astype(jnp.float32), want.astype(jnp.float32), 5e-6 if dtype == "float32" else 3e-2)


def test_visual_tokens_with_the_kernel_are_those_without(model):
    config, weights = model
    images = jax.random.randint(jax.random.key(0), (2, 3, 56, 56, 3), 0, 256).astype("uint8")
    fused = config.replace(kernels=(kernels.VISION,))
    close(pi0.embed_images(weights, fused, images), pi0.embed_images(weights, config, images), 2e-5)
    calls = lambda config: str(jax.make_jaxpr(lambda: pi0.embed_images(weights, config, images))()).count("pallas_call")
    assert calls(fused) > 0 == calls(config)
    assert not vision_kernels.supports(config.replace(image_size=42))  # nine tokens: no block divides them


def expert(action_dim=8):
    """A small model and parameters of it."""
    layer = GemmaConfig(width=64, depth=3, mlp_dim=128, num_heads=4, num_kv_heads=1, head_dim=16)
    vision = SiglipConfig(16, 1, 32, 2)
    config = sizes.mini(prefix=layer, expert=layer, vision=vision, image_size=56, action_horizon=4)
    config = config.replace(action_dim=action_dim)
    # at openpi's zeros the adaptive norms close every branch, and any kernel would pass
    opened = lambda path, a: a + 0.3 * draw(3, *a.shape) if "Dense_0" in jax.tree_util.keystr(path) else a
    return config, jax.tree_util.tree_map_with_path(opened, init_params(jax.random.key(0), config))


prepare = jax.jit(pi0.prepare, static_argnums=1, static_argnames="num_steps")


# fewer than a block; the last block reaches back; split among blocks, of which the last reaches back
# and actions of numbers that the kernels `enter` and `leave` take, or not
@pytest.mark.parametrize(("keys", "action_dim"), [(41, 8), *at_night((100, 16), (544, 32))])
def test_a_chunk_by_whole_layers_is_that_without(keys, action_dim):
    """The kernel needs the norms stacked; late layers take XLA's path."""
    config, params = expert(action_dim)
    seen = jnp.broadcast_to(jnp.arange(keys)[None, None] < keys - 5, (2, 1, keys))
    segments = tuple(gemma.Segment(draw(i, 2, keys, 1, 16), draw(i + 9, 2, keys, 1, 16), seen) for i in range(3))
    prefix, noise = pi0.Prefix(segments, jnp.full(2, keys - 5)), draw(20, 2, 4, action_dim)
    late = {"visual_alive": jnp.ones((2, 32), bool), "late_layers": (1,)}

    def run(config, given):
        return pi0.sample(prepare(params, config, num_steps=3), config, prefix, noise[:, 0], noise, **given)

    fused = config.replace(kernels=(kernels.LAYER,), savings=("stacked",))
    for given in ({}, late):
        want, got = run(config, given), run(fused, given)
        close(got[0], want[0], 2e-5)
        if given:
            close(got[1], want[1], 1e-6)
    calls = lambda config: str(jax.make_jaxpr(lambda: run(config, {}))()).count("pallas_call")
    assert calls(fused) > 0 == calls(config)  # it is the kernel that was compared
    assert calls(config.replace(kernels=(kernels.LAYER,))) == 0  # without stacked norms it stays out


@pytest.mark.parametrize("dead", [70, *at_night(0, 128)])
def test_what_the_actions_see_is_saliency_of_the_layers_logits(dead):
    """The decision of `safe`: layers up to the cut, of which the last one's attention to visual tokens is all."""
    config, params = expert(action_dim=16)
    keys, n = 140, 128
    alive = jnp.arange(n)[None] >= jnp.array([[0], [dead]])
    seen = jnp.concatenate([alive, jnp.ones((2, keys - n), bool)], axis=1)[:, None]
    segments = tuple(gemma.Segment(draw(i, 2, keys, 1, 16), draw(i + 9, 2, keys, 1, 16), seen) for i in range(2))
    prefix, noise = pi0.Prefix(segments, seen[:, 0].sum(1)), draw(20, 2, 4, 16)
    weights = prepare(params, config, num_steps=3)
    tokens = pi0.suffix_tokens(weights, config, noise[:, 0], noise, None)
    _, logits, _ = pi0.expert_layers(weights, config, tokens, prefix, weights.schedule.first_mods, (1,))
    want = pi0.action_saliency(config, logits[1], alive)
    fused = config.replace(kernels=(kernels.LAYER,), savings=("stacked",))
    made = prepare(params, fused, num_steps=3)
    close(action_saliency(made, fused, noise, prefix, alive, fused.kernels), want, 1e-6)
    assert action_saliency(made, fused, noise, prefix, alive, ()) is None
    assert action_saliency(made, fused, noise, prefix, alive[:, :100], fused.kernels) is None


@pytest.mark.parametrize("name", kernels.NAMES)
def test_a_gpu_compiler_takes_them(name):
    """Down to Triton's own language, for π0.5's sizes; to machine code for every target in test_aot.py."""
    for program, shape in by_kernel()[name]:
        assert "triton" in jax.jit(program).trace(shape).lower(lowering_platforms=("cuda",)).as_text()


def ticks(gain):
    """A clock by which the second of two programs is `gain` times as fast as the first."""
    steps = itertools.cycle([0.0, 1.0, 0.0, 1.0 / gain])
    total = itertools.accumulate(steps)
    return lambda: next(total)


def test_the_tuner_keeps_what_is_faster(model, caplog):
    config, weights = model
    chosen, found = autotune.tuned(weights, config, 41, clock=ticks(1.5))
    assert chosen.kernels == (
        kernels.ATTENTION,
        kernels.GATED_MLP,
        kernels.VISION,
    )  # this model's norms are not stacked
    assert {f.verdict for f in found.values()} == {"used"} and found["attention"].gain == pytest.approx(1.5)
    chosen, found = autotune.tuned(weights, config, 41, clock=ticks(1.01))
    assert chosen.kernels == () and {f.verdict for f in found.values()} == {"slower"}


@pytest.mark.parametrize(("gain", "kept"), [(1.5, ("rotation", "graph")), (1.01, ("rotation",))])
def test_the_tuner_leaves_out_a_graph_that_is_no_faster(model, gain, kept):
    config, weights = model
    config = config.replace(savings=("rotation", "graph"), kernels=kernels.NAMES)  # nothing but the graph is tried
    chosen, found = autotune.tuned(weights, config, 41, clock=ticks(gain))
    assert chosen.savings == kept and set(found) == {"graph"}


def test_the_tuner_leaves_out_what_breaks_or_lies(model, caplog, monkeypatch):
    config, weights = model

    def breaks(*args, **named):
        raise RuntimeError("no such target\nlong trace")

    monkeypatch.setattr(kernels, "attention", breaks)
    true = kernels.gated_mlp
    monkeypatch.setattr(kernels, "gated_mlp", lambda x, w: 1.01 * true(x, w))
    monkeypatch.setattr(vision_kernels, "attend", breaks)
    with caplog.at_level(logging.WARNING):
        chosen, found = autotune.tuned(weights, config, 41, clock=ticks(2.0))
    assert chosen.kernels == () and found["vision"].verdict == "failed"
    assert found["attention"] == autotune.Finding("failed", why="no such target")
    assert found["gated_mlp"].verdict == "differs" and "expected at most 1e-04" in found["gated_mlp"].why
    assert "kernel attention: failed (no such target)" in caplog.text and "long trace" not in caplog.text
