"""Compares openpi's policy with the same policy unpruned behind `openpi_patch.prune(policy, "full")`.

    python scripts/check_patch.py --config pi05_libero --dir /path/to/checkpoint   # with openpi installed
    python scripts/check_patch.py --policy module:function                         # any policy of its interface

Both get the same requests and the same noise, step by step. Exit code 0 if every difference is within the tolerance,
1 if not, 2 if nothing could be compared.
"""

import dataclasses
import importlib
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from openpi_patch import prune

TOLERANCES = {"float32": 1e-4, "bfloat16": 3e-2}
"""Largest difference relative to the range of the actions; bfloat16 results are not bit-defined (docs/design.md)."""


def openpi_policy(config: str, folder: str) -> Any:
    """openpi's own policy."""
    try:
        from openpi.policies import policy_config
        from openpi.training import config as configs
    except ImportError as error:
        raise SystemExit(
            f"check_patch: openpi cannot be imported ({error}); install it from its repository, or give --policy"
        ) from error
    return policy_config.create_trained_policy(configs.get_config(config), folder)


def compare(
    policy: Any, pruner: str, requests: list[dict], seed: int
) -> tuple[list[tuple[float, float, float, float]], str]:
    """Per request: largest difference, range of openpi's actions, milliseconds of both; and the activation dtype."""
    patched = prune(policy, pruner)
    config = patched.policy.engine.config
    rng, rows = np.random.default_rng(seed), []
    for request in requests:
        noise = rng.standard_normal((config.action_horizon, config.action_dim), np.float32)
        times, actions = [], []
        for one in (policy, patched):
            start = time.perf_counter()
            actions.append(np.asarray(one.infer(dict(request), noise=noise)["actions"]))
            times.append((time.perf_counter() - start) * 1e3)
        rows.append((float(np.abs(actions[0] - actions[1]).max()), float(np.ptp(actions[0])), *times))
    return rows, config.dtype


def table(rows: list[tuple[float, float, float, float]]) -> str:
    """Rows of `compare` as text."""
    lines = [
        f"{'step':>4}  {'max |difference|':>16}  {'range':>9}  {'relative':>9}  {'openpi ms':>10}  {'patched ms':>10}"
    ]
    for step, (difference, spread, theirs, ours) in enumerate(rows):
        lines.append(
            f"{step:4d}  {difference:16.3e}  {spread:9.3f}  {difference / spread:9.1e}  {theirs:10.1f}  {ours:10.1f}"
        )
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What is compared.

    Args:
      config: openpi's name of the training configuration.
      dir: checkpoint folder or gs:// address.
      policy: module:function that makes a policy, in place of config and dir.
      steps: requests.
      seed: of requests and noise.
      tolerance: relative to the range of the actions; default by dtype.
    """

    config: str | None = None
    dir: str | None = None
    policy: str | None = None
    steps: int = 4
    seed: int = 0
    tolerance: float | None = None


def main() -> int:
    args = tyro.cli(Arguments, description=__doc__)
    if args.policy:
        sys.path.insert(0, str(Path.cwd()))
        module, _, function = args.policy.partition(":")
        policy = getattr(importlib.import_module(module), function)()
    elif args.config and args.dir:
        policy = openpi_policy(args.config, args.dir)
    else:
        print("check_patch: expected --config and --dir, or --policy", file=sys.stderr)
        return 2
    from openpi_patch.policy import OpenpiTransform
    from openpi_patch.weights import parameters, sizes

    transform = OpenpiTransform(policy, sizes(policy._model, parameters(policy._model)))
    rng = np.random.default_rng(args.seed)
    requests = [transform.example(rng) | {"prompt": f"do something, step {step % 2}"} for step in range(args.steps)]
    rows, dtype = compare(policy, "full", requests, args.seed)
    tolerance = TOLERANCES[dtype] if args.tolerance is None else args.tolerance
    print(f"activations in {dtype}; milliseconds of first steps contain compilation")
    print(table(rows))
    worst = max(difference / spread for difference, spread, *_ in rows)
    verdict = "equal" if worst <= tolerance else "NOT equal"
    print(f"largest relative difference {worst:.1e}, tolerance {tolerance:.0e}: {verdict}")
    return 0 if worst <= tolerance else 1


if __name__ == "__main__":
    sys.exit(main())
