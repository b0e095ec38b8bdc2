"""Draws the pictures of the documentation: docs/figures/*.png.

    python scripts/make_figures.py                            all of them
    python scripts/make_figures.py kept --out /tmp/figures    one, somewhere else

Most are drawn from rows in benchmarks/results. `kept` plays the recording inside the package to the embedded policy,
once per method, and draws what each is left with at the same call; it compiles every method and takes minutes on a
CPU. `diagnose` asks the policy, too. docs/figures/README.md lists all of them.
"""

import dataclasses
import json
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import tyro
from matplotlib.figure import Figure
from PIL import Image
from tyro.conf import Positional

from safe_pruner_jax import pruners
from safe_pruner_jax.analysis import (
    attention,
    controls,
    cost,
    diagnose,
    forecast,
    kappa,
    recall,
)
from safe_pruner_jax.analysis.episodes import EXAMPLE, episodes
from safe_pruner_jax.analysis.rows import read_rows
from safe_pruner_jax.bench import launch_tables, launches
from safe_pruner_jax.bench.picture import bars
from safe_pruner_jax.evaluation.figures import success_by_flops
from safe_pruner_jax.evaluation.records import read_records
from safe_pruner_jax.evaluation.report import ALL, summarise
from safe_pruner_jax.figures.kept import Shown, methods_figure, paths_diagram
from safe_pruner_jax.policy.loading import calibrated, load_policy

FOLDER = Path(__file__).parents[1] / "docs" / "figures"
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
EQUAL = ("libero_object10_112_t0", "libero_object10_swap_112_t0", "libero_object10_shuffled_112_t0")
ZERO = "safe-cut0-warm_start1-threshold-1-pool1.5-keep"
LINES = {
    "full": ("full",),
    "safe, cut 0": tuple(f"{ZERO}{keep}" for keep in (0.2, 0.3, 0.4)),
    "safe, cut 3, 20 %": ("safe-keep0.2",),
    "divprune": ("divprune-keep0.3", "divprune-warm_start1-keep0.4", "divprune-keep0.6"),
    "sparsevlm": ("sparsevlm-keep0.4",),
    "vla_pruner": ("vla_pruner-cut1-window1-keep0.3", "vla_pruner-window2-keep0.4"),
    "fastv": ("fastv-cut1-keep0.4", "fastv-warm_start1-keep0.4"),
}
"""Name in the figure → cells, which decision 0030 chose."""


def rows(name: str) -> list[dict]:
    """Rows of an analysis."""
    return read_rows(RESULTS / f"{name}.jsonl")


def equal_cost() -> Figure:
    """Success against multiply-adds of settings within one budget, on every suite that has played them."""
    rows = []
    for name, cells in LINES.items():
        files = [RESULTS / folder / f"{cell}.jsonl" for folder in EQUAL for cell in cells]
        records = [record for path in files if path.exists() for record in read_records(path)]
        rows += [dataclasses.replace(row, method=name) for row in summarise(records) if not row.suite.startswith(ALL)]
    return success_by_flops(rows, together=len(LINES))


def cameras() -> Figure:
    """Which camera and region the embedded policy attends to."""
    (recording,) = episodes(EXAMPLE)
    policy = load_policy("mini_libero", pruner=pruners.make("full"))
    return diagnose.figure(diagnose.measure(policy, [call.request for call in recording.calls()]))


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
    reports = {change: launch_tables.record(RESULTS, name) for name, change in launch_tables.CHANGES.items()}
    return launches.ladder(reports, "h100")


def late(quantities: list[dict]) -> list[dict]:
    """Rows of the forecast of late layers: by correspondence, hard and soft, and without."""
    return [row for row in quantities if row["quantity"] in (forecast.LATE, forecast.UNMATCHED, forecast.HARD)]


FIGURES: dict[str, Callable[[], Figure]] = {
    "two_paths": paths_diagram,
    "kept": kept,
    "launches": ladder,
    "success_by_flops": equal_cost,
    "recall": lambda: recall.figure(rows("recall_object10_112")),
    "forecast": lambda: forecast.figure(late(rows("forecast_object10_112"))),
    "kappa": lambda: kappa.figure([row for row in rows("kappa_object10_112") if row["queries"] == "all"], 0.934),
    "cost": lambda: cost.figure(rows("cost_object10_112")),
    "attention": lambda: attention.figure(rows("attention_object10_112"), rows("carried_object10_112")),
    "attention_beside": lambda: attention.beside(
        {
            "without attention loss": rows("attention_object10_unsupervised_112"),
            "with attention loss": rows("earlier/attention_object10_second_112"),
        }
    ),
    "controls": lambda: controls.figure(rows("controls_object10_112")),
    "step_mini_cpu": lambda: bars(json.loads((RESULTS / "step_mini_cpu.json").read_text(encoding="utf-8"))),
    "diagnose": cameras,
}


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
