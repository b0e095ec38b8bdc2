"""GPUs that programs are compiled for without having one: data sheets as files, each with its sources.

known()                        ("h100", "h200", "orin", …)
target("h100").config_text()   what XLA's compiler is given in place of a device
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).with_name("targets")


class TargetError(ValueError):
    """A target that cannot be used; the message says why and what to do, in one line."""


@dataclass(frozen=True)
class Target:
    """A GPU as its data sheet describes it.

    Args:
      name: of its file.
      title: what it is sold as.
      compute_capability: "major.minor".
      accelerated_features: whether code for this very chip may be generated (sm_90a, not sm_90).
      multiprocessors, threads_per_multiprocessor, float_units_per_multiprocessor: counts.
      shared_memory_per_multiprocessor, shared_memory_per_block, l2_bytes, memory_bytes: bytes.
      clock_ghz: boost clock.
      bytes_per_s: of the memory.
      flops_per_s: {dtype: dense operations per second}; a multiply-add is two.
      sources: where these numbers come from.
    """

    name: str
    title: str
    compute_capability: str
    accelerated_features: bool
    multiprocessors: int
    threads_per_multiprocessor: int
    shared_memory_per_multiprocessor: int
    shared_memory_per_block: int
    l2_bytes: int
    clock_ghz: float
    memory_bytes: int
    bytes_per_s: float
    float_units_per_multiprocessor: int
    flops_per_s: dict[str, float]
    sources: list[str]

    def macs_per_s(self, dtype: str) -> float:
        """Multiply-adds per second of products of `dtype`."""
        return self.flops_per_s[dtype] / 2

    def config_text(self) -> str:
        """The target configuration of XLA's GPU compiler, as a text protocol buffer.

        The versions have to be inside `gpu_device_info`: without them XLA leaves loops out of CUDA graphs and says
        nothing. The driver and runtime are those that jax's CUDA 12 packages are built for.
        """
        major, minor = self.compute_capability.split(".")
        feature = "ACCELERATED_FEATURES" if self.accelerated_features else "NONE"
        limits = {
            "threads_per_block_limit": 1024,
            "threads_per_warp": 32,
            "shared_memory_per_block": 49152,
            "shared_memory_per_core": self.shared_memory_per_multiprocessor,
            "shared_memory_per_block_optin": self.shared_memory_per_block,
            "threads_per_core_limit": self.threads_per_multiprocessor,
            "core_count": self.multiprocessors,
            "fpus_per_core": self.float_units_per_multiprocessor,
            "block_dim_limit_x": 2**31 - 1,
            "block_dim_limit_y": 65535,
            "block_dim_limit_z": 65535,
            "thread_dim_limit_x": 1024,
            "thread_dim_limit_y": 1024,
            "thread_dim_limit_z": 64,
            "registers_per_core_limit": 65536,
            "registers_per_block_limit": 65536,
            "memory_bandwidth": int(self.bytes_per_s),
            "l2_cache_size": self.l2_bytes,
            "clock_rate_ghz": self.clock_ghz,
            "device_memory_size": self.memory_bytes,
        }
        versions = {"driver": "13.0.0", "runtime": "12.9.0", "compile_time_toolkit": "12.9.0", "dnn": "9.10.0"}
        lines = [f"  {key}: {value}" for key, value in limits.items()]
        lines += [f'  {key}_version: "{value}"' for key, value in versions.items()]
        lines += [f"  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {feature} }}"]
        tail = 'platform_name: "CUDA"\ndnn_version_info { major: 9 minor: 10 patch: 0 }\n'
        return "\n".join(["gpu_device_info {", *lines, "}", tail]) + f'device_description_str: "{self.title}"\n'


def known(folder: Path = FOLDER) -> tuple[str, ...]:
    """Names of the targets that have a file."""
    return tuple(sorted(path.stem for path in folder.glob("*.json")))


def target(name: str, folder: Path = FOLDER) -> Target:
    """The target of a name.

    Raises:
      TargetError: no such file, or one with a field missing, unknown or of another kind.
    """
    path = folder / f"{name}.json"
    if not path.exists():
        raise TargetError(f"target {name}: expected one of {', '.join(known(folder))}; add {name}.json beside them")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise TargetError(f"target {name}: {path.name} is not JSON ({error}); repair it") from error
    return _checked(name, data)


def _checked(name: str, data: dict[str, Any]) -> Target:
    kinds = {field.name: field.type for field in dataclasses.fields(Target) if field.name != "name"}
    for missing in sorted(set(kinds) - set(data)):
        raise TargetError(f"target {name}: {name}.json has no field {missing}; give it, with its source")
    for unknown in sorted(set(data) - set(kinds)):
        raise TargetError(f"target {name}: {name}.json has an unknown field {unknown}; expected {', '.join(kinds)}")
    for field in ("multiprocessors", "bytes_per_s", "memory_bytes"):
        if not isinstance(data[field], int | float) or data[field] <= 0:
            raise TargetError(f"target {name}: {field}: expected a positive number, got {data[field]!r}; correct it")
    for dtype in ("bfloat16", "float32"):
        if not data["flops_per_s"].get(dtype):
            raise TargetError(f"target {name}: flops_per_s has no rate of {dtype}; give it, with its source")
    return Target(name=name, **data)
