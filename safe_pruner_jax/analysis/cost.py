"""FLOPs and speed-up against the pruning ratio ρ and the pruning layer ℓs (SAFE-Pruner, Fig. B).

    rows = [closed_form(config, layout, keep, cut) for …]        no device
    rows = measure(policy weights, config, example, …)           wall times of one ℓs, all ratios taking turns

Two counts of multiply-adds (`flops`): the paper's prefix and everything that runs. The time is that of a whole control
step with its result on the host, against the step that keeps every token in the same process. Keyframes are not in it.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from safe_pruner_jax.analysis.rows import Row
from safe_pruner_jax.engine.engine import Engine
from safe_pruner_jax.engine.flops import exact_flops, paper_flops, tokens_per_layer
from safe_pruner_jax.engine.state import Inputs
from safe_pruner_jax.figures.theme import band, colour, form, grid, legend, look, markdown
from safe_pruner_jax.model import pi0
from safe_pruner_jax.model.config import Pi0Config
from safe_pruner_jax.policy.policy import Policy, layout_of, pack
from safe_pruner_jax.pruners import PRUNERS, Pruner
from safe_pruner_jax.robots.transforms import Example
from safe_pruner_jax.timing import WARM_UP, Step, interleave, ratio
from safe_pruner_jax.tokens import PrefixLayout, budget


def closed_form(config: Pi0Config, layout: PrefixLayout, keep: float, cut: int, num_steps: int = 10) -> Row:
    """FLOPs of a pruned step and of the full one.

    Args:
      config: sizes of the model.
      layout: cameras and prompt slots as they run.
      keep: share 1-ρ of the visual tokens.
      cut: ℓs.
      num_steps: denoise steps.

    Returns:
      "keep", "cut", "kept" and "alive" tokens, "paper", "exact" multiply-adds of a pruned step, and "paper_speedup",
      "exact_speedup": the full step's over the pruned one's.
    """
    pruned, plain = PRUNERS["safe"](keep=keep, cut=cut).plan, PRUNERS["full"]().plan
    row: Row = {"keep": keep, "cut": cut, "kept": budget(keep, layout.visual), "alive": layout.visual}
    c = config.prefix
    paper = lambda plan, cut: paper_flops(tokens_per_layer(plan, layout, config.depth, pruned=cut), c.width, c.mlp_dim)
    exact = lambda plan, cut: exact_flops(config, plan, layout, pruned=cut, num_steps=num_steps).total
    for name, count in (("paper", paper), ("exact", exact)):
        row[name] = count(pruned, True)
        row[f"{name}_speedup"] = count(plain, False) / row[name]
    return row


def shares(policy: Policy, request: dict[str, Any]) -> tuple[float, float]:
    """Multiply-adds of a keyframe and of a pruned step of a policy's method, as shares of the step without pruning."""
    config, steps = policy.engine.config, len(policy.engine.weights.schedule.times)
    layout = layout_of(policy.transform.prepare(request)[0], config)
    count = lambda plan, pruned: exact_flops(config, plan, layout, pruned=pruned, num_steps=steps).total
    plain, method = count(PRUNERS["full"]().plan, False), policy.engine.pruner.plan
    return count(method, False) / plain, count(method, True) / plain


def measure(
    weights: pi0.Weights,
    config: Pi0Config,
    example: Example,
    *,
    keeps: Sequence[float],
    cut: int,
    rounds: int = 15,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Row]:
    """Wall times of pruned steps of one ℓs against the full step; every round runs every step once.

    Args:
      weights, config: the model.
      example: what is asked at every step.
      keeps: shares of the visual tokens kept.
      cut: ℓs.
      rounds: counted rounds, after `timing.WARM_UP`.
      clock: seconds.

    Returns:
      The rows of `closed_form` with "ms" and "full_ms" (medians), "speedup" (median of the rounds' ratios, which a slow
      moment of the machine hits on both sides) with its quartiles "low" and "high", and "rounds".
    """
    layout = layout_of(example, config)
    inputs = pack([example], layout)
    # γ = -1: no keyframe but the first
    pruners = [PRUNERS["full"](), *(PRUNERS["safe"](keep=keep, cut=cut, threshold=-1.0) for keep in keeps)]
    steps = [_stepper(weights, config, pruner, inputs, len(layout.cameras)) for pruner in pruners]
    times = list(
        interleave({str(i): step for i, step in enumerate(steps)}, rounds, warm_up=WARM_UP, clock=clock).values()
    )
    rows = []
    for keep, pruned in zip(keeps, times[1:], strict=True):
        gain = ratio(pruned, times[0])
        row = closed_form(config, layout, keep, cut, len(weights.schedule.times))
        row |= {"ms": 1e3 * float(np.median(pruned)), "full_ms": 1e3 * float(np.median(times[0]))}
        rows.append(row | {"speedup": gain.median, "low": gain.low, "high": gain.high, "rounds": rounds})
    return rows


def _stepper(weights: pi0.Weights, config: Pi0Config, pruner: Pruner, inputs: Inputs, cameras: int) -> Step:
    """One step behind a keyframe, with its result on the host."""
    engine = Engine(weights, config, pruner)
    _, control, _ = engine.step(engine.init((0,), cameras), jax.device_put(inputs))

    def step() -> None:
        actions, _, _ = engine.step(control, jax.device_put(inputs))
        jax.device_get(actions)

    return step


def table(rows: Sequence[Row]) -> str:
    """FLOPs and ratios; the measured column is a dash where nothing was timed."""
    lines = []
    for r in sorted(rows, key=lambda r: (r["cut"], -r["keep"])):
        measured = f"{r['speedup']:.2f}× ({r['low']:.2f}–{r['high']:.2f})" if "speedup" in r else None
        flops = [f"{r[name] / 1e9:.4g} ({r[f'{name}_speedup']:.2f}×)" for name in ("paper", "exact")]
        lines.append([f"{r['cut']}", f"{1 - r['keep']:.0%}", r["kept"], *flops, form(r.get("ms"), "{:.1f}"), measured])
    head = ["ℓs", "ρ", "kept tokens", "paper, 10⁹ (speed-up)", "exact, 10⁹ (speed-up)", "ms", "measured speed-up"]
    return markdown(head, lines)


def figure(rows: Sequence[Row]) -> Figure:
    """Paper's FLOPs, and the three speed-ups, against ρ; one line per ℓs."""
    quantities = [
        ("paper", 1e-9, "paper FLOPs, 10⁹"),
        ("paper_speedup", 1, "speed-up, paper FLOPs"),
        ("exact_speedup", 1, "speed-up, exact FLOPs"),
        ("speedup", 1, "speed-up, measured"),
    ]
    quantities = [item for item in quantities if any(item[0] in row for row in rows)]
    drawn, axes = grid(len(quantities))
    for ax, (key, unit, title) in zip(axes, quantities, strict=True):
        for place, cut in enumerate(sorted({row["cut"] for row in rows})):
            line = sorted((r for r in rows if r["cut"] == cut and key in r), key=lambda r: r["keep"])
            if line:
                x, y = [100 * (1 - r["keep"]) for r in line], [unit * r[key] for r in line]
                ax.plot(x, y, **look(place), label=f"ℓs = {cut}")
                if key == "speedup":
                    low, high = ([r[end] for r in line] for end in ("low", "high"))
                    band(ax, x, low, high, colour(place))
        ax.set(xlabel="visual tokens dropped ρ, %", title=title)
    legend(drawn, axes)
    return drawn
