"""Writes the tables of the documentation that come from records, from benchmarks/results.

    python scripts/make_tables.py            writes them
    python scripts/make_tables.py --check    says which differ, and ends with 1 if one does

A table stands in one of `PAGES` between `<!-- table: NAME -->` and `<!-- end -->`.
"""

import re
import sys
from pathlib import Path

from safe_pruner_jax.bench import launch_tables
from safe_pruner_jax.evaluation.tables import beside, brief, by_share, effort

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = tuple(
    ROOT / name
    for name in ("README.md", "docs/results.md", "docs/performance.md", "docs/decisions/0022-few-launches.md")
)
SUITES = {
    "LIBERO-Object": RESULTS / "libero_object10_112_t0",
    "things swapped": RESULTS / "libero_object10_swap_112_t0",
}
SHUFFLED = {"shuffled": RESULTS / "libero_object10_shuffled_112_t0"}
MORE = {"tight": SHUFFLED}
"""Further suites of a budget's table."""
SAFE = "safe-keep0.2"
SHARES = {
    "full": "`full`: every token",
    SAFE: "**`safe`**",
    "safe-paper-keep0.2": "`safe`, the paper's features and λ",
    "safe-shallow-keep0.2": "`safe`, no forecast (λ = 0)",
    "vla_pruner-keep0.2": "`vla_pruner`",
    "fastv-keep0.2": "`fastv`",
}
"""At 20 % kept, choices of the policy's calibration and of the papers: file → title."""
FIRST = "safe-cut0-warm_start1-threshold-1-pool1.5-keep0.4"
LEAST = "safe-cut0-warm_start1-threshold-1-pool1.5-keep0.2"
BUDGETS = {
    "least": {
        "full": "`full`",
        LEAST: "**`safe`**, cut 0, μ = 1.5, 20 %",
        "safe-cut0-warm_start1-threshold-1-pool1.5-soft0.1-keep0.2": "the same, T = 0.1",
        "divprune-keep0.3": "`divprune`, 30 %",
    },
    "tight": {
        "full": "`full`",
        FIRST: "**`safe`**, cut 0, μ = 1.5, 40 %",
        "safe-cut0-warm_start1-threshold-1-pool1.5-keep0.3": "the same, 30 %",
        "safe-cut1-warm_start1-threshold0.7-pool2.5-keep0.3": "`safe`, cut 1, μ = 2.5, 30 %",
        "safe-cut1-warm_start1-threshold0.7-keep0.3": "`safe`, cut 1, μ = 1, 30 %",
        "safe-paper-cut1-warm_start1-threshold0.7-keep0.3": "the same, the paper's features and λ",
        "safe-shallow-cut1-warm_start1-threshold0.7-keep0.3": "the same, no forecast (λ = 0)",
        "divprune-warm_start1-keep0.4": "`divprune`, w = 1, 40 %",
        "sparsevlm-keep0.4": "`sparsevlm`, 40 %",
        "vla_pruner-cut1-window1-keep0.3": "`vla_pruner`, cut 1, w = 1, 30 %",
        "fastv-cut1-keep0.4": "`fastv`, cut 1, 40 %",
        "random-cut1-keep0.4": "`random`, cut 1, 40 %",
    },
    "loose": {
        "full": "`full`",
        FIRST: "**`safe`**, cut 0, μ = 1.5, 40 %",
        "safe-cut1-warm_start1-threshold0.9-keep0.4": "`safe`, cut 1, γ = 0.9, 40 %",
        SAFE: "`safe` as above, 20 %",
        "divprune-keep0.6": "`divprune`, 60 %",
        "vla_pruner-window2-keep0.4": "`vla_pruner`, w = 2, 40 %",
        "fastv-warm_start1-keep0.4": "`fastv`, w = 1, 40 %",
    },
}
"""Within 0.65, 0.73 and 0.80 of the multiply-adds of `full` (decision 0030); the second cell is what others meet."""
ABLATIONS = {
    SAFE: "**`safe`**, as calibrated",
    "safe-paper-keep0.2": "the paper's features and λ",
    "safe-shallow-keep0.2": "no forecast (λ = 0)",
    "safe-threshold-1-keep0.2": "no keyframes after the first three",
    "safe-threshold-1-every3-keep0.2": "a keyframe every three calls",
    "safe-warm_start1-keep0.2": "one full call at the start, not three",
    "safe-lateprefix-keep0.2": "late saliency of the prefix, not of the expert",
    "safe-late_stepsall-keep0.2": "of all denoise steps, not of half of them",
    "safe-queriesaction-keep0.2": "the rows of the actions choose, not of all tokens",
}
"""One choice of `safe` changed at 20 % kept."""
METHODS = {
    "safe": "**`safe`**",
    "safe-shallow": "`safe`, no forecast (λ = 0)",
    **{name: f"`{name}`" for name in ("vla_pruner", "sparsevlm", "divprune", "fastv")},
}
"""At several shares, choices as in `SHARES`."""
FRONT = {
    "full": "`full`",
    FIRST: "**`safe`**, layer 0",
    "sparsevlm-keep0.4": "`sparsevlm`",
    "divprune-warm_start1-keep0.4": "`divprune`",
    "vla_pruner-cut1-window1-keep0.3": "`vla_pruner`",
    "fastv-cut1-keep0.4": "`fastv`",
    SAFE: "`safe`, layer 3 (0.79)",
}
"""The README's: about 0.72 of the multiply-adds unless said otherwise."""


def tables() -> dict[str, str]:
    """Name → Markdown; raises FileNotFoundError or ValueError for a record that is missing."""
    return {
        "result": brief(FRONT, SUITES | SHUFFLED),
        "shares": beside(SHARES, SUITES, against=SAFE),
        "effort": effort(SHARES, SUITES),
        "ablations": beside(ABLATIONS, {"LIBERO-Object": SUITES["LIBERO-Object"]}, against=SAFE, keyframes=True),
        "kept": by_share(METHODS, SUITES["LIBERO-Object"], (0.5, 0.3, 0.2, 0.1)),
        **{name: beside(cells, SUITES | MORE.get(name, {}), against=list(cells)[1]) for name, cells in BUDGETS.items()},
        **launch_tables.tables(RESULTS),
    }


def main(check: bool) -> int:
    """Writes, or compares; the exit code."""
    before = {page: page.read_text(encoding="utf-8") for page in PAGES}
    after, differ = dict(before), False
    made = tables()
    if orphans := set(re.findall(r"<!-- table: (\w+) -->", "".join(before.values()))) - set(made):
        print(f"expected one of {', '.join(made)} in <!-- table: … -->, got {', '.join(sorted(orphans))}; remove it")
        return 1
    for name, table in made.items():
        place = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        page = next((page for page, text in after.items() if place.search(text)), None)
        if page is None:
            print(f"expected <!-- table: {name} --> in one of {', '.join(p.name for p in PAGES)}, got none; add it")
            return 1
        after[page] = place.sub(lambda found, table=table: f"{found[1]}\n{table.strip()}\n\n{found[2]}", after[page])
    for page, text in after.items():
        differ |= text != before[page]
        if not check:
            page.write_text(text, encoding="utf-8")
        elif text != before[page]:
            print(f"{page.name}: its tables are not those of benchmarks/results; run python scripts/make_tables.py")
    return int(check and differ)


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
