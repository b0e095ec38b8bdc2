"""A recorded episode played again: whether the same policy gives the same actions."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

import safe_pruner_jax
from safe_pruner_jax import pruners
from safe_pruner_jax.policy.loading import load_policy
from safe_pruner_jax.policy.policy import Policy
from safe_pruner_jax.serving.episodes import EpisodeError, Recorded

ROUNDING = 1e-4
"""Largest difference, relative to the range of the actions, between a step in a batch and the same step alone."""


def header(
    config: str,
    checkpoint: str | None,
    pruner: str,
    choices: dict[str, Any],
    *,
    options: dict[str, Any],
) -> dict[str, Any]:
    """What `run_inspect` needs to load the same policy.

    Args:
      config, checkpoint: of `load_policy`.
      pruner, choices: the factory's name and arguments.
      options: further arguments of `load_policy`.
    """
    return {
        "version": safe_pruner_jax.__version__,
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "config": config,
        "checkpoint": checkpoint if checkpoint is None or "://" in checkpoint else str(Path(checkpoint).absolute()),
        "pruner": pruner,
        "choices": choices,
        "options": options,
    }


def load(file: Path, episode: Recorded, folder: str | None = None, tokenizer: str | None = None) -> Policy:
    """The policy an episode was recorded with.

    Args:
      file: where the episode was read from, for messages.
      episode: what it holds.
      folder: of the checkpoint, if it has moved.
      tokenizer: SentencePiece model file, if it has moved.

    Raises:
      EpisodeError: recorded by another version of this package.
    """
    header = episode.header
    try:
        options = {"temperature": 1.0} | header["options"]  # all there was before it could be chosen
        options |= {key: tuple(header["options"][key]) for key in ("prompt_lengths", "kernels")}
        choices = {k: tuple(v) if isinstance(v, list) else v for k, v in header["choices"].items()}
        pruner = pruners.make(header["pruner"], **choices)
        name, checkpoint = header["config"], header["checkpoint"]
    except (KeyError, TypeError, AttributeError) as error:
        raise EpisodeError(
            f"{file}: recorded by version {header.get('version')}, this is {safe_pruner_jax.__version__} "
            f"({error!r}); install that version to replay it"
        ) from error
    if tokenizer is not None:
        options["tokenizer"] = tokenizer
    return load_policy(name, folder or checkpoint, pruner=pruner, **options)


def replay(episode: Recorded, policy: Policy) -> list[str]:
    """The verdict on each step: "same", "same up to rounding", or what differs."""
    session, verdicts, alone = policy.session(), [], True
    for step in episode.steps:
        alone &= step["batch"] == 1
        recorded = np.asarray(step["reply"]["actions"])
        computed = np.asarray(session.infer(step["request"])["actions"])
        if recorded.dtype == computed.dtype and recorded.tobytes() == computed.tobytes():
            verdicts.append("same")
            continue
        if recorded.shape != computed.shape:
            verdicts.append(f"differs: shape {recorded.shape}, computed {computed.shape}")
            continue
        difference = float(np.abs(recorded - computed).max())
        if not alone and difference <= ROUNDING * max(float(np.ptp(recorded)), 1.0):
            verdicts.append(f"same up to rounding ({difference:.1e}: it shared its device step)")
        else:
            verdicts.append(f"differs by up to {difference:.3e}")
    return verdicts
