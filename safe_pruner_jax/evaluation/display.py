"""How a run is shown while it goes on: a bar on a terminal, a line per episode in a log."""

import logging
from collections import Counter
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from safe_pruner_jax.evaluation.records import Record, RecordFile
from safe_pruner_jax.evaluation.workers import Job

logger = logging.getLogger(__name__)


class Display:
    """Episodes done and the running success, those included that the file held before.

    Args:
      jobs: of the run.
      file: its records.
      console: where to draw; stderr if None.
    """

    def __init__(self, jobs: Sequence[Job], file: RecordFile, console: Console | None = None):
        self._keys = {(job.suite, job.task, job.trial) for job in jobs}
        self._file = file
        self._before = len(self._keys & file.finished)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console or Console(stderr=True),
        )
        self._bar = self._progress.add_task("", total=len(self._keys))
        self._more: Callable[[], str] = lambda: ""

    def note(self, more: Callable[[], str]) -> None:
        """What else is shown behind the success, as it is at that moment."""
        self._more = more

    def update(self, record: Record | None = None) -> None:
        """After an episode: moves the bar, or logs the episode where there is no terminal to draw on."""
        done = len(self._keys & self._file.finished)
        self._progress.update(self._bar, completed=done, description=self.summary())
        if record is not None and not self._progress.console.is_terminal:
            name = f"{record.suite} task {record.task} trial {record.trial}"
            logger.info("%d/%d %s: %s; %s", done, len(self._keys), name, record.outcome, self.summary())

    def summary(self) -> str:
        """The running success in words; errors are neither success nor failure."""
        counts = Counter(record.outcome for key, record in self._file.records.items() if key in self._keys)
        played = counts["success"] + counts["failure"]
        share = f"success {counts['success']}/{played}" + (f" = {counts['success'] / played:.1%}" if played else "")
        errors = f", {counts['error']} errors" if counts["error"] else ""
        return "; ".join(filter(None, (share + errors, self._more())))

    def __enter__(self) -> "Display":
        if self._before:
            logger.info("%d of %d episodes are in %s already", self._before, len(self._keys), self._file.path)
        if self._progress.console.is_terminal:
            self._progress.start()
        self.update()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.update()
        if self._progress.console.is_terminal:
            self._progress.stop()
        logger.info("%d/%d episodes: %s", len(self._keys & self._file.finished), len(self._keys), self.summary())
