"""How different the two sets are that VLA-Pruner combines (its Fig. 2a-b and 11).

    rows = measure(trace, cut=3)          one row per share kept
    table(rows), figure(rows)

C_vl are the top-K by the attention of all prefix rows in the layer before the cut (Eq. 2), C_act those by the decayed
action attention of the calls before (Eq. 7). |C_vl ∪ C_act| / |C_vl| is 1 where they agree and 2 where they share no
token: then combining them matters, and so does the filter that follows. Taken from full passes, so no call suffers from
what an earlier one dropped.
"""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from safe_pruner_jax.analysis.measures import top
from safe_pruner_jax.analysis.rows import Row, rounded
from safe_pruner_jax.analysis.trace import Trace
from safe_pruner_jax.figures.theme import legend, markdown, panels
from safe_pruner_jax.pruners import Capture

KEEPS = (0.5, 0.25, 0.2, 0.125, 0.1)


def measure(
    trace: Trace, *, cut: int = 3, window: int = 3, decay: float = 0.8, keeps: Sequence[float] = KEEPS
) -> list[Row]:
    """The ratio at every call whose window is filled.

    Args:
      trace: of the episode.
      cut: layer before which tokens are dropped.
      window, decay: w and γ.
      keeps: shares kept.

    Returns:
      One row per "keep" with a list "ratio" over the calls, empty in an episode of at most w calls.
    """
    semantic = trace.captured(Capture(cut - 1, "all", over="all"))
    action = trace.late()[:, trace.depth // 2 :].mean(1)
    rows = []
    for keep in keeps:
        ratios = []
        for t in range(window, len(trace)):
            past = sum(decay**i * action[t - i] for i in range(1, window + 1))
            vl, act = (top(s, trace.alive[t], keep) for s in (semantic[t], past))
            ratios.append((vl | act).sum() / vl.sum())
        rows.append({"keep": keep, "ratio": rounded(ratios)})
    return rows


def ratios(rows: Sequence[Row]) -> dict[float, np.ndarray]:
    """keep → the ratios of all calls."""
    by_keep: dict[float, list[float]] = defaultdict(list)
    for row in rows:
        by_keep[row["keep"]] += row["ratio"]
    return {keep: np.array(values) for keep, values in sorted(by_keep.items(), reverse=True) if values}


def table(rows: Sequence[Row]) -> str:
    """Mean, least and largest ratio at every share kept."""
    lines = [
        [f"{keep:.1%}", len(r), f"{r.mean():.3f}", f"{r.min():.3f}", f"{r.max():.3f}"]
        for keep, r in ratios(rows).items()
    ]
    return markdown(["kept", "calls", "size of the union / K", "least", "largest"], lines)


def figure(rows: Sequence[Row]) -> Figure:
    """The ratio call by call, mean over episodes, one line per share kept."""
    drawn, axes = panels(1, width=5.5)
    for keep in ratios(rows):
        shares = [row["ratio"] for row in rows if row["keep"] == keep]
        at = [[r[i] for r in shares if i < len(r)] for i in range(max(map(len, shares)))]
        axes[0, 0].plot([np.mean(values) for values in at], marker="o", ms=3, lw=1.2, label=f"{keep:.1%} kept")
    axes[0, 0].set(xlabel="call after the window is filled", ylabel="size of the union / K", ylim=(1, 2))
    legend(drawn, axes.flat)
    return drawn
