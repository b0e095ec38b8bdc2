"""Draws the pictures of the documentation: docs/figures/*.png.

    python scripts/make_figures.py                            all of them
    python scripts/make_figures.py kept --out /tmp/figures    one, somewhere else

`two_paths` needs no policy. `kept` plays the recording inside the package to the embedded policy, once per method, and
draws what each is left with at the same call; it compiles every method and takes minutes on a CPU. `launches` reads
the results of `openpi bench --compile-for`.
Most are drawn from rows in benchmarks/results. `kept` plays the recording inside the package to the embedded policy,
once per method, and draws what each is left with at the same call; it compiles every method and takes minutes on a
CPU. `diagnose` asks the policy, too. docs/figures/README.md lists all of them.
"""

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
    calibrate,
    controls,
    cost,
    deviation,
    diagnose,
    forecast,
    kappa,
    recall,
)
from safe_pruner_jax.analysis.episodes import EXAMPLE, episodes
from safe_pruner_jax.analysis.rows import read_rows
from safe_pruner_jax.bench import launch_tables, launches
from safe_pruner_jax.bench.picture import bars
from safe_pruner_jax.evaluation.figures import success_by_flops, success_by_keep
from safe_pruner_jax.evaluation.records import read_records
from safe_pruner_jax.evaluation.report import Row, summarise
from safe_pruner_jax.figures.kept import Shown, methods_figure, paths_diagram
from safe_pruner_jax.policy.loading import calibrated, load_policy

FOLDER = Path(__file__).parents[1] / "docs" / "figures"
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


def rows(name: str) -> list[dict]:
    """Rows of an analysis."""
    return read_rows(RESULTS / f"{name}.jsonl")


def report(folder: str, *left_out: str) -> list[Row]:
    """The table of every cell of a sweep but some methods'."""
    files = [path for path in sorted((RESULTS / folder).glob("*.jsonl")) if not path.name.startswith(left_out)]
    return summarise([record for path in files for record in read_records(path)])


def calibration() -> Figure:
    """κ within and across subtasks, on the policy of version 0.1."""
    recalls, forecasts = (rows(f"calibrate_object3_112_t0/{name}") for name in ("recall", "forecast"))
    return calibrate.figure(forecasts, calibrate.propose(recalls, forecasts, keep=0.2, share=0.1))


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
    results = FOLDER.parents[1] / "benchmarks" / "results"
    read = lambda name: json.loads((results / f"launches_pi05_{name}.json").read_text())
    reports = {change: read(name) for name, change in launch_tables.CHANGES.items()}
    return launches.ladder(reports, "h100")


V01 = "libero_object3_112_t0"
ALONG = ("safe", "safe:warm_start=1", "safe:fuse=0.75,match=all,warm_start=1", "vla_pruner", "fastv", "random")
FIGURES: dict[str, Callable[[], Figure]] = {
    "two_paths": paths_diagram,
    "kept": kept,
    "launches": ladder,
    "success_by_keep": lambda: success_by_keep(report(V01, "vla_cache")),
    "success_by_flops": lambda: success_by_flops(report(V01, "vla_cache")),
    "actions_policy": lambda: deviation.figure(
        [row for row in rows("actions_object3_112_t0") if row["method"] in ALONG],
    ),
    "actions": lambda: deviation.figure(rows("actions_object3_112")),
    "recall": lambda: recall.figure(rows("recall_object3_112_t0")),
    "forecast": lambda: forecast.figure(rows("forecast_object3_112_t0")),
    "kappa": lambda: kappa.figure(rows("kappa_object3_112_t0"), 0.22),
    "cost": lambda: cost.figure(rows("cost_object3_112")),
    "calibrate": calibration,
    "attention": lambda: attention.figure(rows("attention_object10_112"), rows("carried_object10_112")),
    "attention_beside": lambda: attention.beside(
        {
            "without attention loss": rows("attention_object10_unsupervised_112"),
            "embedded": rows("attention_object10_112"),
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
