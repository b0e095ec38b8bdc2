"""Which kernels a device should use: measured where the program is going to run, at warm-up.

config, found = tuned(weights, config, keys=560)      found: {"attention": Finding("used", gain=1.3), …}
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from safe_pruner_jax.arrays import Array
from safe_pruner_jax.model import expert_kernels, kernels, pi0, vision_kernels
from safe_pruner_jax.model.config import Pi0Config
from safe_pruner_jax.model.gemma import Segment
from safe_pruner_jax.timing import interleave, ratio

logger = logging.getLogger(__name__)

Clock = Callable[[], float]

WORTH = 1.02
"""How much faster the denoise steps must be with a kernel."""

AGREE = {"float32": 1e-4, "bfloat16": 3e-2}
"""Largest difference of the actions over the largest action, by activation dtype."""

ROUNDS = 15


@dataclass(frozen=True)
class Finding:
    """What became of a kernel.

    Args:
      verdict: "used", "slower", "differs" or "failed".
      gain: how many times faster the denoise steps were with it; None where they were not timed.
      why: of a failure.
    """

    verdict: str
    gain: float | None = None
    why: str = ""


def tuned(
    weights: pi0.Weights, config: Pi0Config, keys: int, *, robots: int = 1, clock: Clock = time.perf_counter
) -> tuple[Pi0Config, dict[str, Finding]]:
    """The configuration with the kernels that are faster here, tried one after the other on what they are part of.

    That is the denoise loop, and for the vision tower's kernel the tower.

    Args:
      weights, config: the model; kernels it already names are kept.
      keys: prefix slots.
      robots: rows of a batch.
      clock: seconds.

    Returns:
      The configuration, and what became of every kernel that is made for such a model. A kernel that does not compile
      or gives other actions is left out and logged in one line.
    """
    chunk, pictures = _example(config, keys, robots), _images(config, robots)
    findings: dict[str, Finding] = {}
    for name in kernels.NAMES:
        if name in config.kernels or not _applies(name, weights, config):
            continue
        candidate = config.replace(kernels=(*config.kernels, name))
        program, arguments = (_tokens, pictures) if name == kernels.VISION else (_actions, chunk)
        run = [jax.jit(partial(program, c)) for c in (config, candidate)]
        try:
            finding = _compare(run, weights, arguments, AGREE[config.dtype], clock)
        except Exception as error:  # whatever the compiler of a device calls it
            finding = Finding("failed", why=(str(error) or type(error).__name__).splitlines()[0])
        if finding.verdict == "used":
            config = candidate
        findings[name] = finding
        logger.log(
            logging.WARNING if finding.verdict in ("failed", "differs") else logging.INFO,
            "kernel %s: %s%s",
            name,
            finding.verdict,
            f" ({finding.why})" if finding.why else f", {finding.gain or 0:.2f} times as fast as XLA",
        )
    return config, findings


def on_gpu(weights: pi0.Weights, config: Pi0Config) -> tuple[Pi0Config, dict[str, Finding]]:
    """`tuned` for two cameras and a short prompt, one robot; on a CPU nothing is tried and nothing changes."""
    if jax.default_backend() == "cpu":
        return config, {}
    return tuned(weights, config, 2 * config.tokens_per_camera + 32)


def _applies(name: str, weights: pi0.Weights, config: Pi0Config) -> bool:
    """Whether a kernel would take part at all: those for whole layers and for the tower want certain sizes."""
    if name == kernels.VISION:
        return vision_kernels.supports(config)
    rows = config.action_horizon + (not config.pi05)
    mods = weights.schedule.mods
    return name != kernels.LAYER or expert_kernels.supports(config.expert, weights.expert[0], mods, rows)


def _example(config: Pi0Config, keys: int, robots: int) -> tuple:
    c, draw = config.prefix, lambda i, *shape: jax.random.normal(jax.random.key(i), shape)
    kv = draw(0, robots, keys, c.num_kv_heads, c.head_dim).astype(config.dtype)
    segment = Segment(kv, kv, jnp.ones((robots, 1, keys), bool))
    noise = draw(1, robots, config.action_horizon, config.action_dim)
    prefix = pi0.Prefix((segment,) * config.depth, jnp.full(robots, keys, jnp.int32))
    return prefix, jnp.zeros_like(noise[:, 0]), noise


def _images(config: Pi0Config, robots: int) -> tuple:
    side = config.image_size
    return (jax.random.randint(jax.random.key(2), (robots, 2, side, side, 3), 0, 256).astype(jnp.uint8),)


def _compare(run: list[Callable], weights: pi0.Weights, arguments: tuple, agree: float, clock: Clock) -> Finding:
    """What becomes of the second of two programs: their results by at most `agree` of the largest apart, or faster."""
    before, after = (np.asarray(program(weights, *arguments), np.float64) for program in run)
    difference = np.abs(after - before).max() / np.abs(before).max()
    if not difference <= agree:
        return Finding("differs", why=f"results by {difference:.1e}, expected at most {agree:.0e}")
    steps = {key: partial(_run, program, weights, arguments) for key, program in zip("-+", run, strict=True)}
    times = interleave(steps, ROUNDS, warm_up=0, clock=clock)  # both have just run
    gain = ratio(times["+"], times["-"]).median
    return Finding("used" if gain >= WORTH else "slower", gain)


def _actions(config: Pi0Config, weights: pi0.Weights, *arguments: Any) -> Array:
    return pi0.sample(weights, config, *arguments)[0]


def _tokens(config: Pi0Config, weights: pi0.Weights, images: Array) -> Array:
    return pi0.embed_images(weights, config, images)


def _run(program: Callable, weights: pi0.Weights, arguments: tuple) -> None:
    jax.block_until_ready(program(weights, *arguments))
