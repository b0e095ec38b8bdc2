"""The static side of a pruner: where tokens leave, and which attention it wants to see.

    Plan(Cut(3, 0.2), capture=(Capture(2, "last"),))                    one decision, before layer 3: FastV
    Plan(Cut(0, 0.2))                                                   before the first layer: DivPrune
    Plan(Cut(3, 0.5), later=(Later(7, 0.3), Later(16, 0.2)), depth=32)  three decisions, layers of a 32-layer model
    Plan(Cut(2, 0.5), dropped="reuse")                                  the others keep their old keys and values

Everything is hashable: a plan is part of the key that a program is compiled for.
"""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from safe_pruner_jax.arrays import Layers
from safe_pruner_jax.pruners.checks import check_layer, one_of
from safe_pruner_jax.tokens import check_keep

ROWS = ("action", "text", "last", "all", "each", "to_text", "heads_to_text", "entropy", "text_entropy")

PI05_DEPTH = 18
"""Layers of π0.5, to which a plan with a `depth` of its own is scaled."""


@dataclass(frozen=True)
class Capture:
    """Attention of one layer, as evidence.

    Args:
      layer: layer index; negative counts back from the cut (-1: the last layer before it); None: every layer there is
        (since the cut before, or of the whole model in `Plan.remember`), one entry each.
      rows: whose attention, head mean:
        "action"  action tokens in the expert at flow time 1 (only before the first cut)  [n]
        "text"    alive prompt rows, mean over them                                       [n]
        "last"    last alive prompt row                                                   [n]
        "all"     every alive row of the prefix, mean over them                           [n]
        "each"    every prompt row by itself, dead ones 0                                 [T, n]
        "to_text" the other way round: what visual row v pays to an alive prompt token    [n]
        "heads_to_text"  the same for each of the H heads                                 [H, n]
        "entropy" mean entropy of the rows that run, nats                                 []
        "text_entropy"   mean of -Σ a log a over visual keys, of alive prompt rows        []
      over: "visual" normalises over alive visual tokens (SAFE-Pruner, Eq. 1); "all" keeps the model's own
        probabilities. "to_text", "heads_to_text" and "entropy" always keep them.
    """

    layer: int | None
    rows: Literal["action", "text", "last", "all", "each", "to_text", "heads_to_text", "entropy", "text_entropy"]
    over: Literal["visual", "all"] = "visual"

    def __post_init__(self):
        one_of(ROWS, "queries", self.rows)
        one_of(("visual", "all"), "over", self.over)


@dataclass(frozen=True)
class Cut:
    """Visual tokens leave before layer `layer` (≥ 0); `keep` is a share or a count of the alive ones."""

    layer: int
    keep: float

    def __post_init__(self):
        check_keep(self.keep)
        check_layer(self.layer, 0)


@dataclass(frozen=True)
class Later:
    """A further cut of the pruned path; `keep` is again a share or count of all alive tokens, not of those left.

    `capture` is attention of the layers since the cut before; `compares` as in `Plan`.
    """

    layer: int
    keep: float
    capture: tuple[Capture, ...] = ()
    compares: tuple[tuple[str | float, str | float], ...] = ()

    def __post_init__(self):
        check_keep(self.keep)
        check_layer(self.layer, 1)
        if any(c.rows == "action" for c in self.capture):
            raise ValueError('capture: expected rows of the prefix at a later cut, got "action"; use "text"')


@dataclass(frozen=True)
class Plan:
    """All the engine must know to compile a pruner.

    Args:
      cut: where and how much is dropped first; None keeps everything.
      capture: attention wanted from layers before the cut, in the order of `Evidence.saliency`.
      late_layers: expert layers whose saliency (action rows) a step must leave behind as `Evidence.late`; negative
        counts from the end; "upper" is the latter half.
      late_steps: denoise steps averaged for it: "half" (second half), "all", "last".
      late_over: keys it is normalised over, as `Capture.over`.
      late_from: which steps leave it behind: "full" passes, or "every" step (dropped tokens have 0).
      later: further cuts of the pruned path, each with a decision of its own.
      dropped: "discard": a dropped token is gone. "reuse": it keeps the keys and values of the step before in its
        slot, for the prefix and the expert to see; only its own row is not computed.
      remember: attention of prefix layers that every step leaves behind as `Evidence.past`.
      depth: the depth of the model whose layers `cut`, `later` and `remember` name; `for_depth` scales them. None:
        they are meant as they are, like π0.5's.
      compares: matrix products of the decision, for `flops` alone: pairs of "visual" (n rows), "text" (T rows) or a
        share of the visual tokens.
    """

    cut: Cut | None = None
    capture: tuple[Capture, ...] = ()
    late_layers: Layers | Literal["upper"] = ()
    late_steps: Literal["half", "all", "last"] = "half"
    late_over: Literal["visual", "all"] = "visual"
    late_from: Literal["full", "every"] = "full"
    later: tuple[Later, ...] = ()
    dropped: Literal["discard", "reuse"] = "discard"
    remember: tuple[Capture, ...] = ()
    depth: int | None = None
    compares: tuple[tuple[str | float, str | float], ...] = ()

    def __post_init__(self):
        for name, words in (
            ("late_steps", ("half", "all", "last")),
            ("late_over", ("visual", "all")),
            ("late_from", ("full", "every")),
            ("dropped", ("discard", "reuse")),
        ):
            one_of(words, name, getattr(self, name))
        cut = self.cut.layer if self.cut else 0
        for c in self.capture:
            if c.layer is not None and not -cut <= c.layer < cut:
                raise ValueError(f"capture: layer {c.layer} is not computed before the cut {self.cut}")
        for c in self.remember:
            if c.rows in ("action", "each", "heads_to_text"):
                raise ValueError(f'remember: expected rows with one number per token or none, got "{c.rows}"')
        if self.later and self.cut is None:
            raise ValueError("later: expected a first cut before it, got none")
        cuts = self.cuts
        for a, b in pairwise(cuts):
            if b.layer <= a.layer or (b.keep > a.keep and (a.keep <= 1) == (b.keep <= 1)):
                raise ValueError(f"later: expected deeper layers and no more tokens than {a} keeps, got {b}")

    @property
    def cuts(self) -> tuple[Cut | Later, ...]:
        """All cuts, the first one first."""
        return (self.cut, *self.later) if self.cut else ()

    def for_depth(self, depth: int) -> "Plan":
        """The same plan with the layer indices of a model of `depth` layers, all non-negative; checked against it.

        Cuts are scaled to the model, but to no less than π0.5's depth: other plans name layers of π0.5, and these too
        stay where they are in a shallower model. They stay in order and behind the layers their evidence comes from;
        those that a shallow model has no layer for are left out. `remember` is scaled to the model, whose last prefix
        layer computes no attention, so it ends before.
        """
        share = 1 if self.depth is None else max(depth, PI05_DEPTH) / self.depth
        scale = lambda l: int(l * share + 0.5)
        cut, capture, later = self.cut, self.capture, []
        if cut:
            seen = max((c.layer for c in capture if c.layer is not None), default=-1)
            least = max(min(cut.layer, 1), seen + 1) if self.depth else 0
            cut = replace(cut, layer=max(scale(cut.layer), least))
            if cut.layer >= depth:
                raise ValueError(f"cut: expected a layer index below the model's depth {depth}, got {cut.layer}")
            capture = _resolve(capture, 0, cut.layer)
        last = cut
        for l in self.later:
            layer = max(scale(l.layer), last.layer + 1) if self.depth else l.layer
            if layer >= depth and self.depth:
                break
            if layer >= depth:
                raise ValueError(f"later: expected a layer index below the model's depth {depth}, got {layer}")
            at = lambda c, a=last.layer, b=layer: min(max(scale(c.layer), a), b - 1) if self.depth else c.layer
            seen = [c if c.layer is None or c.layer < 0 else replace(c, layer=at(c)) for c in l.capture]
            last = replace(l, layer=layer, capture=_resolve(tuple(seen), last.layer, layer))
            later.append(last)
        late = tuple(range(depth // 2, depth)) if self.late_layers == "upper" else self.late_layers
        if not all(-depth <= l < depth for l in late):
            raise ValueError(f"late_layers: expected layer indices of a model of depth {depth}, got {self.late_layers}")
        return replace(
            self,
            cut=cut,
            capture=capture,
            late_layers=tuple(l % depth for l in late),
            later=tuple(later),
            remember=self._remembered(depth),
            depth=None,
        )

    def _remembered(self, depth: int) -> tuple[Capture, ...]:
        """`remember` in a model of `depth` layers."""
        share = 1 if self.depth is None else depth / self.depth
        captures = []
        for c in self.remember:
            layers = range(depth - 1)
            if c.layer is not None:
                layer = int(c.layer * share + 0.5) if c.layer >= 0 else depth + c.layer
                layers = (min(max(layer, 0), depth - 2),)
            captures += [replace(c, layer=l) for l in layers]
        return tuple(captures)


def _resolve(captures: tuple[Capture, ...], start: int, stop: int) -> tuple[Capture, ...]:
    """Captures with the layer indices of a range of layers start..stop-1."""
    out = []
    for c in captures:
        layers = range(start, stop) if c.layer is None else (max(stop + c.layer, start) if c.layer < 0 else c.layer,)
        if not all(start <= l < stop for l in layers):
            raise ValueError(f"capture: layer {c.layer} is not between the cuts before layers {start} and {stop}")
        out += [replace(c, layer=l) for l in layers]
    return tuple(out)
