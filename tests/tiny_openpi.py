"""The `openpi` command with one more configuration, the tiny model of the tests: `python tiny_openpi.py serve …`.

A program of its own, so that tests can start servers, send them signals and read their exit codes.
"""

import os
import subprocess
import sys
import threading
from pathlib import Path

DATA = Path(__file__).parent / "data"
CONFIG = "tiny_libero"
POLICY = ["policy:checkpoint", f"--policy.config={CONFIG}", f"--policy.dir={DATA / 'ckpt_tiny_pi05'}"]
MODEL = ["--tokenizer", str(DATA / "toy_sentencepiece.model"), "--num-steps", "2", "--prompt-lengths", "16"]


def start(*argv: str, cwd: Path, timeout_s: float = 900.0, **environment: str) -> subprocess.Popen:
    """`openpi serve` of the tiny model with stdout and stderr in `cwd/log`; killed after `timeout_s`."""
    root = str(Path(__file__).parents[1])
    command = [sys.executable, __file__, "serve", *POLICY, *MODEL, "--port", "0", *argv]
    with (cwd / "log").open("ab") as log:
        process = subprocess.Popen(
            command, cwd=cwd, stdout=log, stderr=log, env={**os.environ, "PYTHONPATH": root, **environment}
        )
    watchdog = threading.Timer(timeout_s, process.kill)
    watchdog.daemon = True
    watchdog.start()
    return process


if __name__ == "__main__":
    from tiny_policy import tiny_config

    from safe_pruner_jax.cli import main as cli
    from safe_pruner_jax.robots import configs

    configs.CONFIGS[CONFIG] = tiny_config(False)
    sys.exit(cli.main())
