"""How this package's large programs are compiled: `jax.jit` with the options that are faster on this machine.

    step = jit(program)
    step = Step(program, config.savings)    a half of a control step, with what it saves

On a CPU XLA hands matrix products to YNNPACK, which on the widths of π0.5 is slower than XLA's own (Eigen) product: by
a third for the ten rows of the expert, by up to a half for the prefix (docs/performance.md). The environment variable
SAFE_PRUNER_XLA=default leaves everything to XLA. On a GPU the two halves of a control step are CUDA graphs (`GRAPH`).

    keep_programs(default_folder())         before anything is compiled

A second start does not compile: programs are kept in a folder and read back. One with other shapes or versions adds its
own.
"""

import functools
import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
from flax import struct

from safe_pruner_jax.model.config import SAVINGS, Saving

CPU = {"xla_cpu_experimental_ynn_fusion_type": ""}
"""Options of a CPU program: no product goes to YNNPACK."""

GRAPH = {"xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,WHILE"}
"""Options of a GPU program that is one CUDA graph: XLA's own list, and loops. Drivers before CUDA 12.3 ignore them."""


def savings(platform: str | None = None) -> tuple[Saving, ...]:
    """What programs do to launch less (`Pi0Config.savings`): all of it on a GPU, nothing on a CPU.

    A CPU has no launches to save, and its products want no padding.
    """
    platform = platform or jax.default_backend()
    return () if platform == "cpu" or os.environ.get("SAFE_PRUNER_XLA") == "default" else SAVINGS


@functools.cache
def options(platform: str | None = None, graph: bool = False) -> dict[str, Any]:
    """Options of XLA for a platform, "cpu" or "gpu", by default this machine's; none where this jax knows none.

    Args:
      platform: what compiles.
      graph: whether a GPU program is one CUDA graph, loops inside.
    """
    platform = platform or jax.default_backend()
    wanted = CPU if platform == "cpu" else GRAPH if graph else {}
    if not wanted or os.environ.get("SAFE_PRUNER_XLA") == "default":
        return {}
    try:  # options of a platform that is not here are read all the same
        jax.jit(lambda x: x + 1, compiler_options=wanted).lower(0.0).compile()
    except Exception:  # an older jax: it has no YNNPACK, or takes no list of commands
        return {}
    return wanted


def upright(dtype: str) -> bool:
    """Whether weights are to be stored for XLA's CPU product (`pi0.prepare`): it is what computes, and in float32."""
    return bool(options()) and dtype == "float32"


class _Program:
    """A program with options of its own, which jax takes at the top level only: inside another it has none."""

    def __init__(self, program: Callable, chosen: dict[str, Any], how: dict[str, Any]):
        self._outside, self._inside = jax.jit(program, compiler_options=chosen, **how), jax.jit(program, **how)
        self.lower = self._outside.lower

    def __call__(self, *arguments: Any) -> Any:
        inside = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(arguments))
        return (self._inside if inside else self._outside)(*arguments)


def jit(program: Callable, graph: bool = False, **how: Any) -> Callable:
    """`jax.jit(program, **how)` with `options`; of its other methods there is `lower`."""
    chosen = options(graph=graph)
    return _Program(program, chosen, how) if chosen else jax.jit(program, **how)


@struct.dataclass
class _Given:
    """In place of an output that is the argument's leaf number `place`."""

    place: int = struct.field(pytree_node=False)


class Step:
    """A program (weights, *given) compiled by `jit`, with those of `Pi0Config.savings` that concern a whole program.

    With "arguments" nothing that leaves it as it was given is copied: XLA copies an argument that is an output, too, a
    launch each, and for a memory of unit tokens megabytes. With "graph" it is one CUDA graph.
    """

    def __init__(self, program: Callable, savings: tuple[str, ...]):
        self.program = partial(_without_given, program) if "arguments" in savings else program
        self._compiled: Any = jit(self.program, graph="graph" in savings)
        self.lower = self._compiled.lower

    def __call__(self, weights: Any, *given: Any) -> Any:
        """What the program returns."""
        leaves = jax.tree.leaves(given)
        filled = lambda a: leaves[a.place] if isinstance(a, _Given) else a
        return jax.tree.map(filled, self._compiled(weights, *given), is_leaf=lambda a: isinstance(a, _Given))


def _without_given(program: Callable, weights: Any, *given: Any) -> Any:
    places = {id(leaf): i for i, leaf in enumerate(jax.tree.leaves(given))}
    return jax.tree.map(lambda a: _Given(places[id(a)]) if id(a) in places else a, program(weights, *given))


logger = logging.getLogger(__name__)


LEAST_VERSION = (0, 6)


"""jax before this keeps no CPU programs that can be trusted: one was seen to crash on reading its own."""


def trusted() -> bool:
    """Whether this jax is new enough to read back what it has kept (`LEAST_VERSION`)."""
    return tuple(int(part) for part in jax.__version__.split(".")[:2]) >= LEAST_VERSION


def default_folder() -> Path | None:
    """Where programs are kept if nobody says otherwise.

    `$SAFE_PRUNER_PROGRAMS` ("none": nowhere), else `$XDG_CACHE_HOME/safe_pruner_jax/programs`, by default under
    ~/.cache; None where jax is too old to keep any.
    """
    if not trusted():
        return None
    if chosen := os.environ.get("SAFE_PRUNER_PROGRAMS"):
        return None if chosen == "none" else Path(chosen)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "safe_pruner_jax" / "programs"


def keep_programs(folder: str | os.PathLike | None) -> None:
    """Keeps every compiled program of this process in `folder`, and takes from it what is there.

    jax tells programs apart by their code, shapes, flags, device and versions, so a folder may serve several
    policies. One that cannot be written costs nothing but the time to compile.

    Args:
      folder: created with its parents; None keeps nothing.
    """
    if folder is None:
        return
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        logger.warning("programs are not kept: %s; give --programs another folder", error)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
