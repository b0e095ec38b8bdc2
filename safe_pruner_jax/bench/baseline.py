"""openpi's own model beside ours: a child process, for it wants its own pins and, on some machines, all the memory."""

import contextlib
import json
import subprocess
from pathlib import Path
from typing import Any

PROGRAM = Path(__file__).with_name("openpi_step.py")


class OpenpiUnavailable(RuntimeError):
    """openpi cannot be run; the message says why and what to do."""


class Openpi:
    """One openpi model of the released sizes, compiled and waiting.

    Args:
      python: interpreter that can import openpi.
      options: of `openpi_step.py`: dtype, cameras, prompt, horizon, steps, variant.

    Raises:
      OpenpiUnavailable: no such interpreter, no openpi in it, or it ended, for example for want of memory.
    """

    def __init__(self, python: str, **options: Any):
        arguments = [str(part) for key, value in options.items() for part in (f"--{key}", value)]
        try:
            self._process = subprocess.Popen(
                [python, str(PROGRAM), *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        except OSError as error:
            raise OpenpiUnavailable(f"openpi's interpreter: {error}; give --openpi-python another one") from error
        self.facts: dict[str, Any] = {}
        while not self.facts:
            word, _, rest = self._line().partition(" ")
            if word == "ready":
                self.facts = json.loads(rest)

    def step_seconds(self) -> float:
        """Runs one control step; how long it took there."""
        try:
            self._process.stdin.write("step\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # `_line` tells why
        return float(self._line())

    def _line(self) -> str:
        line = self._process.stdout.readline()
        if line:
            return line.strip()
        code, error = self._process.wait(), self._process.stderr.read().strip().rpartition("\n")[2]
        reason = error or (f"killed by signal {-code}, often for want of memory" if code < 0 else f"exit code {code}")
        raise OpenpiUnavailable(f"openpi: {reason}; give --openpi-python an interpreter with openpi and its pins")

    def close(self) -> None:
        """Ends it; may be called again."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._process.stderr.close()
