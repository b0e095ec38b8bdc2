"""`openpi report`: records in, a table and figures out."""

import dataclasses
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from safe_pruner_jax.evaluation import report
from safe_pruner_jax.evaluation.figures import report_figures
from safe_pruner_jax.evaluation.records import read_records
from safe_pruner_jax.evaluation.shards import check_shards


@dataclasses.dataclass(frozen=True)
class Report:
    """Turn records into a table, and with --out into files and figures.

    Args:
      files: from `openpi evaluate`, any number; parts of one run (name.1-of-4.jsonl) must be of one configuration.
      format: of what is printed.
      baseline: method that the others are compared to, as the table names it, at the same ratio if it has several.
      out: folder for report.md, report.csv and the figures.
    """

    files: Positional[tuple[Path, ...]]
    format: Literal["markdown", "csv"] = "markdown"
    baseline: str = "full"
    out: Path | None = None


def run_report(args: Report) -> None:
    """Prints the table; writes the rest if asked."""
    files = {path: read_records(path) for path in args.files}
    check_shards(files)
    rows = report.summarise((record for records in files.values() for record in records), args.baseline)
    texts = {"markdown": report.markdown(rows, args.baseline), "csv": report.table_csv(rows)}
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "report.md").write_text(texts["markdown"], encoding="utf-8")
        (args.out / "report.csv").write_text(texts["csv"], encoding="utf-8")
        for name, figure in report_figures(rows).items():
            figure.savefig(args.out / f"{name}.png")
    print(texts[args.format], end="")
