"""A control step compiled for a GPU that is not there: launches, CUDA graphs, memory and a modelled time.

    gpu = device(target("h100"))                      needs jax's CUDA plugin (extra `aot`), no GPU and no driver
    for name, program in programs(config, "safe", keep=0.2).items():
        compiled(gpu, program)                        a `Compiled`: what is launched, arguments, temporaries

Nothing is run, so nothing is timed: `modelled` turns launches into times, with its assumptions as numbers.
"""

import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from safe_pruner_jax.bench import thunks
from safe_pruner_jax.bench.modes import example_of, make, shapes_of
from safe_pruner_jax.bench.targets import Target, TargetError
from safe_pruner_jax.bench.thunks import Sequence
from safe_pruner_jax.engine import xla
from safe_pruner_jax.engine.engine import Engine
from safe_pruner_jax.engine.programs import embed, shallow
from safe_pruner_jax.model import kernels, pi0
from safe_pruner_jax.model.config import Pi0Config
from safe_pruner_jax.policy.policy import layout_of, pack

logger = logging.getLogger(__name__)

PLUGIN = "jax-cuda12-plugin"

DUMP = {"xla_dump_hlo_as_text": True, "xla_gpu_experimental_dump_gpu_executable": True}
"""What makes XLA write down its thunks; `xla_dump_to` says where."""

QUICK = {"xla_llvm_disable_expensive_passes": True, "xla_backend_optimization_level": 0}
"""Machine code is not looked at, so no effort goes into it; launches and grids are settled before it is made."""


@dataclass(frozen=True)
class Program:
    """A function, the shapes that it is compiled for, and XLA's options."""

    function: Callable
    arguments: tuple
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Compiled:
    """A program as a GPU would run it.

    Args:
      sequence: its launches.
      argument_bytes, temporary_bytes: memory beside each other while it runs.
      seconds: that compiling took.
    """

    sequence: Sequence
    argument_bytes: int
    temporary_bytes: int
    seconds: float


def device(to: Target) -> Any:
    """The device of a target's description, as a place for shapes.

    Raises:
      TargetError: no CUDA plugin, one of another version than jax, or one that does not know this GPU.
    """
    try:
        plugin = metadata.version(PLUGIN)
    except metadata.PackageNotFoundError:
        hint = "expected jax's CUDA plugin, got none; pip install 'safe-pruner-jax[aot]'"
        raise TargetError(f"target {to.name}: {hint}") from None
    if plugin != jax.__version__:
        hint = f"pip install {PLUGIN}=={jax.__version__} jax-cuda12-pjrt=={jax.__version__}"
        raise TargetError(f"target {to.name}: expected {PLUGIN} {jax.__version__} as jax, got {plugin}; {hint}")
    # a chip that LLVM does not know ends the process, not the compilation: another process tries a small program
    command = [
        sys.executable,
        "-c",
        "import sys; from safe_pruner_jax.bench import aot; aot.smallest(sys.stdin.read())",
    ]
    tried = subprocess.run(command, input=to.config_text(), capture_output=True, text=True, check=False)
    if tried.returncode:
        raise TargetError(f"target {to.name}: this jax has no compiler for it ({_reason(tried.stderr)})")
    return _first_device(to.config_text())


def _first_device(config_text: str) -> Any:
    jax.config.update("jax_platforms", "cpu")  # a GPU that is there stays out of it
    return topologies.get_topology_desc(platform="cuda", target_config=config_text, topology="1x1x1").devices[0]


def smallest(config_text: str) -> None:
    """Compiles a small program for a target's configuration, or ends this process as it ends the compiler."""
    there = jax.ShapeDtypeStruct((8,), "float32", sharding=SingleDeviceSharding(_first_device(config_text)))
    jax.jit(lambda x: x + 1).lower(there).compile(compiler_options=QUICK)


def _reason(stderr: str) -> str:
    """Why a compiler ended, in one line: what LLVM calls the reason, else the last line that is no stack trace."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip() and "***" not in line]
    reasons = [line.split("Reason: ")[1] for line in lines if "Reason: " in line]
    return (reasons or lines[-1:] or ["it ends without a word"])[0][:200]


def first_line(error: Exception) -> str:
    """An error in one line of at most 200 characters."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def compiled(gpu: Any, program: Program) -> Compiled:
    """Compiles a program and reads what it launches.

    Args:
      gpu: from `device`.
      program: what.

    Raises:
      TargetError: it does not compile for this GPU; in one line.
    """
    place = SingleDeviceSharding(gpu)
    put = lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="aot") as folder:
        try:
            with kernels.compiled():
                lowered = jax.jit(program.function).lower(*jax.tree.map(put, program.arguments))
            done = lowered.compile(compiler_options=DUMP | QUICK | {"xla_dump_to": folder} | dict(program.options))
        except Exception as error:  # the compiler's own errors have no common type
            raise TargetError(f"does not compile for {gpu.device_kind}: {first_line(error)}") from error
        memory = done.memory_analysis()
        sequence = thunks.read(Path(folder))
    seconds = time.perf_counter() - start
    return Compiled(sequence, memory.argument_size_in_bytes, memory.temp_size_in_bytes, seconds)


def programs(
    config: Pi0Config,
    pruner: str = "safe",
    *,
    keep: float = 0.2,
    views: int = 2,
    prompt: int = 20,
    num_steps: int = 10,
    robots: int = 1,
) -> dict[str, Program]:
    """The programs of a control step, by name: each a prefix of the next up to "decision", then the second halves.

    Args:
      config: sizes of the model.
      pruner, keep: the method and its share of visual tokens.
      views: real cameras.
      prompt: alive prompt tokens.
      num_steps: denoise steps.
      robots: in one step, agreeing on their keyframe.

    Returns:
      "vision"; "before", + the layers before the cut; "decision", + saliency and the pruner's step (`shallow`);
      "full" and "pruned", the second half of the step. Launches of a phase are differences of the first three.
    """
    weights, example = shapes_of(config, num_steps, upright=False), example_of(config, views, prompt)
    engine = Engine(weights, config, make(pruner, keep))
    host = pack([example] * robots, layout_of(example, config))
    control = _shapes(engine.init(tuple(range(robots)), views))
    inputs, cut = _shapes(host), engine.plan.cut
    decide = lambda w, c, i: engine.shallow.program(w, c, i, None)
    with kernels.compiled():  # jax keeps what it has traced, interpreted kernels too
        carry = jax.eval_shape(lambda w, c, i: shallow(config, engine.pruner, w, c, i, None), weights, control, inputs)
    before = range(cut.layer if cut else 0)
    of = partial(Program, options=xla.options("gpu", graph="graph" in config.savings))
    out = {
        "vision": of(lambda w, i: pi0.embed_images(w, config, i.images), (weights, inputs)),
        "before": of(lambda w, i: pi0.prefix_layers(w, config, embed(w, config, i), before)[:2], (weights, inputs)),
        "decision": of(decide, (weights, control, inputs)),
        "full": of(engine.second[False].program, (weights, carry)),
    }
    if cut is not None:
        out["pruned"] = of(engine.second[True].program, (weights, carry))
    return out


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(jnp.shape(a), a.dtype), tree)
