"""Which kernels a device should use, and whether programs are CUDA graphs: measured at warm-up where they will run.

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
from safe_pruner_jax.engine import xla
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

GRAPH = "graph"
"""The one of `Pi0Config.savings` that is measured, too: what the host saves by it depends on the driver."""


@dataclass(frozen=True)
class Finding:
    """What became of a kernel, or of the graph.

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

    That is the denoise loop, and for the vision tower's kernel the tower. At last the loop with these is tried as one
    CUDA graph, if the configuration has it.

    Args:
      weights, config: the model; kernels it already names are kept, a graph that is not faster is not.
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
        findings[name] = _tried(f"kernel {name}", program, (config, candidate), weights, arguments, clock=clock)
        config = candidate if findings[name].verdict == "used" else config
    if GRAPH in config.savings:
        without = config.replace(savings=tuple(name for name in config.savings if name != GRAPH))
        findings[GRAPH] = _tried("one CUDA graph", _actions, (without, config), weights, chunk, clock=clock)
        config = config if findings[GRAPH].verdict == "used" else without
    return config, findings


def _tried(
    what: str,
    program: Callable,
    configs: tuple[Pi0Config, Pi0Config],
    weights: pi0.Weights,
    arguments: tuple,
    *,
    clock: Clock,
) -> Finding:
    """What becomes of the second of two configurations of a program, logged in one line."""
    run = [xla.jit(partial(program, c), graph=GRAPH in c.savings) for c in configs]
    try:
        finding = _compare(run, weights, arguments, AGREE[configs[0].dtype], clock)
    except Exception as error:  # whatever the compiler of a device calls it
        finding = Finding("failed", why=(str(error) or type(error).__name__).splitlines()[0])
    logger.log(
        logging.WARNING if finding.verdict in ("failed", "differs") else logging.INFO,
        "%s: %s%s",
        what,
        finding.verdict,
        f" ({finding.why})" if finding.why else f", {finding.gain or 0:.2f} times as fast as without",
    )
    return finding


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
