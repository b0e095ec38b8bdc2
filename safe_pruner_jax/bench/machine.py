"""The machine: what it is, what it can do at most, how much memory a step took."""

import os
import platform
import resource
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from safe_pruner_jax.engine.xla import jit, options

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Limits:
    """Best rates measured here: matrix products in multiply-adds per second, copies in bytes moved per second."""

    macs_per_s: float
    bytes_per_s: float

    def seconds(self, macs: float, moved: float) -> float:
        """Roofline: the time that neither the products nor the memory traffic can undercut."""
        return max(macs / self.macs_per_s, moved / self.bytes_per_s)

    def as_json(self) -> dict[str, float]:
        """Plain numbers."""
        return asdict(self)


def limits(dtype: str, *, side: int | None = None, repeats: int = 5) -> Limits:
    """Measures them on the default device: products of `dtype` and a copy, the best of some repeats.

    Args:
      dtype: of the products, which accumulate in float32: a square one, and one of the same size whose left side is
        four times as high, which a CPU may run faster.
      side: of the square matrices; the default is 2048 on a CPU, 8192 elsewhere.
      repeats: of each.
    """
    side = side or (2048 if jax.default_backend() == "cpu" else 8192)
    pairs = [(jnp.ones((m * side, side), dtype), jnp.ones((side, side // m), dtype)) for m in (1, 4)]
    product = jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32).astype(a.dtype))
    long = jnp.ones(16 * side * side, jnp.float32)  # far beyond every cache
    copy = jax.jit(lambda x: x + 1.0, donate_argnums=0)  # into the same pages: reads and writes, nothing else
    multiply = min(_best(lambda _, pair=pair: product(*pair), None, repeats) for pair in pairs)
    move = _best(copy, long, repeats)
    return Limits(side**3 / multiply, 2 * 4 * 16 * side * side / move)


def _best(step: Callable, x: Any, repeats: int) -> float:
    best = float("inf")
    for i in range(repeats + 1):
        start = time.perf_counter()
        out = jax.block_until_ready(step(x))
        if i:
            best = min(best, time.perf_counter() - start)
        x = None if x is None else out
    return best


def peak_bytes(step: Callable[[], None]) -> int | None:
    """Most memory in use while `step` runs: the device's own count, on a CPU the resident set of this process.

    None where the device does not tell.
    """
    if jax.default_backend() != "cpu":
        step()
        stats = jax.devices()[0].memory_stats() or {}
        return stats.get("peak_bytes_in_use")
    try:
        CLEAR.write_text("5")  # Linux: forget the highest resident set so far
    except OSError:
        step()
        scale = 1 if platform.system() == "Darwin" else 1024
        return scale * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step()
    return _status("VmHWM")


def resident_bytes() -> int | None:
    """Memory this process holds now; None where the system does not tell."""
    return _status("VmRSS") if STATUS.exists() else None


def _status(name: str) -> int | None:
    for line in STATUS.read_text().splitlines():
        if line.startswith(name + ":"):
            return 1024 * int(line.split()[1])
    return None


def available_bytes() -> int:
    """Host memory that can still be taken."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def describe() -> dict[str, Any]:
    """Machine, versions and flags: what a reader needs to repeat a measurement."""
    device = jax.devices()[0]
    flags = ("XLA_FLAGS", "LD_PRELOAD", "OMP_NUM_THREADS", "JAX_PLATFORMS")
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")},
        "flags": {name: Path(os.environ[name]).name for name in flags if os.environ.get(name)},
        "xla_options": options(),
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
