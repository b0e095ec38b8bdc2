"""Cases under the laws: every pruner, and some with other choices; what is known of single ones."""

import math

from synthetic import case

from safe_pruner_jax.pruners import PRUNERS

CASES = [
    *map(case, PRUNERS),
    case("safe", every=3, keep=0.5, fuse=0.0),
    case("safe", max_age=2, match="camera", per_camera=2, threshold=-1.0),
    case("safe", variant="as_released", keep=5, queries="last"),
    case("safe", pool=1.5, threshold=0.5, keep=0.3, queries="text"),
    case("safe", pool=2, keep=5, every=4),
    case("safe", warm_start=3, threshold=0.5),
    case("safe", cut=0, threshold=0.9, pool=1.5, keep=0.3),
    case("safe", cut=0, threshold=0.8, late="prefix", queries="all", max_age=3),
    case("safe", cut=0, threshold=0.9, soft=0.1, keep=0.3),
    case("safe", soft=0.2, match="camera", threshold=0.9),
    case("safe", grippers=(0,), threshold=-1.0),
    case("safe", late="prefix", queries="all", over="all", threshold=0.3, keep=0.3),
    case("safe", features="hidden", late="prefix", late_layers=(-1,), threshold=-1.0, max_age=4),
    case("fastv", queries="last", warm_start=2, keep=5),
    case("random", warm_start=2, keep=0.3),
    case("vla_pruner", variant="as_released", keep=5, window=2),
    case("divprune", keep=7),
    case("vla_cache", variant="as_released", keep=0.75, static=0.9, relevant=0.1),
    case("divprune", keep=0.3, warm_start=2),
    case("specprune", keep=9, executed=1),
    case("specprune", variant="as_released", alpha=2.0, keep=0.5),
    case("sparsevlm", version="v2", keep=0.4),
    case("sparsevlm", keep=0.5, layers=(0, 1, 3)),
]

SLOTWISE = {"random"}
"""Pruners whose score belongs to the slot, not to the token in it: permuting tokens does not permute it."""

TIED = {
    case("vla_pruner", variant="as_released", keep=5, window=2),
    case("vla_cache", variant="as_released", keep=0.75, static=0.9, relevant=0.1),
    case("safe", cut=0, threshold=0.9, pool=1.5, keep=0.3),
    case("safe", cut=0, threshold=0.8, late="prefix", queries="all", max_age=3),
}
"""Cases in which the slot decides: between mutual nearest neighbours, equally far; in what order tokens are reused;
between tokens that found the same partner in the keyframe, where the forecast alone is the score."""

COUNTED = {"specprune", "vla_cache"}
"""Pruners that may leave slots of their static budget empty."""

BAD = {
    "keep": (0, -0.1, 1.5, 1.0001, 2.5, math.nan, math.inf, True),
    "cut": (-1, 1.5),
    "fuse": (-0.1, 1.1, math.nan),
    "threshold": (-1.1, 1.1, math.nan),
    "queries": ("image", ""),
    "over": ("text", ""),
    "late": ("action", None),
    "features": ("z", None),
    "late_layers": ((),),
    "late_steps": ("first",),
    "match": ("robot", None),
    "soft": (-0.1, math.nan, math.inf),
    "pool": (0.5, 0, -1.0, math.nan, math.inf),
    "warm_start": (0, -1),
    "grippers": ((), (-1,), (0.5,)),
    "every": (0, -1),
    "max_age": (0, -1),
    "per_camera": (-1,),
    "variant": ("paper", None),
    "window": (0, -1),
    "decay": (-0.1, 1.1, math.nan),
    "version": ("v3", None),
    "static": (-0.1, 1.1, math.nan),
    "relevant": (-0.1, 1.1, math.nan),
    "growth": (-0.1, 1.1, math.nan),
    "alpha": (0, -1.0, math.nan),
    "drop": (-0.1, 1.0, math.nan),
    "smoothing": (-0.1, 1.1, math.nan),
    "slope": (0, -1.0, math.nan),
    "slow": (-0.1, math.nan),
    "still": (-0.1, math.nan),
    "executed": (0, -1),
    "translation": ((0, 1), (0, 1, -1)),
    "rotation": ((0, 1), (0, 1, -1)),
    "layers": ((), (5, 2), (-1,)),
}
"""Values out of range by argument name; an argument without an entry fails the law of the factory."""
