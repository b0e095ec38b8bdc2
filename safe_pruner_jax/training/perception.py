"""What a policy that sees is asked beside acting: small heads that live beside the model, and their losses.

    heads = init_heads(config, kinds)
    looks = look(params, config, batch)           one prefix pass and everything that is read from it
    losses = {name: LOSSES[name](looks, batch) for name in …}

Each loss stands for a kind of data that π0.5's lineage was trained on: SigLIP (names), PaliGemma's detection,
segmentation and pointing (cells, mask, offset, place), π0.5's own object localisation (way). Heads are dropped when a
checkpoint is exported. Attention is supervised in middle layers only, so that what SAFE reads (layer 2, the expert's
late layers) is never trained directly.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from safe_pruner_jax.arrays import Array, beside
from safe_pruner_jax.libero.labels import CLASSES
from safe_pruner_jax.model import flow, pi0, siglip
from safe_pruner_jax.model.config import Pi0Config
from safe_pruner_jax.model.params import Params
from safe_pruner_jax.training.scenes import CELLS, UNIT, SceneBatch, Vocabulary

HEADS = "heads"
"""Entry of the parameters while they train."""
CUT = 3
"""Layers before SAFE's cut: masks are read behind it as well as from the last hidden rows."""


def supervised_layers(depth: int) -> tuple[int, ...]:
    """Layers whose attention is supervised: the middle, 8 to 11 of 18."""
    return tuple(range(round(depth * 8 / 18), round(depth * 12 / 18)))


def init_heads(config: Pi0Config, kinds: int, seed: int = 1) -> Params:
    """Linear read-outs, small and random, for scenes with so many kinds of things."""
    rng, d = np.random.default_rng(seed), config.prefix.width
    values = config.depth * config.prefix.num_kv_heads * config.prefix.head_dim
    sizes = {
        "cells": (d, CELLS**2 * (len(CLASSES) + kinds)),
        "offset": (d, 3),
        "place": (d, 3),
        "mask_cut": (d, 1),
        "mask": (d, 1),
        "way": (values, 6),
        "held": (values, 1),
        "turn": (values, 2),
    }
    linear = lambda shape: {
        "kernel": (0.02 * rng.standard_normal(shape)).astype(np.float32),
        "bias": np.zeros(shape[1], np.float32),
    }
    nothing = (0.02 * rng.standard_normal((1, d))).astype(np.float32)
    heads = {name: linear(shape) for name, shape in sizes.items()}
    return heads | {"names": {"nothing": nothing, "log_scale": np.full((1,), 2.0, np.float32)}}


@struct.dataclass
class Looks:
    """What is read from one batch; float32, B frames, n visual tokens.

    Args:
      cells: [B, n, 4, classes] logits.
      names: [B, n, 1 + kinds] logits, 0 for none.
      offset, place: [B, n, 3].
      mask_cut, mask: [B, n] logits, behind the cut and at the end.
      attention: [B, layers, n], text rows → visual tokens in the supervised layers, a distribution.
      way: [B, 6]; held: [B] logit; turn: [B, 2].
      prefix: for the flow loss.
    """

    cells: Array
    names: Array
    offset: Array
    place: Array
    mask_cut: Array | None = None
    mask: Array | None = None
    attention: Array | None = None
    way: Array | None = None
    held: Array | None = None
    turn: Array | None = None
    prefix: flow.Prefix | None = None


def look(params: Params, config: Pi0Config, batch: SceneBatch, images: Array, words: Vocabulary) -> Looks:
    """The whole prefix of a batch (`images` may be augmented) and all read-outs."""
    heads = params[HEADS]
    weights = pi0.prepare({k: v for k, v in params.items() if k != HEADS}, config)
    B, C = images.shape[:2]
    n, middle = C * config.tokens_per_camera, supervised_layers(config.depth)
    rows = pi0.embed_prefix(weights, config, images, jnp.ones((B, C), bool), batch.tokens, batch.token_mask)
    early, first, _ = pi0.prefix_layers(weights, config, rows, range(CUT))
    late, rest, logits = pi0.prefix_layers(weights, config, rows.replace(x=early), range(CUT, config.depth), middle)
    segments = first + rest
    share = batch.token_mask / batch.token_mask.sum(1, keepdims=True)
    values = [jnp.einsum("bt,btkh->bkh", share, s.v[:, n:].astype(jnp.float32)).reshape(B, -1) for s in segments]
    read = jnp.concatenate(values, axis=1)
    attention = [jax.nn.softmax(logits[i][:, :, n:, :n].astype(jnp.float32), -1).mean(1) for i in middle]
    seen = _dense_looks(heads, weights.embedding, rows.x[:, :n], words)
    return seen.replace(
        mask_cut=_affine(heads["mask_cut"], _unit(early[:, :n]))[..., 0],
        mask=_affine(heads["mask"], _unit(late[:, :n]))[..., 0],
        attention=jnp.stack([jnp.einsum("bt,btv->bv", share, a) for a in attention], axis=1),
        way=_affine(heads["way"], read),
        held=_affine(heads["held"], read)[..., 0],
        turn=_affine(heads["turn"], read),
        prefix=flow.Prefix(segments, rows.count, weights),
    )


def glance(params: Params, config: Pi0Config, images: Array, words: Vocabulary) -> Looks:
    """The vision tower alone: four times cheaper than `look`."""
    gemma = params["PaliGemma"]
    tower = siglip.prepare(gemma["img"], config, jnp.dtype(config.dtype))
    B, C = images.shape[:2]
    z = siglip.encode(tower, config, images.reshape(B * C, *images.shape[2:]))
    z = z.reshape(B, C * z.shape[1], -1)
    return _dense_looks(params[HEADS], jnp.asarray(gemma["llm"]["embedder"]["input_embedding"]), z, words)


def _dense_looks(heads: Params, embedding: Array, z: Array, words: Vocabulary) -> Looks:
    """Read-outs of every visual token."""
    z = _unit(z)
    share = words.names_mask / words.names_mask.sum(1, keepdims=True)
    names = jnp.einsum("kt,ktd->kd", share, embedding.astype(jnp.float32)[words.names])
    names = _unit(jnp.concatenate([heads["names"]["nothing"], names]), 1e-9)
    scale = jnp.exp(heads["names"]["log_scale"][0]) / z.shape[-1]
    cells = _affine(heads["cells"], z)
    return Looks(
        cells=cells.reshape(*z.shape[:2], CELLS**2, -1),
        names=jnp.einsum("bnd,kd->bnk", z, names) * scale,
        offset=_affine(heads["offset"], z),
        place=_affine(heads["place"], z),
    )


def _affine(head: Params, x: Array) -> Array:
    y = x @ head["kernel"]
    return y + beside(head["bias"], y)


def _unit(x: Array, eps: float = 1e-6) -> Array:
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps)


# --- losses -------------------------------------------------------------------------------------------------


def _mean(values: Array, weights: Array) -> Array:
    return (values * weights).sum() / (weights.sum() + 1e-3)


def _huber(error: Array) -> Array:
    """Quadratic up to 0.5, linear beyond; summed over the last axis, in units of its slope."""
    return 2 * optax.huber_loss(error, delta=0.5).sum(-1)


def cells(looks: Looks, batch: SceneBatch) -> Array:
    """Class of every cell of every patch (segmentation, as PaliGemma has it); the background counts a fifth."""
    ce = optax.softmax_cross_entropy_with_integer_labels(looks.cells, batch.cells)
    return _mean(ce, jnp.where(batch.cells == 0, 0.2, jnp.where(batch.cells == 1, 0.5, 1.0)))


def names(looks: Looks, batch: SceneBatch) -> Array:
    """Visual tokens against the mean word embedding of each kind's name, as SigLIP aligns pictures and words."""
    ce = optax.softmax_cross_entropy_with_integer_labels(looks.names, batch.thing)
    return _mean(ce, jnp.where(batch.thing == 0, 0.15, 1.0))


def offset(looks: Looks, batch: SceneBatch) -> Array:
    """Hand → thing in every patch that shows one, in the hand's frame."""
    return _mean(_huber(looks.offset - batch.offset), batch.offset_weight)


def place(looks: Looks, batch: SceneBatch) -> Array:
    """Where the thing in a patch of the outside camera is in the world."""
    return _mean(_huber(looks.place - batch.place), batch.place_weight)


def mask_cut(looks: Looks, batch: SceneBatch) -> Array:
    """Which patches are the named object (referring segmentation), read behind the cut."""
    return _mask(looks.mask_cut, batch.mask)


def mask(looks: Looks, batch: SceneBatch) -> Array:
    """The same from the last hidden rows."""
    return _mask(looks.mask, batch.mask)


def _mask(logits: Array, target: Array) -> Array:
    bce = optax.sigmoid_binary_cross_entropy(logits, target)
    return 2 * (bce * jnp.where(target > 0.05, 4.0, 1.0)).mean()


def attention(looks: Looks, batch: SceneBatch) -> Array:
    """Cross-entropy of the text rows' attention in the middle layers against soft targets."""
    return -(batch.attention[:, None] * jnp.log(looks.attention + 1e-4)).sum(-1).mean()


def way(looks: Looks, batch: SceneBatch) -> Array:
    """Hand → named object and hand → receptacle, from the values of the prompt's tokens."""
    return _huber(looks.way - batch.way).mean()


def held(looks: Looks, batch: SceneBatch) -> Array:
    """Whether the named object is in the hand."""
    return optax.sigmoid_binary_cross_entropy(looks.held, batch.held).mean()


def turn(looks: Looks, batch: SceneBatch) -> Array:
    """How far the hand has to turn, as cosine and sine of the doubled angle."""
    return _mean(_huber(looks.turn - batch.turn), batch.turn_weight)


LOSSES: dict[str, Callable[[Looks, SceneBatch], Array]] = {
    f.__name__: f for f in (cells, names, offset, place, mask_cut, mask, attention, way, held, turn)
}
"""Every loss by its name."""


# --- measures -----------------------------------------------------------------------------------------------


def measures(looks: Looks, batch: SceneBatch) -> dict[str, Array]:
    """What the gates are about: shares, intersection over union, centimetres, degrees."""
    objects = batch.thing > 0
    away = lambda error: 100 * UNIT * jnp.linalg.norm(error, axis=-1)
    right = looks.cells.argmax(-1) == batch.cells
    shown = batch.cells >= 3
    half = looks.offset.shape[1] // 2
    wrist = lambda x: x[:, half:]
    result = {
        "cell_accuracy": _mean(right, shown),
        "name_accuracy": _mean(looks.names.argmax(-1) == batch.thing, objects),
        "offset_wrist_cm": _mean(wrist(away(looks.offset - batch.offset)), wrist(batch.offset_weight)),
        "place_cm": _mean(away(looks.place - batch.place), batch.place_weight),
    }
    if looks.way is None:
        return result
    target, near = away((looks.way - batch.way)[:, :3]), jnp.linalg.norm(batch.way[:, :2], axis=-1) * UNIT < 0.05
    angle = jnp.abs(jnp.angle((looks.turn[:, 0] + 1j * looks.turn[:, 1]) / (batch.turn[:, 0] + 1j * batch.turn[:, 1])))
    named = batch.mask > 0.3
    iou = lambda logits: ((logits > -0.6) & named).sum() / jnp.maximum(((logits > -0.6) | named).sum(), 1)
    mass = (looks.attention * (batch.mask > 0.15)[:, None]).sum(-1).mean()
    return result | {
        "iou_cut": iou(looks.mask_cut),
        "iou": iou(looks.mask),
        "target_cm": jnp.median(target),
        "near_cm": _mean(target, near),
        "basket_cm": jnp.median(away((looks.way - batch.way)[:, 3:])),
        "turn_deg": _mean(jnp.rad2deg(angle) / 2, batch.turn_weight),
        "held_accuracy": ((looks.held > 0) == (batch.held > 0.5)).mean(),
        "target_mass": mass,
    }
