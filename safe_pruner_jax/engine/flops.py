"""What a plan costs, in closed form.

    layers = tokens_per_layer(plan, layout, config.depth, pruned=True)     (544, 544, 544, 134, …, 134)
    paper_flops(layers, d, m)                                              the papers' column
    exact_flops(config, plan, layout, pruned=True).total                   what the programs of `engine` compute

Both count multiply-adds, as the papers do; XLA counts a multiply-add as two operations. The papers' form knows
the prefix of a model without grouped heads, which is why it may differ from `exact` in either direction.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass

from safe_pruner_jax.model.config import GemmaConfig, Pi0Config
from safe_pruner_jax.pruners.base import Plan
from safe_pruner_jax.tokens import PrefixLayout, budget


def tokens_per_layer(
    plan: Plan, layout: PrefixLayout | tuple[int, int], depth: int, *, pruned: bool
) -> tuple[int, ...]:
    """Prefix tokens N_ℓ whose rows each layer computes; a merged token counts like any other.

    Args:
      plan: of a pruner.
      layout: a layout, whose slots are counted as the programs run them (prompts are padded), or a pair
        (visual, text) of tokens.
      depth: layers L of the model.
      pruned: after a cut (True), or at a keyframe (False).

    Returns:
      [L] token counts.

    Raises:
      ValueError: a cut is not inside the model.

    >>> from safe_pruner_jax.pruners import safe
    >>> tokens_per_layer(safe(keep=0.2).plan, (512, 20), 5, pruned=True)
    (532, 532, 532, 122, 122)
    """
    visual, text = (layout.visual, layout.text) if isinstance(layout, PrefixLayout) else layout
    cuts = plan.for_depth(depth).cuts if pruned else ()
    tokens = [visual + text] * depth
    for cut in cuts:
        tokens[cut.layer :] = [budget(cut.keep, visual) + text] * (depth - cut.layer)
    return tuple(tokens)


def keys_per_layer(plan: Plan, layout: PrefixLayout | tuple[int, int], depth: int, *, pruned: bool) -> tuple[int, ...]:
    """Prefix keys of each layer: `tokens_per_layer`, or all slots where dropped tokens keep their old keys."""
    return tokens_per_layer(plan, layout, depth, pruned=pruned and plan.dropped == "discard")


def paper_flops(tokens: Sequence[float], d: int, m: int, keys: Sequence[float] | None = None) -> float:
    """The papers' cost of a prefix, Σ_ℓ C(N_ℓ) with C(N) = 4Nd² + 2N²d + 3Ndm (SAFE-Pruner, App. C).

    Args:
      tokens: N_ℓ of every layer, from `tokens_per_layer`; the papers do not round K, so shares are allowed.
      d: width of the language model.
      m: inner width of its MLP.
      keys: M_ℓ of every layer where N_ℓ rows see other keys than their own, 2NMd for 2N²d; from `keys_per_layer`.

    Returns:
      Multiply-adds.

    >>> round(paper_flops([968] * 18, 2048, 16384) / 1e12, 4)
    2.1154
    """
    return sum(4 * n * d * d + 2 * n * k * d + 3 * n * d * m for n, k in zip(tokens, keys or tokens, strict=True))


@dataclass(frozen=True)
class ExactFlops:
    """Multiply-adds of one control step of one robot, part by part.

    Args:
      vision: SigLIP over the encoded cameras.
      prefix: the language model; of its last layer only the keys and values.
      capture: the expert's part of the shallow saliency, where action tokens are the queries.
      matching: matrix products of the decision, such as similarities between visual tokens (`Plan.compares`).
      expert: all denoise steps.
    """

    vision: int
    prefix: int
    capture: int
    matching: int
    expert: int

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(astuple(self))


def exact_flops(
    config: Pi0Config, plan: Plan, layout: PrefixLayout, *, pruned: bool, num_steps: int = 10
) -> ExactFlops:
    """Every matrix product that the compiled programs of a step contain; the tests hold it against XLA's own count.

    Left out is what has no matrix product: softmax, norms, rotations, gathers, top-K.

    Args:
      config: sizes of the model.
      plan: of a pruner.
      layout: cameras that are encoded and prompt slots.
      pruned: `shallow` then `pruned` (True), or `shallow` then `full`.
      num_steps: denoise steps.

    Returns:
      The parts.
    """
    plan = plan.for_depth(config.depth)
    tokens = tokens_per_layer(plan, layout, config.depth, pruned=pruned)
    keys = keys_per_layer(plan, layout, config.depth, pruned=pruned)
    c = config.prefix
    deciding = (plan, *plan.later) if pruned else (plan,)
    return ExactFlops(
        vision=len(layout.cameras) * _vision(config),
        prefix=sum(_layer(c, N, M) for N, M in zip(tokens[:-1], keys[:-1], strict=True))
        + tokens[-1] * c.width * 2 * c.num_kv_heads * c.head_dim,
        capture=_capture(config, plan, layout.slots),
        matching=sum(_compare(pair, layout) for p in deciding for pair in p.compares) * c.width,
        expert=num_steps * _denoise_step(config, keys),
    )


def _compare(pair: tuple[str | float, str | float], layout: PrefixLayout) -> int:
    sizes = {"visual": layout.visual, "text": layout.text}
    rows, columns = (sizes[p] if isinstance(p, str) else round(p * layout.visual) for p in pair)
    return rows * columns


def _qkv(c: GemmaConfig, rows: int) -> int:
    return rows * c.width * (c.num_heads + 2 * c.num_kv_heads) * c.head_dim


def _layer(c: GemmaConfig, rows: int, keys: int) -> int:
    """One block: grouped projections, logits and weighted sum, output projection, gated MLP."""
    heads = c.num_heads * c.head_dim
    return _qkv(c, rows) + 2 * rows * keys * heads + rows * heads * c.width + 3 * rows * c.width * c.mlp_dim


def _vision(config: Pi0Config) -> int:
    """SigLIP on one image: patch embedding, blocks without grouping or gate, head."""
    v, S = config.vision, config.tokens_per_camera
    block = 4 * S * v.width**2 + 2 * S * S * v.width + 2 * S * v.width * v.mlp_dim
    return S * 3 * v.patch**2 * v.width + v.depth * block + S * v.width * config.prefix.width


def _suffix(config: Pi0Config) -> tuple[int, int]:
    """Rows of the expert, and what it costs to make them."""
    A, W = config.action_horizon, config.expert.width
    cost = A * config.action_dim * W
    return (A, cost) if config.pi05 else (A + 1, cost + 2 * A * W * W + config.action_dim * W)


def _denoise_step(config: Pi0Config, tokens: Sequence[int]) -> int:
    """The expert once, its layer ℓ reading N_ℓ prefix keys beside its own."""
    rows, cost = _suffix(config)
    out = config.action_horizon * config.expert.width * config.action_dim
    return cost + sum(_layer(config.expert, rows, N + rows) for N in tokens) + out


def _capture(config: Pi0Config, plan: Plan, slots: int) -> int:
    """The expert up to the captured layer, of which only the logits are used."""
    last = max((c.layer for c in plan.capture if c.rows == "action"), default=None)
    if last is None:
        return 0
    e, (rows, cost) = config.expert, _suffix(config)
    logits = rows * (slots + rows) * e.num_heads * e.head_dim
    return cost + last * _layer(e, rows, slots + rows) + _qkv(e, rows) + logits
