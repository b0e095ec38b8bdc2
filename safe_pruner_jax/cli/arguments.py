"""A command's arguments, and those of `--pruner=NAME`, which are its factory's."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Annotated, Any

import tyro
from tyro.conf import arg

from safe_pruner_jax import pruners
from safe_pruner_jax.policy.spec import Method


def split_pruner(argv: Sequence[str]) -> tuple[str, list[str]]:
    """Takes `--pruner NAME` or `--pruner=NAME` out of the arguments; "none" without one.

    >>> split_pruner(["--port", "1", "--pruner=safe", "--pruner.keep", "0.3"])
    ('safe', ['--port', '1', '--pruner.keep', '0.3'])
    """
    rest, name, items = [], "none", iter(argv)
    for item in items:
        if item == "--pruner":
            name = next(items, "")
        elif item.startswith("--pruner="):
            name = item.removeprefix("--pruner=")
        else:
            rest.append(item)
    return name, rest


def parse(command: type, argv: Sequence[str], prog: str) -> tuple[Any, Method]:
    """A command's arguments and its method.

    `--pruner=none` is the full path with exactly openpi's replies; every other name adds `pruning` to them.

    Raises:
      ValueError: an unknown pruner or a choice out of range.
    """
    name, rest = split_pruner(argv)
    pruner = "full" if name == "none" else name

    # tyro would report the ValueError of a factory as a usage error of its own: check choices after parsing
    @functools.wraps(pruners.factory(pruner))
    def choices(**all_of_them: Any) -> dict[str, Any]:
        return all_of_them

    field = ("pruner", Annotated[Any, arg(constructor=choices)])
    arguments = dataclasses.make_dataclass("Arguments", [field], bases=(command,), frozen=True, kw_only=True)
    arguments.__doc__ = command.__doc__
    args = tyro.cli(arguments, args=rest, prog=prog, config=(tyro.conf.CascadeSubcommandArgs,))
    options = {item.partition("=")[0] for item in rest if item.startswith("--pruner.")}
    names = {option.removeprefix("--pruner.").removeprefix("no-").replace("-", "_") for option in options}
    method = Method(pruner, args.pruner, frozenset(names & set(args.pruner)), describe=name != "none")
    method.make()
    return args, method
