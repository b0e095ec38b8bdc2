"""The `openpi` command with one more configuration, the small model of the tests: `python tiny_openpi.py serve …`.

A program of its own, so that tests can start servers, send them signals and read their exit codes.
"""

import atexit
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

DATA = Path(__file__).parent / "data"
CONFIG = "tiny_libero"
MODEL = ["--tokenizer", str(DATA / "toy_sentencepiece.model"), "--num-steps", "2", "--prompt-lengths", "16"]


@functools.cache
def policy() -> list[str]:
    """Arguments for the small policy, whose checkpoint is there as long as this process."""
    from tiny_policy import FILES, small_params

    from safe_pruner_jax.model.checkpoint import save_params

    folder = Path(tempfile.mkdtemp(prefix="small-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    save_params(folder / "checkpoint", small_params("float32"))
    shutil.copytree(FILES["checkpoint"] / "assets", folder / "checkpoint" / "assets", dirs_exist_ok=True)
    return ["policy:checkpoint", f"--policy.config={CONFIG}", f"--policy.dir={folder / 'checkpoint'}"]


def start(*argv: str, cwd: Path, timeout_s: float = 900.0, **environment: str) -> subprocess.Popen:
    """`openpi serve` of the small model with stdout and stderr in `cwd/log`; killed after `timeout_s`."""
    root = str(Path(__file__).parents[1])
    command = [sys.executable, __file__, "serve", *policy(), *MODEL, "--port", "0", *argv]
    with (cwd / "log").open("ab") as log:
        process = subprocess.Popen(
            command, cwd=cwd, stdout=log, stderr=log, env={**os.environ, "PYTHONPATH": root, **environment}
        )
    watchdog = threading.Timer(timeout_s, process.kill)
    watchdog.daemon = True
    watchdog.start()
    return process


if __name__ == "__main__":
    from tiny_policy import small_config

    from safe_pruner_jax.cli import main as cli
    from safe_pruner_jax.robots import configs

    configs.CONFIGS[CONFIG] = small_config()
    sys.exit(cli.main())
