"""The two Gemma experts, layer by layer, over prepared weights.

Axes as in `arrays`. The residual stream keeps the activation dtype; norms, rotations, logits and softmax are
float32. Attention logits are a return value: whoever wants saliency reduces them (`tokens.saliency`), and XLA
removes them where nobody does.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from safe_pruner_jax.arrays import Array, beside
from safe_pruner_jax.model.config import GemmaConfig
from safe_pruner_jax.model.matrix import Matrix, Upright, columns, dense
from safe_pruner_jax.model.params import by_layer

MASKED = -2.3819763e38  # what openpi writes over masked logits; a fully masked row becomes uniform


@struct.dataclass
class LayerWeights:
    """One layer of one expert, ready to run.

    `gain1`/`gain2` [D] are 1 + scale of the two RMS norms, None in an adaptive expert. `qkv` [D, (N+2K)·H] and
    `gate_up` [D, 2F] are fused projections; `out` [N·H, D] and `down` [F, D] close the two branches. The matrices may
    be in 8 bits (`precision`), and `gate_up` upright (`upright_mlp`).
    """

    gain1: Array | None
    gain2: Array | None
    qkv: Matrix
    out: Matrix
    gate_up: Matrix | Upright
    down: Matrix


@struct.dataclass
class Modulation:
    """adaRMS of one layer: scale, shift, gate of both norms as [..., 3D], broadcast against [B, R, 3D]."""

    attn: "Array | Stacked"
    mlp: "Array | Stacked"


@struct.dataclass
class Stacked:
    """Adaptive norms of every layer in one float32 array, so that one row of it is all a denoise step reads.

    `values` [..., L, 2, 3, D]: of the norm before attention and before the MLP, 1 + scale, shift and gate. `of` gives
    those of one norm, [..., 3, D]. The same numbers as in `Modulation`, widened.
    """

    values: Array

    def of(self, layer: int) -> Modulation:
        """Both norms of a layer."""
        return Modulation(*(Stacked(self.values[..., layer, i, :, :]) for i in range(2)))


Place = Callable[[Array, Array], tuple[Array, Array]]
Attend = Callable[[Array, tuple["Segment", ...]], tuple[Array, Array | None]]
Gate = Callable[[Array, Matrix], Array]


@struct.dataclass
class Segment:
    """A run of keys and values: k, v [B, S, K, H], mask [B, 1 or R, S] bool."""

    k: Array
    v: Array
    mask: Array


def prepare_layers(
    tree: dict, c: GemmaConfig, suffix: str, dtype: jnp.dtype, upright: bool = False
) -> tuple[LayerWeights, ...]:
    """Per-layer weights from openpi's stacked tree (`PaliGemma/llm/layers`); pure and differentiable.

    One kind of matrix after the other, so that of a tree on disk one stack at a time is in memory.
    """
    attn, mlp = tree["attn"], tree[f"mlp{suffix}"]

    def fuse_heads(q: Array, kv: Array) -> Array:  # [N, D, H], [2, K, D, H]
        heads = jnp.concatenate([q, kv[0], kv[1]], axis=0).astype(dtype)  # [N+2K, D, H]
        return heads.transpose(1, 0, 2).reshape(c.width, -1)

    def fuse_gate(gating: Array) -> Array | Upright:  # [2, D, F]
        gate, up = gating.astype(dtype)
        return Upright(jnp.concatenate([gate.T, up.T])) if upright else jnp.concatenate([gate, up], axis=-1)

    def gains(name: str) -> list[Array | None]:
        # openpi writes 1 + scale in the parameters' dtype, but under jit XLA keeps it in float32
        norm = tree[f"{name}{suffix}"]
        return (
            by_layer(lambda s: 1 + jnp.asarray(s, jnp.float32), norm["scale"]) if "scale" in norm else [None] * c.depth
        )

    gate_up = by_layer(fuse_gate, mlp["gating_einsum"])
    down = by_layer(lambda w: jnp.asarray(w, dtype), mlp["linear"])
    qkv = by_layer(fuse_heads, attn[f"q_einsum{suffix}"]["w"], attn[f"kv_einsum{suffix}"]["w"])
    out = by_layer(lambda w: jnp.asarray(w, dtype).reshape(-1, c.width), attn[f"attn_vec_einsum{suffix}"]["w"])
    rows = zip(gains("pre_attention_norm"), gains("pre_ffw_norm"), qkv, out, gate_up, down, strict=True)
    return tuple(LayerWeights(*row) for row in rows)


def rope(positions: Array, head_dim: int) -> tuple[Array, Array]:
    """cos and sin [B, S, 1, H/2] in float32 for positions [B, S]; timescale_i = 10000^(2i/H)."""
    exponent = (2.0 / head_dim) * jnp.arange(head_dim // 2, dtype=jnp.float32)
    angle = positions[..., None].astype(jnp.float32) / beside(10_000**exponent, positions[..., None])
    return jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]


def _rotate(x: Array, cos_sin: tuple[Array, Array]) -> Array:
    cos, sin = cos_sin
    x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)


def rms_norm(x: Array, gain: Array | None = None, mod: Array | Stacked | None = None) -> tuple[Array, Array | float]:
    """RMS norm of x [B, S, D], and its gate: with a gain [D], or adaptive with mod [..., 3D] or `Stacked`."""
    f = x.astype(jnp.float32)
    f = f * jax.lax.rsqrt(jnp.mean(f * f, axis=-1, keepdims=True) + 1e-6)
    if isinstance(mod, Stacked):
        gain, shift, gate = (beside(mod.values[..., i, :], f) for i in range(3))
        return (f * gain + shift).astype(x.dtype), gate.astype(x.dtype)
    if mod is None:
        return (f * beside(gain, f)).astype(x.dtype), 1.0  # pyright: ignore[reportOperatorIssue]  without mod there is a gain
    scale, shift, gate = jnp.split(beside(mod, f), 3, axis=-1)
    return (f * (1 + scale).astype(f.dtype) + shift.astype(f.dtype)).astype(x.dtype), gate


def project_qkv(c: GemmaConfig, w: LayerWeights, x: Array, cos_sin: tuple[Array, Array]) -> tuple[Array, Array, Array]:
    """q [B, S, N, H] rotated and scaled by H^-1/2, k [B, S, K, H] rotated, v [B, S, K, H]."""
    N, K = c.num_heads, c.num_kv_heads
    heads = dense(x, w.qkv).reshape(*x.shape[:2], N + 2 * K, c.head_dim)
    q, k, v = jnp.split(heads, (N, N + K), axis=2)
    return _rotate(q, cos_sin) * c.head_dim**-0.5, _rotate(k, cos_sin), v


def attend(q: Array, segments: tuple[Segment, ...]) -> tuple[Array, Array]:
    """Grouped-query attention over the concatenated segments, without concatenating them.

    Args:
      q: [B, R, N, H].
      segments: keys and values; query head h reads kv head h // (N/K).

    Returns:
      [B, R, N·H] in q's dtype, and the masked float32 logits [B, N, R, sum of S].
    """
    B, R, N, H = q.shape
    K = segments[0].k.shape[2]
    G = N // K
    # the G heads of a group are rows of one product: their keys are the same
    q = q.reshape(B, R, K, G, H).swapaxes(1, 2).reshape(B, K, R * G, H)

    def scores(s: Segment) -> Array:
        x = jnp.einsum("bkxh,bskh->bkxs", q, s.k, preferred_element_type=jnp.float32)
        return jnp.where(s.mask[:, None, :, None], x.reshape(B, K, R, G, -1), MASKED)

    logits = [scores(s) for s in segments]
    logits = logits[0] if len(logits) == 1 else jnp.concatenate(logits, axis=-1)
    probs = jax.nn.softmax(logits, axis=-1).astype(q.dtype).reshape(B, K, R * G, -1)
    out, start = 0, 0
    for s in segments:
        stop = start + s.k.shape[1]
        out += jnp.einsum("bkxs,bskh->bkxh", probs[..., start:stop], s.v)
        start = stop
    out = out.reshape(B, K, R, G, H).swapaxes(1, 2).reshape(B, R, N * H)
    return out, logits.swapaxes(2, 3).reshape(B, N, R, -1)


def gate_and_up(x: Array, w: Matrix) -> Array:
    """gelu(x @ gate) · (x @ up) [..., F] of the fused matrix w [D, 2F]."""
    g, u = jnp.split(dense(x, w), 2, axis=-1)
    return jax.nn.gelu(g) * u


def upright_mlp(x: Array, gate_up: Upright, down: Matrix) -> Array:
    """`dense(gate_and_up(x, …), down)` [B, S, D] with rows and columns changed over in between.

    XLA's CPU product is faster with the wide matrix on its left (docs/performance.md).
    """
    g, u = jnp.split(gate_up.values @ x.reshape(-1, x.shape[-1]).T, 2)
    y = jax.lax.dot_general(jax.nn.gelu(g) * u, down, (((0,), (0,)), ((), ())))
    return y.reshape(x.shape)


def layer(
    c: GemmaConfig,
    w: LayerWeights,
    x: Array,
    cos_sin: tuple[Array, Array],
    mask: Array,
    cache: tuple[Segment, ...] = (),
    mod: Modulation | None = None,
    place: Place | None = None,
    attend: Attend = attend,
    gate_and_up: Gate = gate_and_up,
) -> tuple[Array, tuple[Array, Array], Array | None]:
    """One transformer block: x += gate · Attn(norm(x)); x += gate · MLP(norm(x)).

    Args:
      c: sizes of the expert.
      w: its weights.
      x: [B, S, D] in the activation dtype.
      cos_sin: rotation of these rows.
      mask: [B, 1 or S, keys] bool, which of the own (placed) keys a row may see.
      cache: keys and values of earlier tokens, seen before the own ones.
      mod: adaptive norms, None for plain ones.
      place: puts the own keys and values among others before anybody sees them; None: they are all there is.
      attend, gate_and_up: the two parts that a kernel may stand in for.

    Returns:
      x, the own (placed) (k, v) [B, S, K, H], and the attention logits [B, N, S, keys], cached keys first; None where
      `attend` does not tell them.
    """
    h, gate = rms_norm(x, w.gain1, None if mod is None else mod.attn)
    q, k, v = project_qkv(c, w, h, cos_sin)
    k, v = place(k, v) if place else (k, v)
    out, logits = attend(q, (*cache, Segment(k, v, mask)))
    x = x + gate * dense(out, w.out)
    h, gate = rms_norm(x, w.gain2, None if mod is None else mod.mlp)
    if isinstance(w.gate_up, Upright):
        x = x + gate * upright_mlp(h, w.gate_up, w.down)
    else:
        x = x + gate * dense(gate_and_up(h, w.gate_up), w.down)
    return x, (k, v), logits


def keys_and_values(c: GemmaConfig, w: LayerWeights, x: Array, cos_sin: tuple[Array, Array]) -> tuple[Array, Array]:
    """Only k and v [B, S, K, H] of a layer: all that the last prefix layer is needed for."""
    h, _ = rms_norm(x, w.gain1)
    kv = dense(h, columns(w.qkv, c.num_heads * c.head_dim)).reshape(*x.shape[:2], 2 * c.num_kv_heads, c.head_dim)
    k, v = jnp.split(kv, 2, axis=2)
    return _rotate(k, cos_sin), v
