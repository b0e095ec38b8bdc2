"""The model's parts against slow NumPy, its parameter tree against openpi's, and what `prepare` promises."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from safe_pruner_jax.model import gemma, pi0, siglip
from safe_pruner_jax.model.config import GemmaConfig, Pi0Config, SiglipConfig, mini
from safe_pruner_jax.model.config import pi0 as pi0_config
from safe_pruner_jax.model.config import pi05 as pi05_config
from safe_pruner_jax.model.params import param_shapes, spec

DATA = Path(__file__).parent / "data"


def small(pi05=True, **changes):
    """4 tokens per camera, 3 layers, 2 kv heads."""
    config = Pi0Config(
        pi05,
        prefix=GemmaConfig(12, 3, 20, 4, 2, 6),
        expert=GemmaConfig(8, 3, 16, 4, 2, 6),
        vision=SiglipConfig(10, 1, 14, 2),
        vocab_size=31,
        action_dim=5,
        action_horizon=4,
        max_token_len=6,
        image_size=28,
        dtype="float32",
    )
    return config.replace(**changes)


def random_tree(config, seed=0):
    """Parameters without a zero or one among them: initial norms and biases would hide mistakes."""
    rng = np.random.default_rng(seed)

    def leaf(path, a):
        mean = float("img" in path and path.endswith("scale"))
        return (mean + 0.3 * rng.standard_normal(a.shape)).astype(np.float32)

    flat = traverse_util.flatten_dict(param_shapes(config), sep="/")
    return traverse_util.unflatten_dict({path: leaf(path, a) for path, a in flat.items()}, sep="/")


def observation(config, B=2, seed=0):
    """images, camera_mask, tokens, token_mask, state, noise; the last robot has all cameras and a full prompt."""
    rng, C, T = np.random.default_rng(seed), len(config.cameras), config.max_token_len
    camera_mask = np.ones((B, C), bool)
    camera_mask[:-1, -1] = False
    lengths = np.linspace(2, T, B).astype(int)
    return (
        rng.integers(0, 256, (B, C, config.image_size, config.image_size, 3), np.uint8),
        camera_mask,
        rng.integers(0, config.vocab_size, (B, T)).astype(np.int32),
        np.arange(T) < lengths[:, None],
        rng.standard_normal((B, config.action_dim)).astype(np.float32),
        rng.standard_normal((B, config.action_horizon, config.action_dim)).astype(np.float32),
    )


def run(params, config, images, camera_mask, tokens, token_mask, state, noise):
    """Velocity at t = 1 and the keys and values of every layer, from raw parameters."""
    weights = pi0.prepare(params, config, num_steps=3)
    z = pi0.embed_images(weights, config, images)
    x = jnp.concatenate([z, pi0.embed_prompt(weights, config, tokens)], axis=1)
    mask = jnp.concatenate([jnp.repeat(camera_mask, config.tokens_per_camera, 1), token_mask], axis=1)
    _, segments, _ = pi0.prefix_layers(weights, config, x, pi0.positions(mask), mask, range(config.depth))
    at = jax.tree.map(lambda a: a[0], weights.schedule)
    v, _ = pi0.velocity(weights, config, segments, mask.sum(1), state, noise, at)
    return v, segments


go = jax.jit(run, static_argnums=1)  # compiled once for all tests
prepare = jax.jit(pi0.prepare, static_argnums=1)


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


@pytest.mark.parametrize("pi05", [True, False])
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
        jax.make_jaxpr(lambda x: pi0.prefix_layers(weights, config, x, pos, mask, layers))(x).jaxpr
    )
    assert products(range(1, 2)) == 6  # qkv, q·k, p·v, out, gate_up, down
    assert products(range(2, 3)) == 1
    assert products(range(3)) == 13
    after, (segment,), logits = pi0.prefix_layers(weights, config, x, pos, mask, range(2, 3), (2,))
    assert after is x and logits == {}
    own = mask[:, :, None] & mask[:, None, :]
    _, (k, v), _ = gemma.layer(config.prefix, weights.prefix[2], x, gemma.rope(pos, 6), own)
    np.testing.assert_allclose(segment.k, k, atol=1e-6)
    np.testing.assert_allclose(segment.v, v, atol=1e-6)


def test_layer_ranges_compose():
    config = small()
    weights = prepare(random_tree(config), config)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 5, 12)), jnp.float32)
    mask = jnp.array([[True, True, False, True, True]])
    pos = pi0.positions(mask)
    assert pos.tolist() == [[0, 1, 1, 2, 3]]
    go = lambda x, layers: pi0.prefix_layers(weights, config, x, pos, mask, layers, (0, 1))
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


# Helpers against slow NumPy


def slow_attention(q, k, v, mask):
    """q [R, N, H], k, v [S, K, H], mask [R, S] → [R, N, H]."""
    R, N, H = q.shape
    out = np.zeros((R, N, H))
    for r in range(R):
        for n in range(N):
            kv = n // (N // k.shape[1])
            logits = np.array([q[r, n] @ k[s, kv] if mask[r, s] else -2.3819763e38 for s in range(len(k))])
            p = np.exp(logits - logits.max())
            out[r, n] = (p / p.sum()) @ v[:, kv]
    return out


def random_arrays(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(s).astype(np.float32) for s in shapes]


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_grouped_attention_over_two_segments(kv_heads):
    B, R, N, H, S1, S2 = 2, 3, 6, 4, 5, 3
    q, k1, v1, k2, v2 = random_arrays(0, (B, R, N, H), *[(B, S1, kv_heads, H)] * 2, *[(B, S2, kv_heads, H)] * 2)
    rng = np.random.default_rng(1)
    m1, m2 = rng.random((B, 1, S1)) < 0.6, rng.random((B, R, S2)) < 0.6
    m2[..., 0] = True
    first, second = gemma.Segment(k1, v1, m1), gemma.Segment(k2, v2, m2)
    both = np.concatenate([np.broadcast_to(m1, (B, R, S1)), m2], axis=-1)
    k, v = np.concatenate([k1, k2], 1), np.concatenate([v1, v2], 1)
    got, logits = gemma.attend(jnp.asarray(q), (first, second))
    one, same = gemma.attend(jnp.asarray(q), (gemma.Segment(k, v, both),))
    assert got.shape == (B, R, N * H) and logits.shape == (B, N, R, S1 + S2)
    np.testing.assert_allclose(got, one, atol=1e-6)
    np.testing.assert_allclose(logits, same, rtol=1e-6, atol=1e-6)
    for b in range(B):
        want = slow_attention(q[b].astype(float), k[b], v[b], both[b])
        np.testing.assert_allclose(got[b], want.reshape(R, -1), atol=1e-6)
    visible = np.broadcast_to(both[:, None], logits.shape)
    assert (np.asarray(logits)[~visible] < -1e38).all()
    n, kv = 4, 4 // (N // kv_heads)
    raw = np.einsum("brh,bsh->brs", q[:, :, n], k[:, :, kv])
    np.testing.assert_allclose(logits[:, n][both], raw[both], atol=1e-5)


def test_a_row_that_sees_nothing_is_uniform_over_all_keys():
    q, k, v = random_arrays(0, (1, 2, 2, 4), (1, 5, 1, 4), (1, 5, 1, 4))
    mask = np.array([[[False] * 5, [True] * 5]])
    out, _ = gemma.attend(jnp.asarray(q), (gemma.Segment(k, v, mask),))
    np.testing.assert_allclose(np.asarray(out)[0, 0].reshape(2, 4), np.tile(v[0, :, 0].mean(0), (2, 1)), atol=1e-6)


def test_rope_turns_pairs_of_halves():
    (x,) = random_arrays(0, (2, 3, 1, 6))
    positions = np.array([[0, 1, 965], [7, 7, 500]])
    got = np.asarray(gemma._rotate(jnp.asarray(x), gemma.rope(jnp.asarray(positions), 6)))
    for b, s in np.ndindex(2, 3):
        for i in range(3):
            turn = np.exp(1j * positions[b, s] / 10_000 ** (2 * i / 6))
            want = (x[b, s, 0, i] + 1j * x[b, s, 0, i + 3]) * turn
            np.testing.assert_allclose(got[b, s, 0, [i, i + 3]], [want.real, want.imag], atol=1e-4)
    np.testing.assert_array_equal(got[0, 0], x[0, 0])


def test_projections_are_the_stored_matrices():
    """q is rotated and scaled by 1/√H, k rotated only, v neither; head order as in the tree."""
    config = small()
    params = random_tree(config)
    attn = params["PaliGemma"]["llm"]["layers"]["attn"]
    w = prepare(params, config).prefix[1]
    (x,) = random_arrays(0, (1, 3, 12))
    still = gemma.rope(jnp.zeros((1, 3), jnp.int32), 6)
    q, k, v = gemma.project_qkv(config.prefix, w, jnp.asarray(x), still)
    for n in range(4):
        np.testing.assert_allclose(q[0, :, n], x[0] @ attn["q_einsum"]["w"][1, n] / np.sqrt(6), atol=1e-5)
    for n in range(2):
        np.testing.assert_allclose(k[0, :, n], x[0] @ attn["kv_einsum"]["w"][1, 0, n], atol=1e-5)
        np.testing.assert_allclose(v[0, :, n], x[0] @ attn["kv_einsum"]["w"][1, 1, n], atol=1e-5)
    turned = gemma.project_qkv(config.prefix, w, jnp.asarray(x), gemma.rope(jnp.array([[4, 5, 9]]), 6))
    assert np.abs(turned[0] - q).max() > 0.1 and np.abs(turned[1] - k).max() > 0.1
    np.testing.assert_array_equal(turned[2], v)


def test_rms_norm_plain_and_adaptive():
    x, gain, mod = random_arrays(0, (2, 3, 5), (5,), (2, 1, 15))
    root = np.sqrt((x.astype(float) ** 2).mean(-1, keepdims=True) + 1e-6)
    plain, gate = gemma.rms_norm(jnp.asarray(x), gain)
    np.testing.assert_allclose(plain, x / root * gain, atol=1e-6)
    assert gate == 1.0
    adaptive, gate = gemma.rms_norm(jnp.asarray(x), None, mod)
    np.testing.assert_allclose(adaptive, x / root * (1 + mod[..., :5]) + mod[..., 5:10], atol=1e-5)
    np.testing.assert_array_equal(gate, mod[..., 10:])
    tiny, _ = gemma.rms_norm(jnp.full((1, 1, 4), 1e-3), np.ones(4, np.float32))
    np.testing.assert_allclose(tiny, np.sqrt(0.5), rtol=1e-5)  # ε = 1e-6 is inside the root
    half, _ = gemma.rms_norm(jnp.asarray(x, jnp.bfloat16), gain)
    assert half.dtype == jnp.bfloat16


def test_the_vision_tower_against_loops():
    config = small(vision=SiglipConfig(10, 2, 14, 2))
    tree = jax.tree.map(lambda a: np.asarray(a, np.float64), random_tree(config)["PaliGemma"]["img"])
    stack = tree["Transformer"]["encoderblock"]
    images = observation(config)[0][0, :2]

    def norm(x, p, i=...):
        mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return (x - mean) / np.sqrt(var + 1e-6) * p["scale"][i] + p["bias"][i]

    gelu = lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    want = []
    for image in images / 255 * 2 - 1:
        patches = [image[14 * r : 14 * r + 14, 14 * c : 14 * c + 14] for r in range(2) for c in range(2)]
        x = np.array([np.tensordot(p, tree["embedding"]["kernel"], 3) for p in patches])
        x = x + tree["embedding"]["bias"] + tree["pos_embedding"][0]
        for i in range(2):
            h, attn = norm(x, stack["LayerNorm_0"], i), stack["MultiHeadDotProductAttention_0"]
            project = lambda m, h=h, attn=attn, i=i: np.tensordot(h, attn[m]["kernel"][i], 1) + attn[m]["bias"][i]
            q, k, v = project("query"), project("key"), project("value")
            heads = slow_attention(q / np.sqrt(5), k, v, np.ones((4, 4), bool))
            x = x + np.einsum("snh,nhd->sd", heads, attn["out"]["kernel"][i]) + attn["out"]["bias"][i]
            h, mlp = norm(x, stack["LayerNorm_1"], i), stack["MlpBlock_0"]
            up = gelu(h @ mlp["Dense_0"]["kernel"][i] + mlp["Dense_0"]["bias"][i])
            x = x + up @ mlp["Dense_1"]["kernel"][i] + mlp["Dense_1"]["bias"][i]
        x = norm(x, tree["Transformer"]["encoder_norm"])
        want.append(x @ tree["head"]["kernel"] + tree["head"]["bias"])
    weights = prepare(random_tree(config), config).vision
    got = jax.jit(siglip.encode, static_argnums=1)(weights, config, images)
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_suffix_rows_see_what_openpi_lets_them_see():
    assert pi0.suffix_mask(small()).all() and pi0.suffix_mask(small()).shape == (1, 4, 4)
    mask = pi0.suffix_mask(small(pi05=False))
    assert mask.shape == (1, 5, 5)
    assert mask[0, 0].tolist() == [True] + [False] * 4  # the state row sees itself
    assert mask[0, 1:].all()


# Time


@pytest.mark.parametrize("name", ["openpi_pi05_tiny", "openpi_pi0_tiny"])
def test_flow_times_and_their_embedding_are_openpis(name):
    with np.load(DATA / f"{name}.npz") as file:
        times, embedding = file["posemb/t"], file["posemb/f64_rounded"]
        native = file["posemb/eager_f32"]
    np.testing.assert_array_equal(pi0.euler_times(10), times)
    got = pi0.time_embedding(times, embedding.shape[1])
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, embedding, rtol=0, atol=2e-7)
    np.testing.assert_allclose(got, native, rtol=0, atol=5e-4)


@pytest.mark.parametrize("steps", [1, 3, 5, 10, 50])
def test_flow_times_are_accumulated_in_float32(steps):
    times = pi0.euler_times(steps)
    assert times.dtype == np.float32 and len(times) == steps and times[0] == 1
    np.testing.assert_allclose(times, 1 - np.arange(steps) / steps, atol=1e-5)
    assert (times[1:] == times[:-1] + np.float32(-1 / steps)).all()


def test_the_schedule_is_the_time_mlp_and_every_adaptive_norm():
    config = small()
    params = random_tree(config)
    schedule = pi0.schedule(params, config, [1.0, 0.3])
    swish = lambda x: x / (1 + np.exp(-x))
    dense = lambda name, x: x @ params[name]["kernel"] + params[name]["bias"]
    cond = swish(dense("time_mlp_out", swish(dense("time_mlp_in", pi0.time_embedding([1.0, np.float32(0.3)], 8)))))
    np.testing.assert_allclose(schedule.cond, cond, atol=1e-5)
    layers = params["PaliGemma"]["llm"]["layers"]
    for i, mod in enumerate(schedule.mods):
        for got, name in ((mod.attn, "pre_attention_norm_1"), (mod.mlp, "pre_ffw_norm_1")):
            m = layers[name]["Dense_0"]
            np.testing.assert_allclose(got, cond @ m["kernel"][i] + m["bias"][i], atol=1e-5)
    assert schedule.mix is None
    assert pi0.schedule(random_tree(small(False)), small(False), [1.0]).mods is None
