"""Where in the scene attention lies, and whether matching finds the same thing again: for labelled episodes.

    rows = masses(trace)          per query rows and layer: shares of attention on target, basket, gripper, the rest
    rows = carried(trace)         per pruned call: κ with and without matching, and how often the match is right

A token belongs to the classes of its pixels in proportion, see `libero.labels`. Attention that looks has more on the
target than the target has tokens; matching that works finds tokens of the class that a token has itself.
"""

from collections.abc import Sequence

import numpy as np

from safe_pruner_jax.analysis.episodes import Seen
from safe_pruner_jax.analysis.measures import Matches, cosine, references
from safe_pruner_jax.analysis.rows import Row, rounded
from safe_pruner_jax.analysis.trace import Trace
from safe_pruner_jax.libero.labels import CLASSES

REGIONS = ("target", "basket", "gripper", "other things")
"""What is told apart; background and arm are the rest."""


def shares(seen: Seen, tokens_per_camera: int) -> np.ndarray:
    """How much of every token each class has.

    Args:
      seen: classes [cameras, S, S] of one call.
      tokens_per_camera: a square number, whose root divides S.

    Returns:
      float64 [n, classes], rows sum to 1; class k of `libero.labels` is column k.

    Raises:
      ValueError: pictures that do not divide into tokens.
    """
    cameras, size, _ = seen.classes.shape
    side = int(np.sqrt(tokens_per_camera))
    if side * side != tokens_per_camera or size % side:
        raise ValueError(f"labels: expected a side that {side} tokens divide, got {size} pixels; collect them again")
    patch = size // side
    cells = seen.classes.reshape(cameras, side, patch, side, patch).transpose(0, 1, 3, 2, 4)
    cells = cells.reshape(cameras * tokens_per_camera, patch * patch)
    return (cells[..., None] == np.arange(cells.max() + 1)).mean(1)


def by_region(seen: Seen, tokens_per_camera: int) -> np.ndarray:
    """How much of every token each of `REGIONS` has: float64 [n, 4]."""
    share = shares(seen, tokens_per_camera)
    padded = np.pad(share, ((0, 0), (0, max(0, 1 + max(seen.target, seen.receptacle) - share.shape[1]))))
    target, basket = padded[:, seen.target], padded[:, seen.receptacle]
    things = padded[:, len(CLASSES) :].sum(1)
    return np.stack([target, basket, padded[:, CLASSES.index("gripper")], things - target - basket], axis=1)


def masses(trace: Trace) -> list[Row]:
    """Share of the attention on every region, layer by layer.

    Args:
      trace: of a labelled episode.

    Returns:
      One row per "queries" ("prompt" or "action") and "layer", with a list over the calls for each of `REGIONS`; and
      one of the queries "uniform" with layer None: the same for attention that is equal everywhere.
    """
    where = np.stack([by_region(seen, trace.layout.tokens_per_camera) for seen in trace.seen])
    uniform = trace.alive / trace.alive.sum(1, keepdims=True)

    def row(queries: str, layer: int | None, saliency: np.ndarray) -> Row:
        s = saliency / np.maximum(saliency.sum(1, keepdims=True), 1e-30)
        mass = np.einsum("cn,cnr->rc", s, where)
        return {"queries": queries, "layer": layer} | {name: rounded(m) for name, m in zip(REGIONS, mass, strict=True)}

    looks = {"prompt": trace.text, "action": trace.late()}
    rows = [row(queries, layer, s[:, layer]) for queries, s in looks.items() for layer in range(s.shape[1])]
    return [*rows, row("uniform", None, uniform)]


def carried(trace: Trace, prior: np.ndarray, *, cut: int = 3, every: int = 10) -> list[Row]:
    """κ (SAFE-Pruner, Eq. 6) as it is, without matching, and of a prior; and the share of right matches.

    Args:
      trace: of an episode; matches are judged only where it is labelled.
      prior: [n], mean shallow saliency of other episodes.
      cut: ℓs; the shallow saliency is that of the layer before it, with the prompt's rows.
      every: calls between keyframes within a subtask.

    Returns:
      One row per call but the first: "within" a subtask or not, cosines of its shallow saliency to that of the last
      keyframe "matched" and "same slot", and to the "prior"; "right" and "right, same slot": of the tokens that show a
      thing or the gripper, the share whose partner shows the same (None where nothing is labelled).
    """
    reference, match, shallow = references(trace.subtask, every), Matches(trace), trace.text[:, cut - 1]
    shown = [shares(seen, trace.layout.tokens_per_camera).argmax(1) for seen in trace.seen]
    rows: list[Row] = []
    for t in range(1, len(trace)):
        keyframe = reference[t] == t
        r = t - 1 if keyframe else reference[t]
        row: Row = {"within": bool(trace.subtask[t] == trace.subtask[r])}
        row["matched"] = cosine(shallow[t], match.forecast(shallow[r], t, r))
        row["same slot"], row["prior"] = cosine(shallow[t], shallow[r]), cosine(shallow[t], prior)
        if shown:
            thing = trace.alive[t] & (shown[t] > CLASSES.index("arm"))
            partners = {"right": match(t, r), "right, same slot": np.arange(thing.size)}
            row |= {name: _agreement(shown[t], shown[r][slots], thing) for name, slots in partners.items()}
        rows.append({name: value if isinstance(value, bool) else rounded([value])[0] for name, value in row.items()})
    return rows


def _agreement(one: np.ndarray, other: np.ndarray, among: np.ndarray) -> float:
    """Share of equal classes among some tokens; NaN without any."""
    return float((one == other)[among].mean()) if among.any() else float("nan")


def median(rows: Sequence[Row], name: str, within: bool | None = None) -> float | None:
    """Median of a column of `carried` over the calls within subtasks, across them, or (None) all; None without any."""
    values = [r[name] for r in rows if r.get(name) is not None and within in (None, r["within"])]
    return float(np.median(values)) if values else None
