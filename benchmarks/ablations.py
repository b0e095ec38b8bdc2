"""What each lossless optimisation of a control step is worth: the step with it, and with that one thing undone.

python benchmarks/ablations.py [--depth 3] [--dtype float32] [--rounds 15] [--out benchmarks/results/ablations.json]

Runs at π0.5's widths with fewer layers, so that several layouts of the weights fit in memory. Both sides of a row run
in the same rounds; the ratio is the median within rounds. That both compute the same numbers is checked first.
"""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from safe_pruner_jax.bench import machine
from safe_pruner_jax.bench.modes import example_of, make, random_weights
from safe_pruner_jax.engine.engine import Engine
from safe_pruner_jax.engine.xla import jit, options
from safe_pruner_jax.model import gemma, pi0
from safe_pruner_jax.model.config import Pi0Config
from safe_pruner_jax.model.matrix import Upright
from safe_pruner_jax.policy.policy import all_slots, layout_of, pack
from safe_pruner_jax.robots.configs import get_config
from safe_pruner_jax.timing import interleave, ratio, spread


class Pair(NamedTuple):
    """One optimisation: what it is, and two programs with their arguments, without it and with it."""

    what: str
    without: Callable[[], Any]
    with_it: Callable[[], Any]


def prefix_of(config: Pi0Config, slots: int) -> pi0.Rows:
    """`slots` alive rows of the language model's width."""
    x = jax.random.normal(jax.random.key(0), (1, slots, config.prefix.width)).astype(config.dtype)
    mask = jnp.ones((1, slots), bool)
    return pi0.Rows(x, pi0.positions(mask), mask)


def compiled(program: Callable, *arguments: Any, jit: Callable = jit) -> Callable[[], Any]:
    """The program on these arguments, compiled; every call waits for its result."""
    run = jit(program).lower(*arguments).compile()
    return lambda: jax.block_until_ready(run(*arguments))


def same(a: Any, b: Any, what: str) -> None:
    """Raises AssertionError unless both sides agree as far as their precision goes."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        tolerance = 1e-3 if np.asarray(jax.tree.leaves(a)[0]).dtype == np.float32 else 0.1
        assert np.abs(x - y).max() <= tolerance * max(np.abs(x).max(), 1.0), what


# --- the optimisations undone -------------------------------------------------------------------------------


def layers_with(config: Pi0Config, layer: Callable, last_whole: bool = False) -> Callable:
    """(weights of all layers, prefix) → keys and values of all layers, through `layer`."""

    def run(weights: Any, p: pi0.Rows) -> list:
        c, x, out = config.prefix, p.x, []
        rotation = gemma.rope(p.positions, c.head_dim)
        visible = p.mask[:, :, None] & p.mask[:, None, :]
        for i, w in enumerate(weights):
            if i == config.depth - 1 and not last_whole:
                out.append(gemma.keys_and_values(c, w, x, rotation))
            else:
                x, kv, _ = layer(c, w, x, rotation, visible)
                out.append(kv)
        return (out, x) if last_whole else out

    return run


def split_heads(c: Any, w: gemma.LayerWeights) -> dict[str, jax.Array]:
    """One layer's fused projections as openpi stores them: q, k, v and gate, up each on its own."""
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    parts = {"q": w.qkv[:, :q], "k": w.qkv[:, q : q + kv], "v": w.qkv[:, q + kv :]}
    parts |= {"gate": w.gate_up[:, : c.mlp_dim], "up": w.gate_up[:, c.mlp_dim :]}
    return jax.tree.map(jnp.array, parts) | {"rest": dataclasses.replace(w, qkv=w.qkv[:1], gate_up=w.gate_up[:1])}


def unfused(c: Any, parts: dict, x: jax.Array, rotation: Any, visible: jax.Array) -> tuple:
    """`gemma.layer` with one product per projection."""
    w = parts["rest"]
    h, _ = gemma.rms_norm(x, w.gain1)
    heads = lambda a, n: a.reshape(*a.shape[:2], n, c.head_dim)
    q, k, v = (heads(gemma.dense(h, parts[n]), m) for n, m in (("q", c.num_heads), ("k", 1), ("v", 1)))
    q, k = gemma._rotate(q, rotation) * c.head_dim**-0.5, gemma._rotate(k, rotation)
    out, _ = gemma.attend(q, (gemma.Segment(k, v, visible),))
    x = x + gemma.dense(out, w.out)
    h, _ = gemma.rms_norm(x, w.gain2)
    gated = jax.nn.gelu(gemma.dense(h, parts["gate"])) * gemma.dense(h, parts["up"])
    return x + gemma.dense(gated, w.down), (k, v), None


def through_dot_product_attention(c: Any, w: gemma.LayerWeights, x: jax.Array, rotation: Any, seen: jax.Array) -> tuple:
    """`gemma.layer` with `jax.nn.dot_product_attention`."""
    h, _ = gemma.rms_norm(x, w.gain1)
    q, k, v = gemma.project_qkv(c, w, h, rotation)
    out = jax.nn.dot_product_attention(q, k, v, mask=seen[:, None], scale=1.0)
    x = x + gemma.dense(out.reshape(*x.shape[:2], -1), w.out)
    h, _ = gemma.rms_norm(x, w.gain2)
    g, u = jnp.split(gemma.dense(h, w.gate_up), 2, axis=-1)
    return x + gemma.dense(jax.nn.gelu(g) * u, w.down), (k, v), None


def scanned(config: Pi0Config) -> Callable:
    """All layers but the last as a scan over stacked weights, as openpi runs them."""

    def run(weights: tuple[Any, Any], p: pi0.Rows) -> tuple:
        c, (stack, last) = config.prefix, weights
        rotation = gemma.rope(p.positions, c.head_dim)
        visible = p.mask[:, :, None] & p.mask[:, None, :]
        x, kv = jax.lax.scan(lambda x, w: gemma.layer(c, w, x, rotation, visible)[:2], p.x, stack)
        return kv, gemma.keys_and_values(c, last, x, rotation)

    return run


def denoise(config: Pi0Config, how: Literal["scan", "unrolled", "adaptive"]) -> Callable:
    """(weights, raw adaptive parameters, segments, noise) → actions, the loop in one of three forms."""

    def run(weights: pi0.Weights, adaptive: Any, segments: tuple, noise: jax.Array) -> jax.Array:
        prefix = pi0.Prefix(segments, jnp.full(noise.shape[0], segments[0].k.shape[1], jnp.int32))
        if how == "scan":
            return pi0.sample(weights, config, prefix, noise[:, 0], noise)[0]
        times = weights.schedule.times
        x = noise
        if how == "unrolled":
            for i in range(times.shape[0]):
                at = jax.tree.map(lambda a, i=i: a[i], weights.schedule)
                x = x - pi0.velocity(weights, config, prefix, noise[:, 0], x, at)[0] / times.shape[0]
            return x

        def step(x: jax.Array, cond: jax.Array) -> tuple:
            made = [gemma.Modulation(*(cond @ kernel for kernel in pair)) for pair in adaptive["layers"]]
            at = weights.schedule.replace(times=None, cond=cond, mods=tuple(made), final=cond @ adaptive["final"])
            return x - pi0.velocity(weights, config, prefix, noise[:, 0], x, at)[0] / times.shape[0], None

        return jax.lax.scan(step, x, weights.schedule.cond)[0]

    return run


def dispatched(engine: Engine) -> Callable:
    """A whole step of one robot as one program: `lax.cond` on the device instead of a bit on the host."""

    def run(weights: pi0.Weights, control: Any, inputs: Any) -> jax.Array:
        carry = engine.shallow(weights, control, inputs, None)
        halves = [lambda c, p=p: engine.second[p](weights, c)[0] for p in (False, True)]
        return jax.lax.cond(carry.selection.keyframe[0], *halves, carry)

    return run


def pairs(config: Pi0Config, weights: pi0.Weights, views: int, prompt: int, keep: float) -> list[Pair]:
    """All of them; what differs in what it computes for dead or unused rows comes first."""
    example = example_of(config, views, prompt)
    layout = layout_of(example, config)
    loop = loops(config, weights, layout.slots)
    of_options = []
    if options():
        plain, upright = prefix_options(config, weights, layout.slots)
        of_options = [
            plain,
            Pair("options of compiling.py (denoise)", loop("scan", jit=jax.jit), loop("scan")),
            upright,
        ]
    return [
        *prefix_pairs(config, weights, layout.slots),
        Pair("adaptive norms computed once (denoise)", loop("adaptive"), loop("scan")),
        Pair("denoise steps as a loop, not unrolled", loop("unrolled"), loop("scan")),
        keyframe_pair(config, weights, example, keep),
        *of_options,
    ]


def prefix_pairs(config: Pi0Config, weights: pi0.Weights, slots: int) -> list[Pair]:
    """What the layers of the prefix do."""
    p, everything = prefix_of(config, slots), prefix_of(config, all_slots(config).slots)
    layers, plain = weights.prefix, layers_with(config, gemma.layer)
    ours = compiled(plain, layers, p)
    whole, library = layers_with(config, gemma.layer, True), layers_with(config, through_dot_product_attention)
    stack = jax.tree.map(lambda *a: jnp.stack(a), *layers[:-1])
    parts = [split_heads(config.prefix, w) for w in layers[:-1]] + [layers[-1]]
    return [
        Pair("dead tokens removed (prefix)", compiled(plain, layers, everything), ours),
        Pair("of the last prefix layer only keys and values", compiled(whole, layers, p), ours),
        Pair("q, k, v and gate, up fused", compiled(layers_with(config, unfused), parts, p), ours),
        Pair("layers unrolled over split weights", compiled(scanned(config), (stack, layers[-1]), p), ours),
        Pair("own attention, not jax.nn's", compiled(library, layers, p), ours),
    ]


def prefix_options(config: Pi0Config, weights: pi0.Weights, slots: int) -> tuple[Pair, Pair]:
    """How the prefix is compiled, and how its widest matrices lie."""
    p, layers, plain = prefix_of(config, slots), weights.prefix, layers_with(config, gemma.layer)
    ours = compiled(plain, layers, p)
    turned = [w.replace(gate_up=Upright(jnp.array(w.gate_up.T))) for w in layers]
    return (
        Pair("options of compiling.py (prefix)", compiled(plain, layers, p, jit=jax.jit), ours),
        Pair("gate and up stored upright (prefix)", ours, compiled(plain, turned, p)),
    )


def loops(config: Pi0Config, weights: pi0.Weights, slots: int) -> Callable[..., Callable]:
    """A function that compiles one kind of denoise loop over a prefix of `slots` keys."""
    c, mask = config.prefix, prefix_of(config, slots).mask
    segments = tuple(
        gemma.Segment(*(jnp.ones((1, slots, 1, c.head_dim), config.dtype),) * 2, mask[:, None]) for _ in weights.prefix
    )
    noise = jax.random.normal(jax.random.key(1), (1, config.action_horizon, config.action_dim))
    cond = weights.schedule.cond
    solve = lambda mods: jnp.linalg.lstsq(cond, mods.astype(jnp.float32))[0].astype(config.dtype)
    adaptive = {
        "layers": [(solve(m.attn), solve(m.mlp)) for m in weights.schedule.mods],
        "final": solve(weights.schedule.final),
    }
    return lambda how, **more: compiled(denoise(config, how), weights, adaptive, segments, noise, **more)


def keyframe_pair(config: Pi0Config, weights: pi0.Weights, example: Any, keep: float) -> Pair:
    """Whole steps: who reads the keyframe bit."""
    layout = layout_of(example, config)
    engine = Engine(weights, config, make("safe", keep, cut=config.depth - 1))
    inputs, host = jax.device_put(pack([example], layout)), pack([example], layout)
    control = engine.step(engine.init((0,), len(layout.cameras)), inputs)[1]
    one = jit(dispatched(engine)).lower(weights, control, inputs).compile()
    return Pair(
        "keyframe bit on the host, not lax.cond (whole step)",
        lambda: jax.device_get(one(weights, control, jax.device_put(host))),
        lambda: jax.device_get(engine.step(control, jax.device_put(host))[0]),
    )


def main(
    depth: int = 3,
    dtype: Literal["float32", "bfloat16"] = "float32",
    views: int = 2,
    prompt: int = 20,
    keep: float = 0.2,
    rounds: int = 15,
    config: str = "pi05_libero",
    out: Path | None = None,
) -> int:
    """Measures and prints a table.

    Args:
      depth: layers of the language model and the expert.
      dtype: weights and activations.
      views: real cameras.
      prompt: alive prompt tokens.
      keep: share kept where a step is pruned.
      rounds: counted rounds.
      config: whose widths.
      out: JSON file to write; nothing is written without it.
    """
    model = get_config(config).model
    model = model.replace(dtype=dtype).with_depth(depth)
    weights = jax.block_until_ready(random_weights(model, upright=False))
    all_pairs = pairs(model, weights, views, prompt, keep)
    for pair in all_pairs[2:]:  # the first two differ in what they compute for dead or unused rows
        a, b = pair.without(), pair.with_it()
        if "scan" not in pair.what and "split" not in pair.what:
            same(a, b, pair.what)
    steps = {f"{i}{side}": run for i, pair in enumerate(all_pairs) for side, run in zip("-+", pair[1:], strict=True)}
    times = interleave(steps, rounds)
    rows = []
    print(f"{'optimisation':55} {'without, ms':>12} {'with, ms':>10}  gain (quartiles)")
    for i, pair in enumerate(all_pairs):
        without, with_it = times[f"{i}-"], times[f"{i}+"]
        gain = ratio(with_it, without)
        rows.append({"what": pair.what, "gain": dataclasses.asdict(gain)})
        rows[-1] |= {"without_ms": spread(1e3 * without).median, "with_ms": spread(1e3 * with_it).median}
        print(f"{pair.what:55} {rows[-1]['without_ms']:12.1f} {rows[-1]['with_ms']:10.1f}  {gain}")
    if out:
        head = {"command": " ".join(sys.argv), "machine": machine.describe(), "config": config, "depth": depth}
        head |= {"dtype": dtype, "views": views, "prompt_tokens": prompt, "keep": keep, "rounds": rounds}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(head | {"rows": rows}, indent=1) + "\n")
        print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
