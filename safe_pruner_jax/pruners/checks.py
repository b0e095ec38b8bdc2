"""Choices of a pruner, checked one by one: what was expected, what came, what to do."""

import math
import numbers
from collections.abc import Sequence
from itertools import pairwise
from typing import Any


def require(ok: bool, name: str, expected: str, got: Any, hint: str = "") -> None:
    """A choice is as expected.

    >>> require(0 <= 2 <= 1, "fuse", "λ in [0, 1]", 2)
    Traceback (most recent call last):
    ValueError: fuse: expected λ in [0, 1], got 2

    Raises:
      ValueError: it is not; `hint` says what to do.
    """
    if not ok:
        raise ValueError(f"{name}: expected {expected}, got {got!r}" + (f"; {hint}" if hint else ""))


def one_of(words: Sequence[str], name: str, got: Any) -> None:
    """A choice is one of the known words; raises ValueError."""
    quoted = [f'"{word}"' for word in words]
    require(got in words, name, f"{', '.join(quoted[:-1])} or {quoted[-1]}", got)


def variant(got: Any) -> None:
    """As the paper describes the method, or as its authors' code does; raises ValueError."""
    one_of(("as_described", "as_released"), "variant", got)


def within(low: float, high: float, name: str, expected: str, got: Any) -> None:
    """A number in [low, high], which NaN is not; raises ValueError."""
    require(low <= got <= high, name, f"{expected} in [{low}, {high}]", got)


def at_least(low: float, name: str, expected: str, got: Any) -> None:
    """A finite number of at least `low`; raises ValueError."""
    require(_is_number(got) and low <= got < math.inf, name, expected, got)


def ascending(layers: Sequence[int], low: int, high: int, name: str = "layers") -> None:
    """At least one layer, each deeper than the one before, all in low..high; raises ValueError."""
    bounds = (low - 1, *layers, high + 1)
    deeper = all(a < b for a, b in pairwise(bounds))
    require(len(layers) > 0 and deeper, name, f"ascending layers of {low} to {high}", layers)


def share(keep: float, name: str = "keep") -> None:
    """A share of the visual tokens in (0, 1] and no count; raises ValueError."""
    expected = "a share of the visual tokens in (0, 1]"
    require(_is_number(keep) and 0 < keep <= 1, name, expected, keep, "use for example keep=0.2")


def whole(value: object, least: int) -> bool:
    """Whether a choice is a whole number, and no bool, of at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def check_layer(layer: int, least: int = 1) -> int:
    """A layer index of at least `least`; raises ValueError."""
    require(whole(layer, least), "cut", f"a layer index of at least {least}", layer, "use for example cut=3")
    return layer


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
