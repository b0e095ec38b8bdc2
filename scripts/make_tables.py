"""Writes the tables of the documentation that come from compiled programs, from benchmarks/results.

    python scripts/make_tables.py            writes them
    python scripts/make_tables.py --check    says which differ, and ends with 1 if one does

A table stands in one of `PAGES` between `<!-- table: NAME -->` and `<!-- end -->`.
"""

import re
import sys
from pathlib import Path

from safe_pruner_jax.bench.launch_tables import tables

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "docs" / "performance.md", ROOT / "docs" / "decisions" / "0022-few-launches.md")


def main(check: bool) -> int:
    before = {page: page.read_text(encoding="utf-8") for page in PAGES}
    after, differ = dict(before), False
    for name, table in tables(ROOT / "benchmarks" / "results").items():
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
