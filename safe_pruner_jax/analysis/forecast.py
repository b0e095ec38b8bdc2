"""How well saliency is forecast from an earlier call (SAFE-Pruner, App. B, Fig. A).

    rows = measure(trace, cut=3)          cosine and KL of every pair of calls up to 10 apart
    table(rows), figure(rows)

The paper takes call 0 as the keyframe and forecasts calls 1 to 10 of the same subtask (`references="first"`). By
default every call is the keyframe of the next ten, and pairs with a subtask boundary between them are counted apart.
The cosine of the shallow saliency is κ (Eq. 6).
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Literal

import numpy as np
from matplotlib.figure import Figure

from safe_pruner_jax.analysis.measures import Matches, cosine, divergence
from safe_pruner_jax.analysis.recall import QUERIES
from safe_pruner_jax.analysis.rows import Row, rounded
from safe_pruner_jax.analysis.trace import Trace
from safe_pruner_jax.arrays import Layers
from safe_pruner_jax.figures.theme import MARKERS, colour, form, grid, legend, markdown
from safe_pruner_jax.pruners import Capture

LATE = "late (mean of L_d)"
UNMATCHED = f"{LATE}, same slot"
"""The control: the keyframe's late saliency slot by slot, without matching."""
HARD = f"{LATE}, most similar token"
"""The control of a soft correspondence: the late saliency of the most similar token alone, as in Algorithm 2."""


def measure(
    trace: Trace,
    *,
    cut: int = 3,
    late_layers: Layers = (0, -2, -1),
    late_steps: str = "half",
    soft: float = 0.0,
    ages: int = 10,
    references: Literal["every", "first"] = "every",
) -> list[Row]:
    """Forecast accuracy of one episode.

    Args:
      trace: of the episode.
      cut: the shallow saliencies are of layer cut - 1.
      late_layers, late_steps, soft: as in `safe`.
      ages: calls from the keyframe to the forecast one, at most.
      references: calls that are keyframes.

    Returns:
      One row per "quantity" ("shallow action" and so on, "layer l" for l in L_d, their mean, `LATE`, and the controls
      `UNMATCHED` and, with `soft` above 0, `HARD`), "age" and "within" (no boundary between the two calls), with lists
      "cosine" and "kl" over the pairs.
    """
    late, match = trace.late(late_steps), Matches(trace, soft=soft)
    hard = Matches(trace) if soft else match
    layers = sorted({l % trace.depth for l in late_layers})
    truth = {f"shallow {q}": trace.captured(Capture(cut - 1, q)) for q in QUERIES}
    truth |= {f"layer {l}": late[:, l] for l in layers}
    truth[LATE] = late[:, layers].mean(1)
    pairs_of: dict[tuple, list[tuple[float, float]]] = defaultdict(list)
    for t in range(len(trace)):
        earlier = range(max(0, t - ages), t)
        for reference in earlier if references == "every" else [r for r in earlier if r == 0]:
            within = bool(trace.subtask[t] == trace.subtask[reference])
            for name, s in truth.items():
                forecasts = {name: match.forecast(s[reference], t, reference)}
                if name == LATE:
                    forecasts[UNMATCHED] = np.where(trace.alive[t], s[reference], 0.0)
                    forecasts |= {HARD: hard.forecast(s[reference], t, reference)} if soft else {}
                for of, predicted in forecasts.items():
                    pairs_of[of, t - reference, within].append((cosine(s[t], predicted), divergence(s[t], predicted)))
    return [
        {"quantity": name, "age": age, "within": within}
        | {"pairs": len(pairs), "cosine": rounded(c for c, _ in pairs), "kl": rounded(k for _, k in pairs)}
        for (name, age, within), pairs in pairs_of.items()
    ]


def values(rows: Sequence[Row], quantity: str, key: str, *, within: bool, age: int | None = None) -> np.ndarray:
    """All "cosine" or "kl" values of a quantity, of one age or of all; undefined ones left out."""
    chosen = (r for r in rows if (r["quantity"], r["within"]) == (quantity, within) and age in (None, r["age"]))
    return np.array([v for r in chosen for v in r[key] if v is not None])


def quantities(rows: Sequence[Row]) -> list[str]:
    """The quantities there are, in the order of the rows."""
    return list(dict.fromkeys(row["quantity"] for row in rows))


def table(rows: Sequence[Row]) -> str:
    """Mean cosine at the first and the last age, its lowest mean over the ages, and the mean divergence."""
    ages = sorted({row["age"] for row in rows})
    mean = lambda v: float(v.mean()) if len(v) else None
    lines = []
    for name in quantities(rows):
        for within in (True, False):
            by_age = [mean(values(rows, name, "cosine", within=within, age=age)) for age in ages]
            by_age = [v for v in by_age if v is not None]
            all_of = values(rows, name, "cosine", within=within)
            if by_age:
                cells = [by_age[0], by_age[-1], min(by_age), mean(values(rows, name, "kl", within=within))]
                place = "within" if within else "across"
                lines.append([f"{name}, {place}", len(all_of), *(form(v, "{:.3f}") for v in cells)])
    head = ["forecast of", "pairs", "cosine, nearest", "cosine, farthest", "cosine, worst age", "KL, nats"]
    return markdown(head, lines)


def figure(rows: Sequence[Row]) -> Figure:
    """Cosine and KL against the age of the keyframe: solid within a subtask, dashed across a boundary."""
    drawn, axes = grid(2)
    ages = sorted({row["age"] for row in rows})
    for ax, key, title in zip(axes, ("cosine", "kl"), ("cosine similarity", "KL divergence, nats"), strict=True):
        for place, name in enumerate(quantities(rows)):
            for within, line in ((True, "-"), (False, "--")):
                by_age = {age: values(rows, name, key, within=within, age=age) for age in ages}
                points = [(age, v.mean()) for age, v in by_age.items() if len(v)]
                if points:
                    label = {"label": name} if within else {}
                    look = {"color": colour(place), "lw": 1.3, "ms": 3, "marker": MARKERS[place]}
                    ax.plot(*zip(*points, strict=True), line, **look | label)
        ax.set(xlabel="calls since the keyframe", title=title)
    legend(drawn, axes, title="solid: within a subtask · dashed: across a boundary", title_fontsize=9)
    return drawn
