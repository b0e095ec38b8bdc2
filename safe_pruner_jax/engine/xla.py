"""How this package's large programs are compiled: `jax.jit` with the options that are faster on this machine.

    step = jit(program)

On a CPU XLA hands matrix products to YNNPACK, which on the widths of π0.5 is slower than XLA's own (Eigen) product: by
a third for the ten rows of the expert, by up to a half for the prefix (docs/performance.md). The environment variable
SAFE_PRUNER_XLA=default leaves everything to XLA. On a GPU nothing is set.
"""

import functools
import os
from collections.abc import Callable
from typing import Any

import jax

CPU = {"xla_cpu_experimental_ynn_fusion_type": ""}
"""Options of a CPU program: no product goes to YNNPACK."""


@functools.cache
def options() -> dict[str, Any]:
    """Options of XLA for this machine; none where this jax does not know them."""
    if os.environ.get("SAFE_PRUNER_XLA") == "default" or jax.default_backend() != "cpu":
        return {}
    try:
        jax.jit(lambda x: x + 1, compiler_options=CPU).lower(0.0).compile()
    except Exception:  # an older jax: it does not know the option, and has no YNNPACK
        return {}
    return CPU


def upright(dtype: str) -> bool:
    """Whether weights are to be stored for XLA's CPU product (`pi0.prepare`): it is what computes, and in float32."""
    return bool(options()) and dtype == "float32"


class _Program:
    """A program with options of its own, which jax takes at the top level only: inside another it has none."""

    def __init__(self, program: Callable, how: dict[str, Any]):
        self._outside, self._inside = jax.jit(program, compiler_options=options(), **how), jax.jit(program, **how)
        self.lower = self._outside.lower

    def __call__(self, *arguments: Any) -> Any:
        inside = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(arguments))
        return (self._inside if inside else self._outside)(*arguments)


def jit(program: Callable, **how: Any) -> Callable:
    """`jax.jit(program, **how)` with `options`; of its other methods there is `lower`."""
    return _Program(program, how) if options() else jax.jit(program, **how)
