"""openpi's own model in a process of its own, stepped from outside.

    python openpi_step.py --dtype float32 --cameras 2 --prompt 20 --horizon 10 --steps 10

A line "ready {json}" on stdout when it is compiled; after that every line on stdin runs one control step, answered
by its seconds. The end of stdin ends it. It imports openpi and nothing of this project, so it runs under openpi's pins
in an environment of its own. Weights are seeded random numbers of the released sizes.

    python openpi_step.py … --target FILE --dump FOLDER

compiles the step for the GPU that FILE describes instead, and leaves XLA's dump in FOLDER and "compiled {json}" on
stdout; that takes jax's CUDA plugin and no GPU.
"""

import argparse
import dataclasses
import json
import sys
import time
from typing import Any


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--cameras", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=20)
    parser.add_argument("--horizon", type=int, default=10)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--depth", type=int, default=0, help="layers of both experts; 0: as released")
    parser.add_argument("--variant", default="", help='"dummy" takes openpi\'s test sizes')
    parser.add_argument("--target", default="", help="file with XLA's description of a GPU to compile for")
    parser.add_argument("--dump", default="", help="folder for what XLA writes down of it")
    return parser.parse_args()


def main() -> int:
    """Builds the model, compiles, answers; exit code 3 when openpi cannot be imported."""
    args = arguments()
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
    # jax forgets a plugin without a GPU as soon as it has started anything
    gpu = device(args.target) if args.target else None
    if released := args.depth and gemma.get_config:
        gemma.get_config = lambda variant: dataclasses.replace(released(variant), depth=args.depth)
    sizes = {"paligemma_variant": args.variant, "action_expert_variant": args.variant} if args.variant else {}
    sizes |= {"action_horizon": args.horizon, "dtype": args.dtype}
    config = pi0_config.Pi0Config(pi05=True, discrete_state_input=False, **sizes)
    rng = np.random.default_rng(0)
    host = observation(openpi_model, config, args, rng)
    with array_typing.disable_typechecking():
        graph, state = nnx.split(nnx.eval_shape(config.create, jax.random.key(0)))
    if gpu is not None:
        # openpi serves parameters in bfloat16; a float32 model is given float32 ones
        cast = lambda s: jax.ShapeDtypeStruct(s.shape, args.dtype) if is_weight(s) else s
        return compile_for(gpu, args, graph, jax.tree.map(cast, state), host)
    block = rng.standard_normal(2**20).astype(np.float32)

    def leaf(shape: Any) -> Any:
        values = np.resize(block, shape.shape) * (0.5 * (shape.shape[-2] if len(shape.shape) > 1 else 1) ** -0.5)
        return jnp.asarray(values, args.dtype)

    model = nnx.merge(graph, jax.tree.map(lambda s: leaf(s) if is_weight(s) else s, state))
    sample = nnx_utils.module_jit(model.sample_actions)

    def step() -> float:
        start = time.perf_counter()
        observation = openpi_model.Observation.from_dict(jax.tree.map(jnp.asarray, host))
        np.asarray(sample(jax.random.key(0), observation, num_steps=args.steps))
        return time.perf_counter() - start

    facts = {"jax": jax.__version__, "device": jax.devices()[0].device_kind, "first_call_s": step()}
    print("ready", json.dumps(facts), flush=True)
    for _ in sys.stdin:
        print(step(), flush=True)
    return 0


def is_weight(s: Any) -> bool:
    """Whether a leaf of openpi's state is an array of numbers, not a random key."""
    import jax

    return hasattr(s, "shape") and not jax.numpy.issubdtype(s.dtype, jax.dtypes.prng_key)


def observation(model: Any, config: Any, args: argparse.Namespace, rng: Any) -> dict[str, Any]:
    """One robot's observation on the host: random pixels, some cameras masked, a prompt padded to openpi's length."""
    import numpy as np

    side, names = model.IMAGE_RESOLUTION[0], model.IMAGE_KEYS
    tokens, mask = np.zeros((1, config.max_token_len), np.int32), np.zeros((1, config.max_token_len), bool)
    tokens[0, : args.prompt], mask[0, : args.prompt] = rng.integers(1, 1000, args.prompt), True
    return {
        "image": {n: rng.integers(0, 255, (1, side, side, 3), np.uint8) for n in names},
        "image_mask": {n: np.array([i < args.cameras]) for i, n in enumerate(names)},
        "state": np.zeros((1, config.action_dim), np.float32),
        "tokenized_prompt": tokens,
        "tokenized_prompt_mask": mask,
    }


def device(description: str) -> Any:
    """The device that a file describes."""
    import jax
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")
    with open(description, encoding="utf-8") as file:
        return topologies.get_topology_desc(platform="cuda", target_config=file.read(), topology="1x1x1").devices[0]


def compile_for(gpu: Any, args: argparse.Namespace, graph: Any, state: Any, host: dict[str, Any]) -> int:
    """Compiles `sample_actions` for a device and prints its memory; nothing is run."""
    import flax.nnx as nnx
    import jax
    from openpi.models import model as openpi_model
    from openpi.shared import array_typing

    place = jax.sharding.SingleDeviceSharding(gpu)
    put = lambda tree: jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), tree)

    def step(state: Any, key: Any, host: dict[str, Any]) -> Any:
        seen = openpi_model.Observation.from_dict(host)
        return nnx.merge(graph, state).sample_actions(key, seen, num_steps=args.steps)

    options = {"xla_dump_to": args.dump, "xla_dump_hlo_as_text": True}
    options["xla_gpu_experimental_dump_gpu_executable"] = True
    with array_typing.disable_typechecking():
        lowered = jax.jit(step).lower(put(state), put(jax.eval_shape(lambda: jax.random.key(0))), put(host))
    memory = lowered.compile(compiler_options=options).memory_analysis()
    sizes = {"argument_bytes": memory.argument_size_in_bytes, "temporary_bytes": memory.temp_size_in_bytes}
    print("compiled", json.dumps({"jax": jax.__version__} | sizes), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
