"""A name, a checkpoint and a pruner → a policy.

load_policy("pi05_libero", "gs://openpi-assets/checkpoints/pi05_libero", pruner=safe(keep=0.2))
load_policy("mini_libero", pruner=safe(keep=0.2))          the embedded policy, nothing to download
"""

import json
import os
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from safe_pruner_jax.engine import autotune, xla
from safe_pruner_jax.engine.engine import Engine
from safe_pruner_jax.model import pi0, quantisation
from safe_pruner_jax.model.checkpoint import open_params
from safe_pruner_jax.model.config import Pi0Config
from safe_pruner_jax.model.fetch import fetch
from safe_pruner_jax.model.params import Params
from safe_pruner_jax.policy.embedded import WEIGHTS, embedded_folder, embedded_params
from safe_pruner_jax.policy.lerobot import is_lerobot, read_lerobot
from safe_pruner_jax.policy.policy import Policy
from safe_pruner_jax.pruners import Pruner, full, make
from safe_pruner_jax.robots.configs import get_config
from safe_pruner_jax.robots.transform import PolicyConfig, RobotIO
from safe_pruner_jax.robots.transforms import NormStats, Tokenizer, load_norm_stats
from safe_pruner_jax.tokens import PROMPT_LENGTHS

PALIGEMMA_TOKENIZER = "gs://big_vision/paligemma_tokenizer.model"
"""Tokenizer of every released checkpoint; openpi keeps it in the same cache."""

CALIBRATION = "calibrate.json"
"""What `openpi analyze calibrate` wrote for a checkpoint, where it has been put into the checkpoint's folder."""


def calibrated(folder: str | os.PathLike | None = None) -> dict[str, Any]:
    """Choices of `safe` that a checkpoint was calibrated to; none without a `CALIBRATION` in its folder.

    Args:
      folder: of the checkpoint; None is the default embedded one's.

    Raises:
      ValueError: the file is not one that `openpi analyze calibrate` writes.
    """
    path = (embedded_folder() if folder is None else Path(folder)) / CALIBRATION
    if not path.is_file():
        return {}
    try:
        choices = json.loads(path.read_text(encoding="utf-8"))["choices"]
        make("safe", **choices)
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        expected = f"{path}: expected what `openpi analyze calibrate` writes"
        raise ValueError(f"{expected}, got {type(error).__name__}: {error}; remove it") from error
    return choices


def described(folder: Path, config: PolicyConfig) -> tuple[PolicyConfig, dict[str, NormStats]]:
    """A policy's configuration and statistics, with what LeRobot's files in a checkpoint's folder say of them.

    Raises:
      FileNotFoundError: no statistics, neither openpi's nor LeRobot's.
      CheckpointError: LeRobot's files describe another policy than `config`.
    """
    stats: dict[str, NormStats] = {}
    if is_lerobot(folder):
        config, stats = read_lerobot(folder, config)
    return config, stats or load_norm_stats(folder, config.asset_id)


def load_policy(
    config: str | PolicyConfig,
    checkpoint: str | os.PathLike | None = None,
    *,
    pruner: Pruner | None = None,
    default_prompt: str | None = None,
    tokenizer: str | os.PathLike | None = None,
    dtype: str | None = None,
    param_dtype: str | None = None,
    quantise: quantisation.EightBit | None = None,
    kernels: Literal["auto"] | tuple[str, ...] = (),
    num_steps: int = 10,
    temperature: float | None = None,
    prompt_lengths: tuple[int, ...] = PROMPT_LENGTHS,
    seed: int = 0,
    describe: bool = True,
) -> Policy:
    """Builds a policy, ready for sessions.

    Args:
      config: name of a configuration, see `robots.configs.CONFIGS`, or one of your own.
      checkpoint: folder or gs:// address, openpi's (orbax or safetensors) or LeRobot's; None takes the one openpi
        publishes for the configuration, or the parameters in this package (`embedded.WEIGHTS`).
      pruner: what to prune; None keeps every alive token.
      default_prompt: used for requests without a prompt.
      tokenizer: SentencePiece model; None takes the `tokenizer.model` beside the checkpoint (training writes it), or
        else PaliGemma's, downloaded once into openpi's cache.
      dtype: activation dtype, "bfloat16" or "float32"; None takes the configuration's.
      param_dtype: dtype the checkpoint is cast to while it is read; None takes the activation dtype. (openpi always
        reads bfloat16.)
      quantise: 8-bit weights for the language model and the expert, see `model.quantisation`; a device that cannot run
        them takes the next best, and the log says so.
      kernels: names of the Pallas kernels to use (`model.kernels`), or "auto": those that `engine.autotune` measures
        to be faster on this device, none on a CPU. What is measured may change between starts, and with it the last
        bits.
      num_steps: denoise steps.
      temperature: of the noise, see `Pi0Config`; None takes the configuration's (1, as in openpi; 0 for `mini_libero`).
      prompt_lengths: static prompt lengths programs are compiled for.
      seed: seed of the noise of every session.
      describe: add `pruning` to replies.

    Raises:
      ValueError: an unknown configuration, one without a checkpoint, a pruner that does not fit the model.
      CheckpointError: weights that do not fit or cannot be read.
      FileNotFoundError: missing norm statistics or tokenizer.
    """
    config = get_config(config) if isinstance(config, str) else config
    pruner = pruner or full()
    pruner.plan.for_depth(config.model.depth)  # before gigabytes are fetched
    packaged = checkpoint is None and config.name in WEIGHTS
    address = config.default_checkpoint_uri if checkpoint is None else checkpoint
    if address is None and not packaged:
        raise ValueError(f"checkpoint: {config.name} has no published weights; give the folder of your own")
    folder = embedded_folder(config.name) if packaged else fetch(address)
    config, stats = described(folder, config)
    choices = {"dtype": dtype, "temperature": temperature, "savings": xla.savings()}
    model = config.model.replace(**{name: value for name, value in choices.items() if value is not None})
    params = embedded_params(config.name) if packaged else open_params(folder, model, dtype=param_dtype or model.dtype)
    vocabulary = _vocabulary(folder, config.name in WEIGHTS) if tokenizer is None else tokenizer
    io = RobotIO(config, stats, Tokenizer(vocabulary, model.max_token_len), default_prompt)
    weights = _on_device(params, model, num_steps, quantise)
    automatic = kernels == "auto"
    model = autotune.on_gpu(weights, model)[0] if automatic else model.replace(kernels=tuple(kernels))
    how = {"prompt_lengths": prompt_lengths, "seed": seed, "describe": describe}
    policy = Policy(Engine(weights, model, pruner), io, metadata=dict(config.metadata), **how)
    policy.check()
    return policy


def _vocabulary(folder: Path, embedded: bool) -> Path:
    """The SentencePiece model of a checkpoint: what lies beside it, as the embedded one's must, else PaliGemma's."""
    beside = folder / "tokenizer.model"
    return beside if embedded or beside.exists() else fetch(PALIGEMMA_TOKENIZER)


def _on_device(params: Params, model: Pi0Config, num_steps: int, quantise: quantisation.EightBit | None) -> pi0.Weights:
    """Weights as programs take them, on the device, in 8 bit where that was wished and is possible."""
    prepared = pi0.prepare(params, model, num_steps=num_steps, upright=quantise is None and xla.upright(model.dtype))
    weights = jax.tree.map(jnp.asarray, prepared)
    if quantise is not None and (usable := quantisation.usable(quantise, model.dtype)):
        weights = quantisation.reduce(weights, usable)
    return weights
