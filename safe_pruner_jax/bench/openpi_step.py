"""openpi's own model in a process of its own, stepped from outside.

    python openpi_step.py --dtype float32 --cameras 2 --prompt 20 --horizon 10 --steps 10

A line "ready {json}" on stdout when it is compiled; after that every line on stdin runs one control step, answered
by its seconds. The end of stdin ends it. It imports openpi and nothing of this project, so it runs under openpi's pins
in an environment of its own. Weights are seeded random numbers of the released sizes.
"""

import argparse
import dataclasses
import json
import sys
import time
from typing import Any


def main() -> int:
    """Builds the model, compiles, answers; exit code 3 when openpi cannot be imported."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--cameras", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=20)
    parser.add_argument("--horizon", type=int, default=10)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--depth", type=int, default=0, help="layers of both experts; 0: as released")
    parser.add_argument("--variant", default="", help='"dummy" takes openpi\'s test sizes')
    args = parser.parse_args()
    try:
        import flax.nnx as nnx
        import jax
        import jax.numpy as jnp
        import numpy as np
        from openpi.models import gemma, pi0_config
        from openpi.models import model as openpi_model
        from openpi.shared import array_typing, nnx_utils
    except ImportError as error:
        print(f"openpi cannot be imported: {error}", file=sys.stderr)
        return 3
    if args.depth:
        released = gemma.get_config
        gemma.get_config = lambda variant: dataclasses.replace(released(variant), depth=args.depth)
    sizes = {"paligemma_variant": args.variant, "action_expert_variant": args.variant} if args.variant else {}
    config = pi0_config.Pi0Config(
        pi05=True, action_horizon=args.horizon, dtype=args.dtype, discrete_state_input=False, **sizes
    )
    rng = np.random.default_rng(0)
    with array_typing.disable_typechecking():
        graph, state = nnx.split(nnx.eval_shape(config.create, jax.random.key(0)))
    block = rng.standard_normal(2**20).astype(np.float32)

    def leaf(shape: Any) -> Any:
        # openpi serves parameters in bfloat16; a float32 model is given float32 ones
        values = np.resize(block, shape.shape) * (0.5 * (shape.shape[-2] if len(shape.shape) > 1 else 1) ** -0.5)
        return jnp.asarray(values, args.dtype)

    state = jax.tree.map(
        lambda s: leaf(s) if hasattr(s, "shape") and not jnp.issubdtype(s.dtype, jax.dtypes.prng_key) else s, state
    )
    model = nnx.merge(graph, state)
    sample = nnx_utils.module_jit(model.sample_actions)
    names = openpi_model.IMAGE_KEYS
    side = openpi_model.IMAGE_RESOLUTION[0]
    tokens, mask = np.zeros((1, config.max_token_len), np.int32), np.zeros((1, config.max_token_len), bool)
    tokens[0, : args.prompt], mask[0, : args.prompt] = rng.integers(1, 1000, args.prompt), True
    host = {
        "image": {n: rng.integers(0, 255, (1, side, side, 3), np.uint8) for n in names},
        "image_mask": {n: np.array([i < args.cameras]) for i, n in enumerate(names)},
        "state": np.zeros((1, config.action_dim), np.float32),
        "tokenized_prompt": tokens,
        "tokenized_prompt_mask": mask,
    }

    def step() -> float:
        start = time.perf_counter()
        observation = openpi_model.Observation.from_dict(jax.tree.map(jnp.asarray, host))
        np.asarray(sample(jax.random.key(0), observation, num_steps=args.steps))
        return time.perf_counter() - start

    first = step()
    facts = {"jax": jax.__version__, "device": jax.devices()[0].device_kind, "first_call_s": first}
    print("ready", json.dumps(facts), flush=True)
    for _ in sys.stdin:
        print(step(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
