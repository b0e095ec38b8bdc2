"""Writes the tables of docs/performance.md that come from compiled programs, from benchmarks/results.

    python scripts/make_tables.py            writes them
    python scripts/make_tables.py --check    says which differ, and ends with 1 if one does

A table stands between `<!-- table: NAME -->` and `<!-- end -->`.
"""

import re
import sys
from pathlib import Path

from safe_pruner_jax.bench.launch_tables import tables

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "performance.md"


def main(check: bool) -> int:
    before = page = PAGE.read_text(encoding="utf-8")
    for name, table in tables(ROOT / "benchmarks" / "results").items():
        place = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not place.search(page):
            print(f"{PAGE.name}: expected <!-- table: {name} -->, got none; add it where the table belongs")
            return 1
        page = place.sub(lambda found, table=table: f"{found.group(1)}\n{table.strip()}\n\n{found.group(2)}", page)
    if check:
        if page != before:
            print(f"{PAGE.name}: its tables are not those of benchmarks/results; run python scripts/make_tables.py")
        return int(page != before)
    PAGE.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
