"""What each saving and each kernel is worth in launches: the programs that it changes, compiled without it.

undone(config, programs_of, compile_row)      {"room": {"full": row, "pruned": row}, "vision": {"vision": row, …}, …}
"""

import logging
from collections.abc import Callable
from typing import Any

import jax

from safe_pruner_jax.bench.aot import Program
from safe_pruner_jax.bench.targets import TargetError
from safe_pruner_jax.model import kernels
from safe_pruner_jax.model.config import Pi0Config

logger = logging.getLogger(__name__)

Programs = dict[str, Program]
CompileRow = Callable[[Pi0Config, tuple[Programs, ...], str], dict[str, Any]]


def undone(
    config: Pi0Config,
    programs_of: Callable[[Pi0Config], tuple[Programs, ...]],
    compile_row: CompileRow,
) -> dict[str, dict[str, dict[str, Any] | str]]:
    """Rows of the programs that a switch changes, without it and with every other one.

    Args:
      config: with savings and kernels; each is a switch.
      programs_of: programs of a configuration by name, for one or several sizes of the model.
      compile_row: (configuration, its programs, name) → row.

    Returns:
      {switch: {program: row}}; what a switch does not change is not compiled again, and not there. What cannot be
      compiled is a line in place of its row.
    """
    before = programs_of(config)
    texts = {name: _text(program) for name, program in before[0].items()}
    out: dict[str, dict[str, dict[str, Any] | str]] = {}
    for field in ("savings", "kernels"):
        switches = getattr(config, field)
        for switch in switches:
            less = config.replace(**{field: tuple(name for name in switches if name != switch)})
            programs = programs_of(less)
            changed = [name for name, program in programs[0].items() if _text(program) != texts[name]]
            out[f"{field}: {switch}"] = {name: _row(compile_row, less, programs, name) for name in changed}
    return out


def _row(compile_row: CompileRow, config: Pi0Config, programs: tuple[Programs, ...], name: str) -> dict[str, Any] | str:
    try:
        return compile_row(config, programs, name)
    except TargetError as error:
        logger.warning("%s: %s", name, error)
        return str(error)


def _text(program: Program) -> tuple[str, bool]:
    """What is handed to XLA: the program, and whether it has a loop for whose graph there are options."""
    with kernels.compiled():
        text = jax.jit(program.function).trace(*program.arguments).lower(lowering_platforms=("cuda",)).as_text()
    return text, bool(program.options) and "stablehlo.while" in text
