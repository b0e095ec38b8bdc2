"""Time of a control step on a machine that is not at hand: the roofline of its data sheet, and an estimate beside it.

python benchmarks/predict.py [--macs-per-s 494.5e12] [--bytes-per-s 4.8e12] [--views 2] [--prompt 20] [--robots 8]

The defaults are an H200's: 989 TFLOP/s in dense bfloat16 and 4.8 TB/s. Nothing is run. No program reaches the roofline;
the estimate assumes what share of it programs do reach, and that the denoise loop, small layers behind one another,
takes at least the time of its launches. `openpi bench` measures instead of assuming.
"""

import dataclasses
import sys
from typing import Literal

import tyro

from safe_pruner_jax.bench.machine import Limits
from safe_pruner_jax.bench.modes import example_of, make, roofline_s, shapes_of, weight_bytes
from safe_pruner_jax.engine.flops import exact_flops
from safe_pruner_jax.policy.policy import all_slots, layout_of
from safe_pruner_jax.pruners import full
from safe_pruner_jax.robots.configs import get_config


def main(
    macs_per_s: float = 494.5e12,
    bytes_per_s: float = 4.8e12,
    views: int = 2,
    prompt: int = 20,
    num_steps: int = 10,
    config: str = "pi05_libero",
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    keeps: tuple[float, ...] = (0.5, 0.3, 0.2, 0.1),
    robots: int = 1,
    reached: float = 0.55,
    launches: int = 15,
    launch_us: float = 2.5,
    host_ms: float = 0.5,
) -> int:
    """Prints milliseconds: the larger of multiplying and of reading weights, per part; their sum; the estimate.

    Args:
      macs_per_s: multiply-adds, half of what is sold as FLOP/s.
      bytes_per_s: of the memory.
      views: real cameras.
      prompt: alive prompt tokens.
      num_steps: denoise steps.
      config: whose sizes.
      dtype: weights and activations.
      keeps: shares kept by SAFE-Pruner.
      robots: in one step.
      reached: share of the roofline that vision tower, prefix and expert reach (assumed).
      launches: kernels per expert layer (assumed).
      launch_us: microseconds from one small kernel's start to the next's (assumed).
      host_ms: the host's part (assumed).
    """
    model = get_config(config).model.replace(dtype=dtype)
    limits, read = Limits(macs_per_s, bytes_per_s), weight_bytes(shapes_of(model, num_steps))
    example = example_of(model, views, prompt)
    alive, slots = layout_of(example, model), all_slots(model)
    modes = {"all slots": (full().plan, slots, False), "full": (full().plan, alive, False)}
    modes |= {f"safe {keep:g}": (make("safe", keep).plan, alive, True) for keep in keeps}
    columns = f"{'vision':>7} {'prefix':>7} {'expert':>7} {'sum, ms':>8} {'estimate':>9}  prefix bound by"
    print(f"{'mode':10} {'10⁹ macs':>9} {columns}")
    for name, (plan, layout, pruned) in modes.items():
        macs = dataclasses.asdict(exact_flops(model, plan, layout, pruned=pruned, num_steps=num_steps))
        part = {"vision": ("vision",), "prefix": ("prefix", "matching"), "expert": ("capture", "expert")}
        macs = {k: robots * count for k, count in macs.items()}
        ms = {p: 1e3 * limits.seconds(sum(macs[k] for k in keys), read[p]) for p, keys in part.items()}
        assert abs(sum(ms.values()) - 1e3 * roofline_s(macs, read, limits)) < 1e-9
        loop = 1e-3 * launch_us * launches * num_steps * model.depth
        estimate = (ms["vision"] + ms["prefix"]) / reached + max(ms["expert"] / reached, loop) + host_ms
        bound = "reading weights" if ms["prefix"] == 1e3 * read["prefix"] / bytes_per_s else "products"
        times = " ".join(f"{ms[p]:7.2f}" for p in part)
        print(f"{name:10} {sum(macs.values()) / 1e9:9.0f} {times} {sum(ms.values()):8.2f} {estimate:9.1f}  {bound}")
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
