"""What every record of a measurement says beside its figures, and how it is written."""

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any


def begin(script: str, note: str, packages: Sequence[str] = ("jax",)) -> dict[str, Any]:
    """Command, machine, versions, and the load before anything is measured.

    Args:
      script: its file in benchmarks/.
      note: about the machine.
      packages: whose versions count.
    """
    return {
        "command": " ".join(["python", f"benchmarks/{script}", *sys.argv[1:]]),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "note": note,
        "versions": {name: version(name) for name in packages},
        "load": _load(),
    }


def write(record: Mapping[str, Any], out: Path | None) -> None:
    """Prints the record, with the load afterwards, and writes it to a file if there is one."""
    text = json.dumps({**record, "load": [*record["load"], *_load()]}, indent=2)
    if out is not None:
        out.write_text(text + "\n", encoding="utf-8")
    print(text)


def _load() -> list[float]:
    return [round(value, 1) for value in os.getloadavg()]
