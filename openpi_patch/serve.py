"""openpi's `serve_policy.py` with a pruner: python -m openpi_patch.serve --pruner=safe <openpi's arguments>

openpi's own script reads its arguments and makes its policy; that policy is pruned and served. Ours are `--pruner`,
`--pruner.…` (its choices), `--host`, `--serving.…` (see `openpi serve --help`) and `--serve-policy PATH`, for a script
that does not lie beside the installed openpi.
"""

import dataclasses
import importlib.util
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import tyro

from openpi_patch.policy import PatchError, PrunedPolicy, prune
from safe_pruner_jax.cli.main import parse
from safe_pruner_jax.robots.robots import RequestError
from safe_pruner_jax.serving import Recorder, ServerError, serve
from safe_pruner_jax.serving.options import Serving

OURS = ("--pruner", "--host", "--serving", "--serve-policy")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ours:
    """What is added to openpi's arguments.

    Args:
      host: address to listen on; others than loopback need an API key.
      serve_policy: openpi's scripts/serve_policy.py; None: beside the installed openpi.
      serving: who may connect, and what a request may expect.
    """

    host: str = "127.0.0.1"
    serve_policy: Path | None = None
    serving: Serving = dataclasses.field(default_factory=Serving)


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Our arguments and openpi's.

    >>> split(["--env", "LIBERO", "--pruner=safe", "--pruner.keep", "0.2", "policy:default"])
    (['--pruner=safe', '--pruner.keep', '0.2'], ['--env', 'LIBERO', 'policy:default'])
    """
    ours: list[str] = []
    theirs: list[str] = []
    target = theirs
    for item in argv:
        if item.startswith("--") or item.startswith("policy:"):
            name = item.partition("=")[0]
            target = ours if any(name == package or name.startswith(f"{package}.") for package in OURS) else theirs
        target.append(item)
    return ours, theirs


def load_script(path: Path | None) -> ModuleType:
    """openpi's scripts/serve_policy.py as a module.

    Raises:
      PatchError: openpi or its script is not there.
    """
    if path is None:
        package = importlib.util.find_spec("openpi")
        if package is None:
            raise PatchError("openpi is not installed; install it from its repository, and this package beside it")
        places = list(package.submodule_search_locations or [])
        path = Path(places[0]).parents[1] / "scripts" / "serve_policy.py" if places else Path("serve_policy.py")
    if not path.is_file():
        raise PatchError(f"expected openpi's script at {path}, got no such file; give it with --serve-policy")
    script = importlib.util.spec_from_file_location("openpi_serve_policy", path)
    module = importlib.util.module_from_spec(script)
    sys.modules[script.name] = module  # its dataclasses look themselves up
    script.loader.exec_module(module)
    return module


def make(argv: Sequence[str]) -> tuple[Any, PrunedPolicy, Ours]:
    """openpi's arguments, the pruned policy, and ours. `--pruner=none`, the default, gives exactly openpi's replies.

    Raises:
      ValueError: an unknown pruner or a choice out of range.
      PatchError: openpi is not there, or its policy cannot be pruned.
    """
    ours, theirs = split(argv)
    options, method = parse(Ours, ours, "openpi_patch.serve")
    script = load_script(options.serve_policy)
    args = tyro.cli(script.Args, args=theirs, prog="openpi_patch.serve")
    policy = prune(script.create_policy(args), method.name, describe=method.describe, free=True, **method.choices)
    return args, policy, options


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until a signal; the exit code: 0 done, 2 told in one line what is wrong."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", force=True)
    try:
        args, policy, ours = make(list(sys.argv[1:] if argv is None else argv))
        serve(
            ours.serving.fleet(policy.policy),
            host=ours.host,
            port=args.port,
            max_message_bytes=ours.serving.max_message_mib * 2**20,
            client_errors=(RequestError, PatchError),
            recorder=Recorder("policy_records") if args.record else None,
            access=ours.serving.access(ours.host),
            terms=ours.serving.terms(),
        )
    except (ValueError, OSError, ServerError) as error:
        print(f"openpi_patch.serve: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
