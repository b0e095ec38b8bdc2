"""Closed-form costs: the papers' three numbers, and XLA's own count of the programs."""

import functools
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from tiers import at_night

from safe_pruner_jax.engine import flops
from safe_pruner_jax.engine.engine import Engine, Inputs
from safe_pruner_jax.model import gemma, pi0
from safe_pruner_jax.model.config import GemmaConfig, Pi0Config, SiglipConfig, pi05
from safe_pruner_jax.model.params import param_shapes
from safe_pruner_jax.pruners import PRUNERS as METHODS
from safe_pruner_jax.pruners import Cut, Later, Plan, divprune, fastv, full, make, safe, sparsevlm, vla_cache
from safe_pruner_jax.tokens import PrefixLayout

pytestmark = pytest.mark.newest

# π0.5's widths, so that matrix products dominate, and few layers; programs are lowered and never run
SIZES = {
    "prefix": GemmaConfig(2048, 3, 16384, 8, 1, 256),
    "expert": GemmaConfig(1024, 3, 4096, 8, 1, 256),
    "vision": SiglipConfig(1152, 1, 4304, 16),
    "vocab_size": 512,
    "dtype": "float32",
}
LAYOUT = PrefixLayout(Pi0Config(True, **SIZES).cameras[:2], 256, 32)
PRUNERS = {
    "safe-action": safe(keep=0.2, cut=2),
    "safe-before": safe(keep=0.2, cut=0, pool=1.5, soft=0.1),
    "fastv": fastv(keep=100, cut=1),
    "full": full(),
    "divprune": divprune(keep=0.2),
    "sparsevlm": sparsevlm(keep=0.3, layers=(0, 1, 2)),
    "vla_cache": vla_cache(keep=0.5, layers=(1, 2)),
}


# ------------------------------------------------------------------------------------------------- the papers' column


def test_the_papers_numbers_for_pi05():
    c = pi05().prefix
    teraflops = lambda tokens: round(flops.paper_flops(tokens, c.width, c.mlp_dim) / 1e12, 4)
    ours = lambda counts, pruned: flops.tokens_per_layer(safe(keep=0.2).plan, counts, c.depth, pruned=pruned)
    assert teraflops(ours((768, 200), False)) == 2.1154
    assert teraflops(ours((512, 20), False)) == 1.1455
    assert teraflops([532] * 3 + [0.2 * 512 + 20] * 15) == 0.4075  # the papers do not round K
    assert ours((512, 20), True) == (532,) * 3 + (102 + 20,) * 15
    assert teraflops(ours((512, 20), True)) == 0.4067


def test_layouts_are_counted_as_the_programs_run_them():
    plan = safe(keep=0.2, cut=2).plan
    assert flops.tokens_per_layer(plan, LAYOUT, 4, pruned=True) == (544, 544, 134, 134)
    assert flops.tokens_per_layer(plan, LAYOUT, 4, pruned=False) == (544,) * 4
    assert flops.tokens_per_layer(full().plan, LAYOUT, 4, pruned=True) == (544,) * 4
    with pytest.raises(ValueError, match="cut"):
        flops.tokens_per_layer(plan, LAYOUT, 2, pruned=True)


def test_several_cuts_and_reused_keys_are_counted_layer_by_layer():
    plan = Plan(Cut(1, 0.5), later=(Later(3, 0.25), Later(4, 100)))
    assert flops.tokens_per_layer(plan, LAYOUT, 6, pruned=True) == (544, 288, 288, 160, 132, 132)
    assert flops.tokens_per_layer(plan, LAYOUT, 6, pruned=False) == (544,) * 6
    assert flops.tokens_per_layer(divprune(keep=0.25).plan, LAYOUT, 3, pruned=True) == (160,) * 3
    cached = vla_cache(keep=0.5).plan  # cuts before layers 2, 6, 9, 11 of 32
    rows = flops.tokens_per_layer(cached, (512, 32), 18, pruned=True)
    assert rows == (544,) + (480,) * 2 + (416,) * 2 + (352,) + (288,) * 12
    assert flops.keys_per_layer(cached, (512, 32), 18, pruned=True) == (544,) * 18
    assert flops.keys_per_layer(plan, LAYOUT, 6, pruned=True) == (544, 288, 288, 160, 132, 132)
    d, m = 8, 16
    assert flops.paper_flops([3], d, m, [5]) == 4 * 3 * d * d + 2 * 3 * 5 * d + 3 * 3 * d * m


def test_decisions_are_counted_where_they_are_made():
    config = pi05()
    cost = lambda pruner, pruned: flops.exact_flops(config, pruner.plan, LAYOUT, pruned=pruned).matching
    assert cost(divprune(), True) == 512 * 512 * 2048
    v2 = sparsevlm(version="v2")
    assert (cost(v2, False), cost(v2, True)) == (512 * 32 * 2048, 3 * 512 * 32 * 2048)
    assert cost(fastv(), True) == cost(vla_cache(), True) == 0


# ----------------------------------------------------------------------------------------------------- the exact column


def operations(stage) -> float:
    """XLA's operations of a lowered or compiled program; a loop's body is counted once, whatever its length."""
    analysis = stage.cost_analysis()
    return (analysis[0] if isinstance(analysis, list) else analysis)["flops"]


def counted(function, *args):
    return operations(jax.jit(function).lower(*args))


@functools.cache
def shapes(pi05: bool, num_steps: int = 1):
    config = Pi0Config(pi05, **SIZES)
    weights = jax.eval_shape(lambda p: pi0.prepare(p, config, num_steps=num_steps), param_shapes(config))
    s = jax.ShapeDtypeStruct
    inputs = Inputs(
        images=s((1, 2, 224, 224, 3), jnp.uint8),
        camera_mask=s((1, 2), bool),
        tokens=s((1, LAYOUT.text), jnp.int32),
        token_mask=s((1, LAYOUT.text), bool),
        state=s((1, config.action_dim), jnp.float32),
    )
    return config, weights, inputs


def xla_flops(pi05: bool, name: str) -> dict[bool, float]:
    """{pruned: XLA's operations of shallow and the second half}, with one denoise step."""
    config, weights, inputs = shapes(pi05)
    engine = Engine(weights, config, PRUNERS[name])
    control = jax.eval_shape(lambda: engine.init((0,), len(LAYOUT.cameras)))
    carry = jax.eval_shape(engine.shallow, weights, control, inputs, None)
    first = counted(engine.shallow, weights, control, inputs, None)
    halves = {False: engine.full} | ({True: engine.pruned} if engine.plan.cut else {})
    return {pruned: first + counted(program, weights, carry, None) for pruned, program in halves.items()}


@pytest.mark.parametrize(
    ("pi05", "name"),
    [
        (True, "safe-action"),
        (False, "safe-action"),
        *at_night((True, "full"), (True, "fastv"), (True, "divprune")),
        (True, "sparsevlm"),
        (True, "vla_cache"),
    ],
)
def test_exact_flops_are_xlas_count(pi05, name):
    """Two operations per multiply-add. XLA also counts element-wise work (softmax over the logits, norms, gelu,
    rotations), which is why its figure is the larger one; at π0.5's widths that is below half a percent.
    """
    for pruned, counted_by_xla in xla_flops(pi05, name).items():
        config = shapes(pi05)[0]
        ours = 2 * flops.exact_flops(config, PRUNERS[name].plan, LAYOUT, pruned=pruned, num_steps=1).total
        assert ours <= counted_by_xla <= 1.005 * ours, (pruned, ours, counted_by_xla)


def test_compiling_leaves_the_count_as_it_is():
    """What XLA fuses or removes is a thousandth, so programs need not be compiled to be counted."""
    config, weights, inputs = shapes(True)
    engine = Engine(weights, config, PRUNERS["safe-action"])
    control = jax.eval_shape(lambda: engine.init((0,), len(LAYOUT.cameras)))
    carry = jax.eval_shape(engine.shallow, weights, control, inputs, None)
    lowered = jax.jit(engine.pruned).lower(weights, carry, None)
    assert operations(lowered.compile()) == pytest.approx(operations(lowered), rel=1e-3)


@pytest.mark.parametrize("pi05", [True, False])
def test_every_denoise_step_costs_one_velocity(pi05):
    config, weights, inputs = shapes(pi05)
    plan = PRUNERS["safe-action"].plan
    s = jax.ShapeDtypeStruct
    prefix = tuple(
        gemma.Segment(s((1, N, 1, 256), jnp.float32), s((1, N, 1, 256), jnp.float32), s((1, 1, N), bool))
        for N in flops.tokens_per_layer(plan, LAYOUT, config.depth, pruned=True)
    )
    at = jax.eval_shape(lambda w: jax.tree.map(lambda a: a[0], w.schedule), weights)
    noise = s((1, config.action_horizon, config.action_dim), jnp.float32)
    step = lambda w, *args: pi0.velocity(w, config, *args)[0]
    counted_by_xla = counted(step, weights, pi0.Prefix(prefix, s((1,), jnp.int32)), inputs.state, noise, at)

    cost = lambda steps: flops.exact_flops(config, plan, LAYOUT, pruned=True, num_steps=steps)
    ours = 2 * (cost(10).total - cost(1).total) / 9
    assert ours <= counted_by_xla <= 1.005 * ours
    assert cost(10).expert == 10 * cost(1).expert


def test_a_keyframe_costs_more_than_a_pruned_step_and_the_parts_say_where():
    config, plan = pi05(), safe(keep=0.2).plan
    key, pruned = (flops.exact_flops(config, plan, LAYOUT, pruned=p) for p in (False, True))
    assert pruned.total < key.total
    assert (pruned.vision, pruned.capture, pruned.matching) == (key.vision, key.capture, key.matching)
    assert key.matching == 512 * 512 * 2048
    plain = flops.exact_flops(config, full().plan, LAYOUT, pruned=False)
    assert (plain.capture, plain.matching) == (0, 0)
    assert (plain.prefix, plain.expert) == (key.prefix, key.expert)


# ---------------------------------------------------------------------------------------------------- the page of costs


def cost_row(name: str, choices: dict) -> str:
    """A row of the table in docs/pruners.md: a pruned step of π0.5 at keep=0.2."""
    config, plan = pi05(), make(name, **({} if name == "full" else {"keep": 0.2}), **choices).plan
    tokens, keys = (f(plan, LAYOUT, config.depth, pruned=True) for f in (flops.tokens_per_layer, flops.keys_per_layer))
    slots = ", ".join(f"{len(list(run))} × {count}" for count, run in itertools.groupby(tokens))
    paper = flops.paper_flops(tokens, config.prefix.width, config.prefix.mlp_dim, keys)
    exact = flops.exact_flops(config, plan, LAYOUT, pruned=True)
    decision = exact.matching + exact.capture
    told = "".join(f", {value}" if key == "version" else f", `{key}={value}`" for key, value in choices.items())
    cost = f"{decision / 1e9:.2f} G" if decision else "–"
    return f"| `{name}`{told} | {slots} | {paper / 1e12:.3f} T | {exact.total / 1e12:.3f} T | {cost} |"


def test_the_page_of_pruners_tells_these_costs():
    extra = {"sparsevlm": [{"version": "v1"}, {"version": "v2"}], "safe": [{}, {"queries": "text"}, {"cut": 0}]}
    rows = [cost_row(name, choices) for name in METHODS for choices in extra.get(name, [{}])]
    page = (Path(__file__).parents[1] / "docs" / "pruners.md").read_text(encoding="utf-8")
    table = page.partition("<!-- costs -->")[2].partition("<!-- /costs -->")[0].splitlines()
    assert [line for line in table if line][2:] == rows, "\n".join(rows)
