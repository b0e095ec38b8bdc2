"""Tables of the documentation, made of records: methods beside each other on several suites.

    brief({"full": "`full`", "safe-keep0.2": "`safe`"}, {"LIBERO-Object": folder})     for a front page
    beside(cells, folders, against="safe-keep0.2")                                     with another method, and the cost
    effort(cells, folders)                                                             what each spends
    by_share({"safe": "`safe`"}, folder, (0.5, 0.2))                                   methods at several shares kept

A cell is a file of a folder, as `openpi sweep` leaves it. `scripts/make_tables.py` writes these tables into the pages.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median

from safe_pruner_jax.evaluation.records import Record, read_records
from safe_pruner_jax.evaluation.report import Estimate, compare, contingency, mcnemar
from safe_pruner_jax.figures.theme import form, markdown

BASELINE = "full"
"""The cell that costs are shares of."""


def brief(cells: Mapping[str, str], folders: Mapping[str, Path]) -> str:
    """One line per cell, one column per suite: solved, and the paired difference to `full` in points.

    Args:
      cells: name of the file without .jsonl → how the table calls it.
      folders: how the table calls a suite → where its cells are; a suite that lacks one has a dash.

    Raises:
      ValueError: no suite has a cell; a suite lacks `full`.
    """
    full = _baselines(folders)

    def words(cell: str, suite: str, records: list[Record]) -> str | None:
        difference = points(compare(records, full[suite])[0])
        return solved(records) if cell == BASELINE or difference is None else f"{solved(records)}, {difference}"

    played = _read_all(cells, folders).items()
    lines = [[cells[cell], *(words(cell, *suite) for suite in suites.items())] for cell, suites in played]
    return markdown(["method", *folders], lines)


def beside(cells: Mapping[str, str], folders: Mapping[str, Path], *, against: str, keyframes: bool = False) -> str:
    """`brief` in columns of its own, the difference to another cell over all suites, and the multiply-adds.

    Args:
      cells, folders: as in `brief`.
      against: the other cell; p is of McNemar's exact test.
      keyframes: with the share of calls that were in full.

    Raises:
      ValueError: no suite has a cell; a suite lacks `full`.
    """
    full, reference = _baselines(folders), _together(_read_all([against], folders)[against])
    head = ["method"]
    for suite in folders:
        head += [suite, f"against `{BASELINE}`"]
    lines = []
    for cell, played in _read_all(cells, folders).items():
        line: list[str | None] = [cells[cell]]
        for suite, ours in played.items():
            line += [solved(ours), None if cell == BASELINE else points(compare(ours, full[suite])[0])]
        records, other = _together(played), [] if cell == against else reference
        _, first, second, _ = contingency(records, other)
        line += [points(compare(records, other)[0]), _p(mcnemar(first, second)) if other else None]
        line += [_full_calls(records)] if keyframes else []
        lines.append([*line, f"{_cost(played, full, 'exact_flops'):.2f}"])
    name = cells.get(against, against).partition(",")[0].strip("*")
    last = [*(["keyframes"] if keyframes else []), "multiply-adds"]
    return markdown([*head, f"against {name}", "p", *last], lines)


def effort(cells: Mapping[str, str], folders: Mapping[str, Path]) -> str:
    """One line per cell, over all suites: tokens, keyframes, steps to success, jump of the actions, multiply-adds.

    Args:
      cells, folders: as in `brief`.

    Returns:
      Tokens left after the last cut and the share of keyframes, means over all calls; steps, mean of solved episodes;
      jump where a chunk begins, relative to a step inside, median over episodes; multiply-adds per call as shares of
      `full`'s, in the papers' prefix and in everything that the programs compute.
    """
    full, lines = _baselines(folders), []
    for cell, played in _read_all(cells, folders).items():
        records = _together(played)
        steps = [r.steps for r in records if r.outcome == "success"]
        jumps = [r.jump["border"] / r.jump["inside"] for r in records if r.jump and r.jump["inside"]]
        lines.append(
            [
                cells[cell],
                f"{_per_call(records, 'kept'):.0f}",
                _full_calls(records),
                form(fmean(steps) if steps else None, "{:.0f}"),
                form(median(jumps) if jumps else None, "{:.2f}"),
                *(f"{_cost(played, full, name):.2f}" for name in ("paper_flops", "exact_flops")),
            ]
        )
    columns = ["method", "tokens kept", "keyframes", "steps to success", "jump", "multiply-adds, prefix", "all"]
    return markdown(columns, lines)


def by_share(methods: Mapping[str, str], folder: Path, shares: Sequence[float]) -> str:
    """One line per method, one column per share kept: solved, and in brackets multiply-adds as a share of `full`'s.

    Args:
      methods: name → how the table calls it; its cell at 20 % is NAME-keep0.2.
      folder: where the cells of a suite are; one that is not there has a dash.
      shares: kept, the columns.

    Raises:
      ValueError: the folder lacks `full`, or every cell of a method.
    """
    full, lines = _baselines({"": folder}), []
    for method, title in methods.items():
        played = [_read(folder, f"{method}-keep{share:g}") for share in shares]
        if not any(played):
            raise ValueError(f"methods: expected {method}-keep{shares[0]:g}.jsonl or another share, got none")
        words = (f"{solved(r)} ({_cost({'': r}, full, 'exact_flops'):.2f})" if r else None for r in played)
        lines.append([title, *words])
    return markdown(["method", *(f"{share:.0%}" for share in shares)], lines)


def solved(records: Sequence[Record]) -> str | None:
    """."47/50": successes of the episodes without error; None without any."""
    fine = [record for record in records if record.outcome != "error"]
    return f"{sum(record.outcome == 'success' for record in fine)}/{len(fine)}" if fine else None


def points(difference: Estimate | None) -> str | None:
    """A difference of success rates in points with its interval: "-6 [-16, +2]"."""
    if difference is None:
        return None
    sign = lambda value: f"{100 * value:+.0f}".replace("-", "−").replace("+0", "0").replace("−0", "0")
    return f"{sign(difference.value)} [{sign(difference.low)}, {sign(difference.high)}]"


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.2g}"


def _read(folder: Path, cell: str) -> list[Record]:
    path = folder / f"{cell}.jsonl"
    return read_records(path) if path.exists() else []


def _read_all(cells: Iterable[str], folders: Mapping[str, Path]) -> dict[str, dict[str, list[Record]]]:
    """Cell → suite → records; raises ValueError for a cell that no suite has."""
    played = {cell: {suite: _read(folder, cell) for suite, folder in folders.items()} for cell in cells}
    if missing := [cell for cell, suites in played.items() if not _together(suites)]:
        raise ValueError(f"cells: expected {missing[0]}.jsonl in one of the folders, got none")
    return played


def _baselines(folders: Mapping[str, Path]) -> dict[str, list[Record]]:
    full = {suite: _read(folder, BASELINE) for suite, folder in folders.items()}
    if missing := [suite for suite, records in full.items() if not records]:
        raise ValueError(f"folders: expected {BASELINE}.jsonl in each, got none for {', '.join(missing)}")
    return full


def _together(played: Mapping[str, Sequence[Record]]) -> list[Record]:
    return [record for records in played.values() for record in records]


def _full_calls(records: Sequence[Record]) -> str | None:
    """The share of calls that were in full: "35%"; None where all or none of them were."""
    share = sum(r.keyframes for r in records) / sum(r.calls for r in records)
    return form(share if 0 < share < 1 else None, "{:.0%}")


def _per_call(records: Sequence[Record], name: str) -> float:
    """Mean over all calls of what records have as their episode's mean."""
    return sum(getattr(r, name) * r.calls for r in records) / sum(r.calls for r in records)


def _cost(played: Mapping[str, Sequence[Record]], full: Mapping[str, Sequence[Record]], name: str) -> float:
    """Multiply-adds per call as a share of the full step's, mean over the suites that were played."""
    flops = lambda records: _per_call(records, name)
    return fmean(flops(ours) / flops(full[suite]) for suite, ours in played.items() if ours)
