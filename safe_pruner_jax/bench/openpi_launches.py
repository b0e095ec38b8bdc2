"""openpi's own control step compiled for a GPU that is not there, in openpi's interpreter."""

import json
import subprocess
import tempfile
import time
from pathlib import Path

from safe_pruner_jax.bench import thunks
from safe_pruner_jax.bench.aot import Compiled
from safe_pruner_jax.bench.baseline import PROGRAM
from safe_pruner_jax.bench.measure import Bench
from safe_pruner_jax.bench.targets import Target, TargetError
from safe_pruner_jax.model.config import Pi0Config


def compiled(to: Target, args: Bench, config: Pi0Config) -> Compiled:
    """`sample_actions` of openpi's π0.5 as this GPU would run it: three views and its whole prompt, masked or not.

    Args:
      to: the GPU.
      args: `openpi_python` needs openpi and jax's CUDA plugin of its jax's version.
      config: for the dtype, the horizon and the depth.

    Raises:
      TargetError: openpi or the plugin cannot be had there, or it does not compile; in one line.
    """
    options = {"dtype": config.dtype, "cameras": args.views, "prompt": args.prompt, "steps": args.num_steps}
    options |= {"horizon": config.action_horizon} | ({"depth": args.depth} if args.depth is not None else {})
    options |= {"variant": args.openpi_variant} if args.openpi_variant else {}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="aot") as folder:
        description, dump = Path(folder) / "target.txtpb", Path(folder) / "dump"
        description.write_text(to.config_text(), encoding="utf-8")
        words = [str(part) for key, value in options.items() for part in (f"--{key}", value)]
        command = [args.openpi_python, str(PROGRAM), *words, "--target", str(description), "--dump", str(dump)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            raise TargetError(f"target {to.name}: openpi's interpreter: {error}; give another one") from error
        facts = [line.removeprefix("compiled ") for line in done.stdout.splitlines() if line.startswith("compiled ")]
        if done.returncode or not facts:
            why = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:200]
            raise TargetError(f"target {to.name}: openpi does not compile: {why}")
        memory = json.loads(facts[-1])
        sequence = thunks.read(dump)
    seconds = time.perf_counter() - start
    return Compiled(sequence, memory["argument_bytes"], memory["temporary_bytes"], seconds)
