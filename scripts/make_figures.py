"""Draws the pictures of the documentation: docs/figures/*.png.

    python scripts/make_figures.py                            all of them
    python scripts/make_figures.py kept --out /tmp/figures    one, somewhere else

`two_paths` needs no policy. `kept` plays the recording inside the package to the embedded policy, once per method, and
draws what each is left with at the same call; it compiles every method and takes minutes on a CPU. `launches` reads
the results of `openpi bench --compile-for`.
"""

import json
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import tyro
from matplotlib.figure import Figure
from PIL import Image
from tyro.conf import Positional

from safe_pruner_jax import pruners
from safe_pruner_jax.analysis.episodes import EXAMPLE, episodes
from safe_pruner_jax.bench import launches
from safe_pruner_jax.figures.kept import Shown, methods_figure, paths_diagram
from safe_pruner_jax.policy.loading import calibrated, load_policy

FOLDER = Path(__file__).parents[1] / "docs" / "figures"


def kept(keep: float = 0.2, call: int = 8) -> Figure:
    """One frame through every pruner: what is left after the last cut, slots that are computed for `vla_cache`."""
    policy, shown = load_policy("mini_libero"), []
    (recording,) = episodes(EXAMPLE)
    requests = [c.request for c in islice(recording.calls(), call + 1)]
    example, _ = policy.transform.prepare(requests[-1])
    for name in pruners.PRUNERS:
        choices = {} if name == "full" else {"keep": keep} | (calibrated() if name == "safe" else {})
        pruner = pruners.make(name, **choices)
        session = policy.with_pruner(pruner).session()
        pruning = [session.infer(request)["pruning"] for request in requests]
        last, keyframes = pruning[-1], sum(p["keyframe"] for p in pruning)
        count = "keyframe" if last["keyframe"] else f"{last['kept']} of {last['alive']}"
        print(f"{name}: {count}, {keyframes} of {len(pruning)} calls were keyframes")
        images = {c: np.asarray(i) for c, i in example.images.items() if example.image_mask[c]}
        shown.append(Shown(images, last["index"], f"{name} · {count}"))
    return methods_figure(shown, policy.engine.config.tokens_per_camera)


def ladder() -> Figure:
    """Control steps compiled for an H100, change by change, from benchmarks/results."""
    results = FOLDER.parents[1] / "benchmarks" / "results"
    changes = ("before", "savings", "kernels")
    reports = {name: json.loads((results / f"launches_pi05_{name}.json").read_text()) for name in changes}
    return launches.ladder(reports, "h100")


FIGURES = {"two_paths": paths_diagram, "kept": kept, "launches": ladder}


def main(names: Positional[tuple[str, ...]] = tuple(FIGURES), out: Path = FOLDER) -> int:
    """Draws figures.

    Args:
      names: which ones.
      out: folder.
    """
    if unknown := set(names) - set(FIGURES):
        print(f"make_figures: expected {', '.join(FIGURES)}, got {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    for name in names:
        path = out / f"{name}.png"
        FIGURES[name]().savefig(path, dpi=150, metadata={"Software": None})  # the same bytes every time
        Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main, description=__doc__))
