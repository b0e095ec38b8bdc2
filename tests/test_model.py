"""The model's parameter tree against openpi's, what `prepare` promises, and the prefix."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from small_model import observation, prepare, random_tree, small
from tiers import at_night

from safe_pruner_jax.model import gemma, pi0, quantisation
from safe_pruner_jax.model.config import GemmaConfig, SiglipConfig, mini
from safe_pruner_jax.model.config import pi0 as pi0_config
from safe_pruner_jax.model.config import pi05 as pi05_config
from safe_pruner_jax.model.matrix import Upright
from safe_pruner_jax.model.params import param_shapes, spec

DATA = Path(__file__).parent / "data"


def run(params, config, images, camera_mask, tokens, token_mask, state, noise):
    """Velocity at t = 1 and the keys and values of every layer, from raw parameters."""
    weights = pi0.prepare(params, config, num_steps=3)
    rows = pi0.embed_prefix(weights, config, images, camera_mask, tokens, token_mask)
    _, segments, _ = pi0.prefix_layers(weights, config, rows, range(config.depth))
    at = jax.tree.map(lambda a: a[0], weights.schedule)
    v, *_ = pi0.velocity(weights, config, pi0.Prefix(segments, rows.count), state, noise, at)
    return v, segments


go = jax.jit(run, static_argnums=1)  # compiled once for all tests


# Sizes and parameters


@pytest.mark.parametrize("config, name", [(pi05_config(), "pi05"), (pi0_config(), "pi0")])
def test_the_released_sizes_have_openpis_parameters(config, name):
    leaves = traverse_util.flatten_dict(param_shapes(config), sep="/")
    got = {path: (str(leaf.shape), str(leaf.dtype)) for path, leaf in leaves.items()}
    lines = [line.split("\t") for line in (DATA / f"{name}_param_tree.txt").read_text().splitlines() if line]
    assert got == {path: (shape, dtype) for path, shape, dtype, _ in lines}
    assert all(leaf.size == int(count) for leaf, (*_, count) in zip(leaves.values(), lines, strict=True))


@pytest.mark.parametrize("pi05", [True, False])
def test_initial_parameters_keep_activations_at_unit_size(pi05):
    config = small(pi05)
    leaves, shapes = spec(config), traverse_util.flatten_dict(param_shapes(config), sep="/")
    assert {path: shape for path, (shape, _, _) in leaves.items()} == {p: a.shape for p, a in shapes.items()}
    assert list(leaves) == sorted(leaves)
    fan_in = {"q_einsum/w": 12, "kv_einsum_1/w": 8, "attn_vec_einsum/w": 24, "mlp/linear": 20, "mlp_1/gating_einsum": 8}
    fan_in |= {"img/embedding/kernel": 588, "query/kernel": 10, "Attention_0/out/kernel": 10, "head/kernel": 10}
    for end, inputs in fan_in.items():
        (found,) = [leaf for path, leaf in leaves.items() if path.endswith(end)]
        assert found[1:] == (0.0, pytest.approx(inputs**-0.5)), end
    for path, (_, mean, std) in leaves.items():
        if path.endswith(("bias", "scale")):
            assert (mean, std) == (float("img" in path and path.endswith("scale")), 0.0), path


def test_released_and_embedded_sizes():
    released = (pi05_config(), 32, 50, 200), (pi0_config(), 32, 50, 48)
    for config, action_dim, horizon, prompt in (*released, (mini(), 8, 10, 200)):
        assert config.tokens_per_camera == 256
        assert (config.action_dim, config.action_horizon, config.max_token_len) == (action_dim, horizon, prompt)
        hash(config)
    assert pi05_config().depth == 18
    assert pi05_config(action_horizon=10).action_horizon == 10
    assert pi05_config().discrete_state_input
    assert not pi0_config().discrete_state_input


def test_sizes_that_form_no_model_are_refused():
    with pytest.raises(ValueError, match=r"expected expert\.depth = 3, got 4"):
        small(expert=GemmaConfig(8, 4, 16, 4, 2, 6))
    for name in ("num_heads", "num_kv_heads", "head_dim"):
        sizes = {"width": 8, "depth": 3, "mlp_dim": 16, "num_heads": 4, "num_kv_heads": 2, "head_dim": 6}
        with pytest.raises(ValueError, match=f"both experts need the same {name}"):
            small(expert=GemmaConfig(**sizes | {name: 2 * sizes[name]}))
    odd = GemmaConfig(8, 3, 16, 4, 3, 6)
    with pytest.raises(ValueError, match="num_heads must be a multiple of num_kv_heads, got 4 and 3"):
        small(prefix=odd, expert=odd)
    with pytest.raises(ValueError, match="image_size must be a multiple of the patch size 14, got 30"):
        small(image_size=30)
    with pytest.raises(ValueError, match=r"vision\.width must be a multiple of vision\.num_heads, got 10 and 3"):
        small(vision=SiglipConfig(10, 2, 14, 3))
    with pytest.raises(ValueError, match=r"dtype must be .* got 'float16'"):
        small(dtype="float16")
    for temperature in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"temperature: expected 0 \(deterministic\) to 1 \(as trained\), got "):
            small(temperature=temperature)


# prepare


def test_prepare_is_pure():
    config = small()
    params = random_tree(config)
    before = jax.tree.map(np.copy, params)
    first, second = pi0.prepare(params, config), pi0.prepare(params, config)
    jax.tree.map(np.testing.assert_array_equal, params, before)
    jax.tree.map(np.testing.assert_array_equal, first, second)
    assert first.schedule.times.shape == (10,)
    assert len(first.prefix) == len(first.expert) == 3
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), prepare(params, config), first)


@pytest.mark.parametrize("pi05", [True, *at_night(False)])
def test_a_gradient_reaches_every_parameter_that_matters(pi05):
    config = small(pi05)
    inputs = observation(config)

    def loss(params):
        v, _ = run(params, config, *inputs)
        return (v**2).sum()

    params = random_tree(config)
    gradient = traverse_util.flatten_dict(jax.jit(jax.grad(loss))(params), sep="/")
    assert set(gradient) == set(traverse_util.flatten_dict(params, sep="/"))
    for path, g in gradient.items():
        assert np.isfinite(g).all(), path
        if path == "PaliGemma/llm/final_norm/scale":  # the prefix's output is discarded
            assert not g.any()
        elif not path.endswith("key/bias"):  # shifts all logits of a row alike
            assert np.abs(g).max() > 1e-4, path
    # of the last prefix layer only keys and values are used; of the layers before it everything
    for name in ("attn/q_einsum/w", "attn/attn_vec_einsum/w", "mlp/gating_einsum", "mlp/linear", "pre_ffw_norm/scale"):
        by_layer = np.abs(gradient[f"PaliGemma/llm/layers/{name}"]).reshape(3, -1).max(1)
        assert (by_layer[:-1] > 0).all() and by_layer[-1] == 0, name
    for name in ("attn/kv_einsum/w", "pre_attention_norm/scale", "attn/q_einsum_1/w", "mlp_1/linear"):
        assert (np.abs(gradient[f"PaliGemma/llm/layers/{name}"]).reshape(3, -1).max(1) > 0).all(), name


def test_prepared_matrices_have_the_activation_dtype():
    config = small(dtype="bfloat16")
    weights = jax.eval_shape(lambda p: pi0.prepare(p, config), param_shapes(config))
    for layer in (*weights.prefix, *weights.expert):
        assert {a.dtype for a in (layer.qkv, layer.out, layer.gate_up, layer.down)} == {jnp.dtype(jnp.bfloat16)}
    # position embedding, flow times and action projections compute in float32
    for a in (weights.vision.positions, weights.vision.patch.w, weights.action_in.w, weights.schedule.times):
        assert a.dtype == jnp.float32
    v, segments = jax.eval_shape(lambda p: run(p, config, *observation(config)), param_shapes(config))
    assert segments[0].k.dtype == jnp.bfloat16
    assert v.shape == (2, 4, 5)


# The prefix


def dots(jaxpr):
    """Matrix products in a jaxpr, inner ones included."""
    count = 0
    for equation in jaxpr.eqns:
        count += equation.primitive.name == "dot_general"
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            count += dots(inner) if hasattr(inner, "eqns") else 0
    return count


def test_the_last_prefix_layer_computes_keys_and_values_only():
    config = small()
    weights = prepare(random_tree(config), config)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 7, 12)), jnp.float32)
    mask = jnp.ones((2, 7), bool)
    pos = pi0.positions(mask)
    products = lambda layers: dots(
        jax.make_jaxpr(lambda x: pi0.prefix_layers(weights, config, pi0.Rows(x, pos, mask), layers))(x).jaxpr
    )
    assert products(range(1, 2)) == 6  # qkv, q·k, p·v, out, gate_up, down
    assert products(range(2, 3)) == 1
    assert products(range(3)) == 13
    after, (segment,), logits = pi0.prefix_layers(weights, config, pi0.Rows(x, pos, mask), range(2, 3), (2,))
    assert after is x and logits == {}
    own = mask[:, :, None] & mask[:, None, :]
    _, (k, v), _ = gemma.layer(config.prefix, weights.prefix[2], x, gemma.rope(pos, 6), own)
    np.testing.assert_allclose(segment.k, k, atol=1e-6)
    np.testing.assert_allclose(segment.v, v, atol=1e-6)


def test_upright_matrices_compute_the_same():
    config = small()
    params = random_tree(config)
    plain, upright = prepare(params, config), pi0.prepare(params, config, upright=True)
    assert isinstance(upright.prefix[0].gate_up, Upright) and upright.prefix[0].gate_up.values.shape == (40, 12)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 7, 12)), jnp.float32)
    mask = jnp.ones((2, 7), bool)
    go = lambda weights: pi0.prefix_layers(weights, config, pi0.Rows(x, pi0.positions(mask), mask), range(2))[0]
    np.testing.assert_allclose(go(upright), go(plain), rtol=1e-5, atol=1e-5)
    as_int8 = [quantisation.reduce(weights, "int8").prefix for weights in (plain, upright)]
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), *as_int8)


def test_layer_ranges_compose():
    config = small()
    weights = prepare(random_tree(config), config)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 5, 12)), jnp.float32)
    mask = jnp.array([[True, True, False, True, True]])
    pos = pi0.positions(mask)
    assert pos.tolist() == [[0, 1, 1, 2, 3]]
    go = lambda x, layers: pi0.prefix_layers(weights, config, pi0.Rows(x, pos, mask), layers, (0, 1))
    whole, segments, logits = go(x, range(3))
    half, first, one = go(x, range(1))
    rest, second, two = go(half, range(1, 3))
    np.testing.assert_array_equal(rest, whole)
    jax.tree.map(np.testing.assert_array_equal, first + second, segments)
    assert set(one) == {0} and set(two) == {1} and set(logits) == {0, 1}
    assert logits[0].shape == (1, 4, 5, 5)


def test_prompt_tokens_are_scaled_by_the_root_of_the_width():
    config = small()
    params = random_tree(config)
    weights = prepare(params, config)
    table = params["PaliGemma"]["llm"]["embedder"]["input_embedding"]
    got = pi0.embed_prompt(weights, config, jnp.array([[3, 30]]))
    np.testing.assert_allclose(got[0], table[[3, 30]] * np.sqrt(12), rtol=1e-6)


def test_a_masked_camera_changes_nothing():
    config = small()
    params = random_tree(config)
    images, camera_mask, *rest = observation(config, B=2)
    camera_mask = np.array([[True, True, False], [True, False, True]])
    v, _ = go(params, config, images, camera_mask, *rest)
    other = images.copy()
    other[0, 2], other[1, 1] = 255 - other[0, 2], 0
    np.testing.assert_array_equal(go(params, config, other, camera_mask, *rest)[0], v)
    assert np.abs(go(params, config, 255 - images, camera_mask, *rest)[0] - v).max() > 1e-3
    # leaving it out is the same as masking it
    two = np.stack([images[0, [0, 1]], images[1, [0, 2]]])
    without = config.replace(cameras=config.cameras[:2])
    np.testing.assert_allclose(go(params, without, two, np.ones((2, 2), bool), *rest)[0], v, atol=2e-6)


def test_masked_prompt_slots_change_nothing():
    config = small()
    params = random_tree(config)
    images, camera_mask, tokens, token_mask, *rest = observation(config)
    v, _ = go(params, config, images, camera_mask, tokens, token_mask, *rest)
    other = np.where(token_mask, tokens, (tokens + 1) % config.vocab_size)
    np.testing.assert_array_equal(go(params, config, images, camera_mask, other, token_mask, *rest)[0], v)
    long = np.pad(token_mask, ((0, 0), (0, 3)))
    padded = go(params, config, images, camera_mask, np.pad(tokens, ((0, 0), (0, 3))), long, *rest)[0]
    np.testing.assert_allclose(padded, v, atol=2e-6)
