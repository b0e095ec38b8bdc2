"""Draws the pictures of the documentation that need no policy: docs/figures/*.png.

python scripts/make_figures.py [FOLDER]
"""

import sys
from pathlib import Path

from safe_pruner_jax.plotting import paths_diagram

FIGURES = {"two_paths": paths_diagram}


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        draw().savefig(folder / f"{name}.png", dpi=150, metadata={"Software": None})  # the same bytes every time
        print(folder / f"{name}.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "docs" / "figures")
