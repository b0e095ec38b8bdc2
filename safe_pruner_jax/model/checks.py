"""What a stored tree of parameters is held against: names, shapes, dtypes, finite values."""

import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from safe_pruner_jax.model.config import Pi0Config
from safe_pruner_jax.model.fetch import CheckpointError

SHOWN = 6
"""Mismatches listed in one error."""

_BLOCK = 1 << 20  # values looked at together; keeps the temporaries in cache


def check_dtype(dtype: Any) -> np.dtype | None:
    """A floating dtype by its name, None for None; ValueError for another."""
    if dtype is None:
        return None
    kind = jnp.dtype(dtype)
    if not jnp.issubdtype(kind, jnp.floating):
        raise ValueError(f'dtype must be a floating dtype such as "bfloat16" or None, got {kind}')
    return kind


def check_tree(
    directory: pathlib.Path,
    leaves: Mapping[str, tuple[tuple[int, ...], str]],
    extra: Iterable[str],
    expected: Mapping[str, tuple[int, ...]],
    config: Pi0Config,
    kind: str = "leaf",
) -> None:
    """Raises CheckpointError with the first mismatches, unless the names and shapes are those of the configuration.

    Args:
      directory: where it was found.
      leaves: name → shape and name of the dtype.
      extra: names that nobody expects.
      expected: name → shape.
      config: sizes; says which of π0 and π0.5 is meant.
      kind: what the names are of.
    """
    extra, wrong = sorted(extra), []
    for name, shape in expected.items():
        if name not in leaves:
            wrong.append(f"{name}: expected {shape}, got no such {kind}")
        elif leaves[name][0] != shape:
            wrong.append(f"{name}: expected {shape}, got {leaves[name][0]}")
        elif "float" not in leaves[name][1]:
            wrong.append(f"{name}: expected floating values, got {leaves[name][1]}")
    lines = wrong + [f"{name}: expected no such {kind}, got one" for name in extra]
    if not lines:
        return
    shown = lines[:SHOWN] + ([f"… and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else [])
    advice = _advice({*leaves, *extra}, len(wrong), bool(extra), config)
    raise CheckpointError("\n  ".join([f"{directory} does not fit the configuration:", *shown]) + f"\n{advice}")


def _advice(names: set[str], wrong: int, extra: bool, config: Pi0Config) -> str:
    is_pi05 = any(name.startswith("time_mlp_in") for name in names)
    if wrong and extra and is_pi05 != config.pi05:
        return f"The configuration seems wrong: it has pi05={config.pi05}, the file holds a model with pi05={is_pi05}."
    if wrong > 1:
        return "The configuration seems wrong for this checkpoint: compare its sizes with those above."
    if wrong:
        return "The checkpoint is incomplete or of another model: save or download it again."
    return "Merge LoRA leaves into the weights first; drop others with allow_extra=True."


def require_finite(value: np.ndarray, name: str, directory: pathlib.Path) -> np.ndarray:
    """The value itself; CheckpointError that names it if a number of it is NaN or infinite."""
    if bad := count_nonfinite(value):
        raise CheckpointError(
            f"leaf {name} of {directory}: expected finite values, got {bad} of {value.size} NaN or "
            f"infinite as {value.dtype}; training diverged or the file is damaged: take an earlier step or "
            "download it"
        )
    return value


def count_nonfinite(leaf: np.ndarray) -> int:
    """How many values are NaN or infinite, without a temporary of its size."""
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return 0
    bits = leaf.reshape(-1).view(f"u{leaf.dtype.itemsize}")
    exponent = np.array(np.inf, leaf.dtype).view(bits.dtype)  # infinity is the bare exponent, NaN has it too
    blocks = (bits[i : i + _BLOCK] for i in range(0, bits.size, _BLOCK))
    return sum(int(np.count_nonzero((b & exponent) == exponent)) for b in blocks)
