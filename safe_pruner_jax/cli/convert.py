"""`openpi convert`: a checkpoint in another layout.

openpi convert --checkpoint gs://openpi-assets/checkpoints/pi05_libero --config pi05_libero --out pi05_libero_pytorch
openpi convert --checkpoint my_lerobot_pi05 --config pi05_aloha --to orbax --out my_pi05
"""

import dataclasses
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import jax.numpy as jnp

from safe_pruner_jax.model.checkpoint import load_params, open_params, save_params
from safe_pruner_jax.model.fetch import fetch
from safe_pruner_jax.model.pytorch import save_pytorch
from safe_pruner_jax.model.pytorch_names import LEROBOT
from safe_pruner_jax.policy.lerobot import CONFIG, write_lerobot
from safe_pruner_jax.policy.loading import described
from safe_pruner_jax.robots.configs import get_config
from safe_pruner_jax.robots.transform import PolicyConfig
from safe_pruner_jax.robots.transforms import NormStats, save_norm_stats

logger = logging.getLogger(__name__)

CARRIED = ("tokenizer.model", "calibrate.json")
"""Files of a checkpoint's folder that belong to it in every layout."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convert:
    """Write a checkpoint in another layout: openpi's orbax, openpi's PyTorch, or LeRobot's.

    Args:
      checkpoint: folder or gs:// address, in any of the three layouts.
      config: openpi's name of the configuration.
      out: folder that is made.
      to: layout that is written.
      dtype: of the weights; None keeps what is stored.
    """

    checkpoint: str
    config: str
    out: Path
    to: Literal["orbax", "openpi-pytorch", "lerobot"] = "openpi-pytorch"
    dtype: Literal["bfloat16", "float32"] | None = None


def run_convert(args: Convert) -> None:
    """Writes weights, statistics, and the files that the layout wants beside them.

    Raises:
      CheckpointError, ValueError, OSError: with what to do.
    """
    if args.out.exists() and any(args.out.iterdir()):
        raise ValueError(f"out: expected a folder that is empty or new, got {args.out}; give another")
    folder = fetch(args.checkpoint)
    config, stats = described(folder, get_config(args.config))
    args.out.mkdir(parents=True, exist_ok=True)
    dtype = None if args.dtype is None else jnp.dtype(args.dtype)
    if args.to == "orbax":
        save_params(args.out, load_params(folder, config.model, dtype=dtype))
    elif args.to == "lerobot":
        write_lerobot(args.out, config, stats)  # first: it may refuse
    if args.to != "orbax":
        prefix = LEROBOT if args.to == "lerobot" else ""
        save_pytorch(args.out, open_params(folder, config.model, dtype=dtype), config.model, prefix=prefix)
    if args.to == "openpi-pytorch":
        _write_sizes(args.out, config, args.dtype)
    _carry(folder, args.out, config, stats)
    logger.info("%s → %s, %s", folder, args.out, args.to)


def _write_sizes(out: Path, config: PolicyConfig, dtype: str | None) -> None:
    """The `config.json` of openpi's conversion; nothing reads it, people do."""
    model = config.model
    about = {"action_dim": model.action_dim, "action_horizon": model.action_horizon, "precision": dtype or "as stored"}
    (out / CONFIG).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def _carry(folder: Path, out: Path, config: PolicyConfig, stats: Mapping[str, NormStats]) -> None:
    """openpi's statistics go with every layout, so that a way back loses none of their digits."""
    save_norm_stats(out, config.asset_id, dict(stats))
    for name in CARRIED:
        if (folder / name).is_file():
            shutil.copy(folder / name, out / name)
