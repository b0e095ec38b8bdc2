"""`openpi train --stage …`: a policy that sees, stage by stage, from labelled scenes.

openpi train --stage all --scenes data/scenes --out runs/sees
openpi train --stage act --scenes data/scenes --out runs/sees --settings.steps 3000
"""

import dataclasses
import functools
import json
import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from safe_pruner_jax.figures.theme import colour, grid
from safe_pruner_jax.model.params import Params
from safe_pruner_jax.policy.embedded import EMBEDDED, embedded_folder, embedded_params
from safe_pruner_jax.robots.configs import PolicyConfig
from safe_pruner_jax.robots.transforms import NormStats, Tokenizer, load_norm_stats
from safe_pruner_jax.training.loop import Settings
from safe_pruner_jax.training.perception import HEADS
from safe_pruner_jax.training.rounds import Rounds, correct, export
from safe_pruner_jax.training.scenes import Scenes
from safe_pruner_jax.training.stages import STAGES, WEIGHTS, fit_heads, initial, load_weights, save_weights, train_stage

MOTION = np.array([1.0, 1.0, 1.0, 0.3, 0.3, 0.5, 1.0])
"""What the expert's commands are scaled by: ±1 moves and closes; turns seldom exceed a third of the command range."""

HEADS_FILE = "heads.npz"
"""File of the embedded policy's heads, beside its parameters."""

CURVES = {
    "centimetres": ("place_cm", "offset_wrist_cm", "target_cm", "near_cm"),
    "share": ("cell_accuracy", "name_accuracy", "iou", "held_accuracy", "target_mass"),
    "flow-matching loss": ("flow",),
}
"""Panels of `curves`: axis label → held-out measures."""

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Stages:
    """What `--stage` needs beside the settings.

    Args:
      scenes: folders of labelled scenes (scripts/collect_scenes.py).
      without: losses left out, by name; "attention" gives the policy without attention supervision.
      acting: share of a batch that is drawn among frames with actions, in act and correct.
      rounds: of the stage `correct`.
    """

    scenes: tuple[Path, ...] = ()
    without: tuple[str, ...] = ()
    acting: float = 0.7
    rounds: Rounds = dataclasses.field(default_factory=Rounds)


def run_stages(
    stage: str, args: Stages, config: PolicyConfig, tokenizer: Path, s: Settings, out: Path, *, start: str | None = None
) -> None:
    """Trains one stage, or all of them, and exports `out/checkpoint`.

    With the name of an embedded policy as `start` the first of them starts there instead of at the stage before.

    Raises:
      ValueError: no scenes, scenes of another kind, a stage whose predecessor is not there, an unknown loss.
    """
    if unknown := set(args.without) - {name for weights in WEIGHTS.values() for name in weights}:
        raise ValueError(f"without: expected losses of {', '.join(WEIGHTS['act'])}, got {', '.join(sorted(unknown))}")
    run = _Run(args, config, action_stats(config), tokenizer, s, out)
    params = None if start is None else embedded_weights(start)
    for name in STAGES if stage == "all" else (stage,):
        params = run.stage(name, params)
    assert params is not None  # there is a stage
    export(out / "checkpoint", params, config, run.stats, tokenizer)
    curves(out).savefig(out / "curves.png")


def curves(out: Path) -> Figure:
    """Held-out measures of all stages that have run, one after the other along the steps."""
    drawn, axes = grid(len(CURVES))
    start = 0
    for stage in STAGES:
        path = out / stage / "metrics.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        rows = [row for row in rows if "validation" in row]
        for ax, (label, names) in zip(axes, CURVES.items(), strict=True):
            ax.set(xlabel="step, all stages", ylabel=label)
            for number, name in enumerate(names):
                points = [(start + row["step"], row["validation"][name]) for row in rows if name in row["validation"]]
                if points:
                    ax.plot(*zip(*points, strict=True), marker=".", color=colour(number), label=name)
            if rows:
                ax.axvline(start, color="#9aa3ab", lw=0.8)
                ax.text(start, 1.0, f" {stage}", transform=ax.get_xaxis_transform(), fontsize=8, va="bottom")
        start += max((row["step"] for row in rows), default=0)
    for ax in axes:
        handles = {line.get_label(): line for line in ax.get_lines() if not line.get_label().startswith("_")}
        ax.legend(handles.values(), handles.keys(), fontsize=8, frameon=False)
    return drawn


def action_stats(config: PolicyConfig) -> dict[str, NormStats]:
    """Statistics with which stages train: the embedded policy's states, and `MOTION` for actions."""
    stats = load_norm_stats(embedded_folder(), config.asset_id)
    return stats | {"actions": NormStats(np.zeros(len(MOTION)), MOTION, -MOTION, MOTION)}


@dataclasses.dataclass(frozen=True)
class _Run:
    """What all stages of one run share."""

    args: Stages
    config: PolicyConfig
    stats: dict[str, NormStats]
    tokenizer: Path
    settings: Settings
    out: Path

    def stage(self, name: str, before: Params | None) -> Params:
        """Trains a stage from the weights of the one before; None: from its file, or from nothing for the first."""
        if before is None and name == STAGES[0]:
            data = self.scenes(name)
            params = initial(self.config.model, len(data.kinds), self.settings.seed)
            return self.train(name, params, data)
        params = _weights_before(name, self.out) if before is None else before
        return self.correct(params) if name == "correct" else self.train(name, params, self.scenes(name))

    def correct(self, params: Params) -> Params:
        """Rounds of playing and training."""
        out = self.out / "correct"
        more = lambda params, number: self.train("correct", params, self.scenes("correct"), number + 1)
        rounds = correct(
            self.args.rounds, params, self.config, stats=self.stats, tokenizer=self.tokenizer, out=out, train=more
        )
        for row, params in rounds:
            logger.info("round %(round)d: %(successes)d of %(episodes)d episodes solved, %(frames)d frames", row)
            save_weights(out / "weights.npz", params)
        return params

    def scenes(self, name: str) -> Scenes:
        """The data that a stage has now."""
        more = self.out / "correct" / "data"
        folders = (*self.args.scenes, *([more] if name == "correct" and more.exists() else []))
        return Scenes(
            folders,
            Tokenizer(self.tokenizer, self.config.model.max_token_len),
            self.stats,
            self.config.model,
            repeat=[3 if folder == more else 1 for folder in folders],
            acts_share=self.args.acting if name in ("act", "correct") else 0.0,
        )

    def train(self, name: str, params: Params, data: Scenes, times: int = 1) -> Params:
        """Trains up to so many times the settings' steps; heads for things of another suite are drawn anew."""
        params = fit_heads(params, self.config.model, len(data.kinds))
        weights = {loss: weight for loss, weight in WEIGHTS[name].items() if loss not in self.args.without}
        settings = dataclasses.replace(self.settings, steps=times * self.settings.steps)
        show = functools.partial(_show, name)
        return train_stage(name, self.config.model, data, params, settings, self.out, weights=weights, on_log=show)[0]


def _show(name: str, row: dict[str, Any]) -> None:
    values = row.get("validation", row)
    text = ", ".join(f"{key} {value:.3f}" for key, value in values.items() if key != "step")
    logger.info("%s %d%s: %s", name, row["step"], " held out" if "validation" in row else "", text)


def embedded_weights(name: str = EMBEDDED) -> Params:
    """An embedded policy and the heads it was trained with."""
    heads = load_weights(embedded_folder(name) / HEADS_FILE)
    return embedded_params(name) | {HEADS: jax.tree.map(lambda a: a.astype(np.float32), heads)}


def _weights_before(name: str, out: Path) -> Params:
    """Weights of the stage before."""
    before = STAGES[STAGES.index(name) - 1]
    path = out / before / "weights.npz"
    if not path.is_file():
        raise ValueError(
            f"stage {name}: expected {path}, the weights of stage {before}, got none; train {before} first"
        )
    return load_weights(path)
