"""A second start that does not compile: XLA's programs are kept in a folder and read back.

keep_programs(default_folder())         before anything is compiled; a start with other shapes or versions adds its own
"""

import logging
import os
from pathlib import Path

import jax

logger = logging.getLogger(__name__)

LEAST_VERSION = (0, 6)
"""jax before this keeps no CPU programs that can be trusted: one was seen to crash on reading its own."""


def trusted() -> bool:
    """Whether this jax is new enough to read back what it has kept (`LEAST_VERSION`)."""
    return tuple(int(part) for part in jax.__version__.split(".")[:2]) >= LEAST_VERSION


def default_folder() -> Path | None:
    """Where programs are kept if nobody says otherwise.

    `$SAFE_PRUNER_PROGRAMS` ("none": nowhere), else `$XDG_CACHE_HOME/safe_pruner_jax/programs`, by default under
    ~/.cache; None where jax is too old to keep any.
    """
    if not trusted():
        return None
    if chosen := os.environ.get("SAFE_PRUNER_PROGRAMS"):
        return None if chosen == "none" else Path(chosen)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "safe_pruner_jax" / "programs"


def keep_programs(folder: str | os.PathLike | None) -> None:
    """Keeps every compiled program of this process in `folder`, and takes from it what is there.

    jax tells programs apart by their code, shapes, flags, device and versions, so a folder may serve several
    policies. One that cannot be written costs nothing but the time to compile.

    Args:
      folder: created with its parents; None keeps nothing.
    """
    if folder is None:
        return
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        logger.warning("programs are not kept: %s; give --programs another folder", error)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
