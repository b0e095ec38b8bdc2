"""The model's parts against slow NumPy, and flow times against openpi's."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles.attention import slow_attention
from small_model import observation, prepare, random_tree, small

from safe_pruner_jax.model import gemma, pi0, siglip
from safe_pruner_jax.model.config import SiglipConfig

DATA = Path(__file__).parent / "data"


# Helpers against slow NumPy


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
