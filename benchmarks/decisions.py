"""What each pruner's decision costs by itself, at the sizes of a model.

python benchmarks/decisions.py --config pi05_libero --out benchmarks/results/decisions_pi05_cpu.json

Times `Pruner.step`, and every `later` decision of methods with several cuts, compiled together for one robot: from
evidence to the indices of the tokens that stay. Evidence is random numbers of the shapes that the engine hands over;
every method decides in every round. What evidence costs to collect is not in it: reading attention that is there
anyway, and for `safe` with action queries the first expert layers (docs/pruners.md counts their multiply-adds).
"""

import dataclasses
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from safe_pruner_jax.bench import machine
from safe_pruner_jax.bench.modes import example_of, make, shapes_of
from safe_pruner_jax.engine.engine import Engine
from safe_pruner_jax.engine.programs import finish, shallow
from safe_pruner_jax.figures.theme import markdown
from safe_pruner_jax.model.config import Pi0Config
from safe_pruner_jax.policy.policy import layout_of, pack
from safe_pruner_jax.pruners import PRUNERS, Evidence, Pruner
from safe_pruner_jax.pruners.base import NO_HISTORY
from safe_pruner_jax.robots.configs import get_config
from safe_pruner_jax.timing import Step, interleave, spread


def shapes(config: Pi0Config, pruner: Pruner, views: int, prompt: int) -> list[Any]:
    """Evidence of every decision of a pruned step, as shapes: what the engine would hand over, traced and not run."""
    seen: list[Any] = []

    def watched(decide):
        def spy(state, evidence, *cut):
            seen.append(jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), evidence))
            return decide(state, evidence, *cut)

        return spy

    later = pruner.later and watched(pruner.later)
    engine = Engine(None, config, dataclasses.replace(pruner, step=watched(pruner.step), later=later))
    example, weights = example_of(config, views, prompt), shapes_of(config)
    layout = layout_of(example, config)
    control = engine.init((0,), len(layout.cameras))
    carry = jax.eval_shape(partial(shallow, config, engine.pruner), weights, control, pack([example], layout), None)
    jax.eval_shape(partial(finish, config, engine.pruner, True), weights, carry)
    return seen


def filled(shape: Evidence, cameras: int, since_full: int) -> Evidence:
    """Random evidence of a step so many steps behind a keyframe."""
    rng, n = np.random.default_rng(0), shape.alive.shape[0]

    def leaf(s: jax.ShapeDtypeStruct) -> Any:
        if jnp.issubdtype(s.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        if s.dtype == bool:
            return jnp.ones(s.shape, bool)
        if s.dtype == jnp.uint8:
            return jnp.asarray(rng.integers(0, 256, s.shape), s.dtype)
        return jnp.asarray(rng.uniform(0.1, 1.0, s.shape), s.dtype)

    evidence = jax.tree.map(leaf, shape)
    camera = jnp.arange(n, dtype=jnp.int32) * cameras // n
    return evidence.replace(since_full=jnp.int32(since_full), camera=camera)


def decision(config: Pi0Config, pruner: Pruner, views: int, prompt: int) -> Step:
    """All decisions of one pruned step, compiled; has a state that a keyframe has left behind."""
    state_and_evidence = shapes(config, pruner, views, prompt)

    @jax.jit
    def decide(state, evidence):
        state, selection = pruner.step(state, evidence[0])
        chosen = [selection.index]
        for i, seen in enumerate(evidence[1:]):
            state, selection = pruner.later(state, seen, i)
            chosen.append(selection.index)
        return state, chosen

    fresh, behind = (tuple(filled(s, views, since) for s in state_and_evidence) for since in (NO_HISTORY, 1))
    state, _ = decide(pruner.init(fresh[0]), fresh)
    return lambda: jax.block_until_ready(decide(state, behind)[1])


def main(
    config: str = "pi05_libero",
    dtype: str = "float32",
    views: int = 2,
    prompt: int = 20,
    keep: float = 0.2,
    rounds: int = 50,
    out: Path | None = None,
) -> int:
    """Measures and prints a table.

    Args:
      config: whose sizes.
      dtype: of the model's tokens.
      views, prompt: real cameras, alive prompt tokens.
      keep: share kept.
      rounds: counted rounds.
      out: JSON file to write.
    """
    model = get_config(config).model.replace(dtype=dtype)
    names = [name for name in PRUNERS if name != "full"]
    steps = {name: decision(model, make(name, keep), views, prompt) for name in names}
    steps["safe, text"] = decision(model, make("safe", keep, queries="text"), views, prompt)
    times = {name: spread(1e3 * t) for name, t in interleave(steps, rounds).items()}
    rows = [[name, f"{ms.median:.2f} ({ms.low:.2f}–{ms.high:.2f})"] for name, ms in times.items()]
    print(markdown(["method", "ms per step, median (quartiles)"], rows), end="")
    if out is not None:
        about = {"command": " ".join(["python", "benchmarks/decisions.py", *sys.argv[1:]]), "config": config}
        about |= {"machine": machine.describe(), "dtype": dtype, "views": views, "prompt_tokens": prompt, "keep": keep}
        about |= {"rounds": rounds, "ms": {name: dataclasses.asdict(ms) for name, ms in times.items()}}
        out.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
