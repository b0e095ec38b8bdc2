"""Help on one screen: every option of a command in a line, groups that are rarely used in one line together.

`--help-all` is tyro's own help, with all of it.
"""

import dataclasses
import enum
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

COLUMNS = 100
FLAG = 34
"""Columns of an option and its default."""


def documented(docstring: str | None) -> dict[str, str]:
    """Name → text of a docstring's Args, without line breaks.

    >>> documented("One line.\\n\\n    Args:\\n      a, b: two\\n        of them.\\n      c: another.\\n")
    {'a': 'two of them.', 'b': 'two of them.', 'c': 'another.'}
    """
    _, _, block = inspect.cleandoc(docstring or "").partition("Args:\n")
    texts: dict[str, str] = {}
    for entry in re.split(r"\n(?=  \S)", "\n" + block.partition("\n\n")[0]):
        names, colon, text = entry.strip().partition(":")
        if colon:
            texts |= dict.fromkeys(re.split(r",\s*", names), " ".join(text.split()))
    return texts


def option(name: str, default: Any, text: str) -> str:
    """One line: the option, its default, and its text up to the first full stop, as far as the line goes."""
    shown = "" if default in (None, "", (), False) or default is dataclasses.MISSING else _shown(default)
    start = f"  --{name.replace('_', '-')} {shown}".rstrip()
    brief = re.split(r"\. |\.$", text)[0]
    line = f"{start:{FLAG}}  {brief}" if len(start) <= FLAG else f"{start}  {brief}"
    return line if len(line) <= COLUMNS else line[: COLUMNS - 1].rpartition(" ")[0] + " …"


def _shown(default: Any) -> str:
    if isinstance(default, enum.Enum):
        return default.name
    if isinstance(default, tuple):
        return " ".join(map(str, default))
    return str(default)


def fields(command: type) -> Iterator[str]:
    """The options of a command; a nested group of them in one line, a choice of sub-commands in one line."""
    texts: dict[str, str] = {}
    for base in reversed(command.__mro__):
        texts |= documented(base.__doc__)
    for field in dataclasses.fields(command):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if field.name == "policy":
            continue
        if dataclasses.is_dataclass(default):
            count = len(dataclasses.fields(default))
            yield f"  --{field.name}.…{'':{FLAG - 5 - len(field.name)}} {count} more: {texts.get(field.name, '')}"
        else:
            yield option(field.name, default, texts.get(field.name, ""))


def choices(pruner: str, factory: Callable) -> Iterator[str]:
    """The options of a method."""
    texts = documented(factory.__doc__)
    yield f"{pruner} (--pruner={pruner}):"
    for name, parameter in inspect.signature(factory).parameters.items():
        yield option(f"pruner.{name}", parameter.default, texts.get(name, ""))


def summary(prog: str, command: type, pruner: tuple[str, Callable] | None = None) -> str:
    """The help of a command, at most 50 lines."""
    policy = any(field.name == "policy" for field in dataclasses.fields(command))
    usage = f"usage: {prog} [options]{' [policy]' if policy else ''}"
    lines = [f"{usage}; --help-all: everything, in full sentences", "", inspect.cleandoc(command.__doc__ or "")]
    lines[-1] = lines[-1].partition("\n")[0]
    lines += ["", *fields(command)]
    if pruner is not None and pruner[0] != "none":
        lines += [*choices(*pruner)]
    if policy:
        lines += ["policy:checkpoint --policy.config NAME --policy.dir FOLDER | policy:default | policy:embedded"]
    return "\n".join(lines)
