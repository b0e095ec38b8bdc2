"""A policy that sees, in the stages of π0.5's lineage: align, refer, act, correct.

    train_stage("align", config, Scenes(…), params, settings, out)

| stage | what is learned | as in |
| --- | --- | --- |
| align | vision tower: what and where, per patch | SigLIP |
| refer | prefix: which of the things is named, and where | PaliGemma |
| act | flow matching on the expert, beside it the stage before at lower weight | π0.5 |
| correct | the same on states that the policy visits (DAgger, Ross et al. 2011) | |

Every stage starts from the weights of the one before and writes `out/<stage>/weights.npz`, heads included; losses and
gates go to `out/<stage>/metrics.jsonl`. A run that is stopped goes on from its last checkpoint.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from safe_pruner_jax.arrays import Array
from safe_pruner_jax.model import flow
from safe_pruner_jax.model.config import Pi0Config
from safe_pruner_jax.model.params import Params, draw_params
from safe_pruner_jax.training import perception
from safe_pruner_jax.training.augment import augment
from safe_pruner_jax.training.loop import Objective, Settings, fit
from safe_pruner_jax.training.scenes import SceneBatch, Scenes

FLOW = "flow"
"""Name of the flow-matching loss in `WEIGHTS`; `attention` and it are the ones that differ between policies."""

_SEES = {"cells": 1.0, "names": 0.5, "offset": 0.7, "place": 1.0}
_REFERS = {"mask_cut": 1.0, "mask": 1.0, "way": 1.0, "held": 0.3, "turn": 0.3, "attention": 0.3}
WEIGHTS: dict[str, dict[str, float]] = {
    "align": _SEES,
    "refer": _SEES | _REFERS,
    "act": {name: weight / 2 for name, weight in (_SEES | _REFERS).items()} | {FLOW: 1.0},
    "correct": {name: weight / 4 for name, weight in (_SEES | _REFERS).items()} | {FLOW: 1.0, "attention": 0.0},
}
"""Loss weights by stage; a loss of weight 0 is not computed into the gradient."""
STAGES = tuple(WEIGHTS)


@dataclasses.dataclass(frozen=True)
class SceneSource:
    """Batches for `fit`: random ones for training, fixed ones for validation.

    Args:
      scenes: frames.
      batch: samples per step.
      acting: whether the checks are of frames with actions.
      refresh_every: batches after which new files are looked for.
    """

    scenes: Scenes
    batch: int
    acting: bool
    refresh_every: int = 300

    def batches(self, seed: int, start: int) -> Iterator[SceneBatch]:
        """Endless batches; batch k depends on the seed, k, and the files there are."""
        step = start
        while True:
            if step % self.refresh_every == 0:
                self.scenes.refresh()
            yield self.scenes.draw(np.random.default_rng([seed, step]), self.batch)
            step += 1

    def checks(self) -> list[SceneBatch]:
        """Held-out batches."""
        return self.scenes.checks(32, 8, self.acting)


def initial(config: Pi0Config, kinds: int, seed: int = 0) -> Params:
    """Random parameters with heads, drawn so that eighteen narrow layers learn at once.

    Matrices that close a residual branch are scaled by 1/√(2L) (GPT-2's rule), and the expert's adaptive norms start
    with open gates: at openpi's zeros the expert is the identity, which a fine-tuned checkpoint can afford.
    """
    params = flatten_dict(draw_params(config, seed), sep="/")
    for path in params:
        if path.endswith(("attn_vec_einsum/w", "attn_vec_einsum_1/w", "mlp/linear", "mlp_1/linear")):
            params[path] = params[path] * (2 * config.depth) ** -0.5
        if path.endswith("norm_1/Dense_0/bias") and "final" not in path:
            width = params[path].shape[-1] // 3
            params[path][..., 2 * width :] = 0.5
    heads = perception.init_heads(config, kinds)
    return unflatten_dict(params, sep="/") | {perception.HEADS: heads}


def fit_heads(params: Params, config: Pi0Config, kinds: int) -> Params:
    """The same parameters; heads whose size depends on how many kinds there are, and does not fit, are drawn anew."""
    anew, old = perception.init_heads(config, kinds), params[perception.HEADS]
    fits = lambda name: jax.tree.map(np.shape, old[name]) == jax.tree.map(np.shape, anew[name])
    return params | {perception.HEADS: {name: old[name] if fits(name) else anew[name] for name in anew}}


def objective(config: Pi0Config, scenes: Scenes, weights: Mapping[str, float], s: Settings) -> Objective:
    """The losses of a stage, and what its gates measure."""
    weights = {name: weight for name, weight in weights.items() if weight}
    alone = not set(weights) - set(_SEES)
    words = scenes.vocabulary

    def seen(params: Params, batch: SceneBatch, key: Array | None) -> perception.Looks:
        images = batch.images if key is None or not s.augment else augment(key, batch.images, moving=(True, True))
        if alone:
            return perception.glance(params, config, images, words)
        return perception.look(params, config, batch, images, words)

    def evaluate(params: Params, batch: SceneBatch, key: Array, train: bool) -> tuple[dict, perception.Looks]:
        for_images, for_flow = jax.random.split(key)
        looks = seen(params, batch, for_images if train else None)
        values = {name: perception.LOSSES[name](looks, batch) for name in weights if name != FLOW}
        if FLOW in weights:
            values[FLOW] = acting(params, config, batch, looks.prefix, for_flow, s.draws)
        return values, looks

    def losses(params: Params, batch: SceneBatch, key: Array) -> dict[str, Array]:
        return evaluate(params, batch, key, True)[0]

    def measures(params: Params, batch: SceneBatch, key: Array) -> dict[str, Array]:
        values, looks = evaluate(params, batch, key, False)
        return values | perception.measures(looks, batch)

    return Objective(losses, measures, weights)


def acting(params: Params, config: Pi0Config, batch: SceneBatch, prefix: flow.Prefix, key: Array, draws: int) -> Array:
    """Flow-matching loss of the frames whose actions are labels of their prompt."""
    for_times, for_noise = jax.random.split(key)
    B = batch.actions.shape[0]
    times = flow.draw_times(for_times, (B, draws))
    noise = jax.random.normal(for_noise, (B, draws, *batch.actions.shape[1:]))
    model = {name: leaf for name, leaf in params.items() if name != perception.HEADS}
    state = jnp.zeros((B, config.action_dim))
    loss = flow.flow_loss(model, config, prefix, state, batch.actions, times=times, noise=noise).mean((1, 2))
    return (loss * batch.acts).sum() / jnp.maximum(batch.acts.sum(), 1.0)


def train_stage(
    stage: str,
    config: Pi0Config,
    scenes: Scenes,
    params: Params,
    s: Settings,
    out: Path,
    *,
    weights: Mapping[str, float] | None = None,
    on_log: Callable[[dict[str, Any]], None] = lambda row: None,
) -> tuple[Params, int]:
    """Trains one stage, or goes on with it.

    Args:
      stage: name in `STAGES`.
      config: model; scenes are of its image size.
      scenes: frames.
      params: weights of the stage before, heads included; ignored where the stage has a checkpoint.
      s: settings of the loop.
      out: folder of the run; the stage's is inside.
      weights: of the losses instead of the stage's.
      on_log: called with every row of the log.

    Returns:
      Averaged parameters with heads, and the number of steps they have seen.
    """
    weights = WEIGHTS[stage] if weights is None else weights
    source = SceneSource(scenes, s.batch, FLOW in weights)
    params, step = fit(objective(config, scenes, weights, s), source, params, s, out / stage, on_log=on_log)
    save_weights(out / stage / "weights.npz", params)
    return params, step


def save_weights(path: Path, params: Params) -> None:
    """Parameters with heads in one file, which appears when it is complete."""
    partial_path = path.with_suffix(".part.npz")
    np.savez(partial_path, **{name: np.asarray(leaf) for name, leaf in flatten_dict(params, sep="/").items()})
    partial_path.replace(path)


def load_weights(path: Path) -> Params:
    """What `save_weights` wrote."""
    with np.load(path) as file:
        return unflatten_dict({name: file[name] for name in file.files}, sep="/")
