"""Ablations of the published methods: variants that answer a question of their papers and that nobody would run.

    make("vla_pruner/prefill", keep=0.2)                          by name, with the choices of the method itself
    openpi analyze actions --methods specprune specprune/static   next to the method
    openpi sweep --methods vla_pruner vla_pruner/ema   and in closed loop

The command line does not list them. What a method has as a choice is none of these: `safe` with fuse=0 ("w/o
forecast") and every=10 ("w/o division"), w, γ and the layer of `vla_pruner`, α of `specprune`.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from safe_pruner_jax.pruners.base import Pruner
from safe_pruner_jax.pruners.full_steps import with_full_steps
from safe_pruner_jax.pruners.specprune import Parts as SpecPruneParts
from safe_pruner_jax.pruners.specprune import build as build_specprune
from safe_pruner_jax.pruners.specprune import specprune
from safe_pruner_jax.pruners.vla_pruner import Parts as VlaPrunerParts
from safe_pruner_jax.pruners.vla_pruner import build as build_vla_pruner
from safe_pruner_jax.pruners.vla_pruner import vla_pruner


def ablation(name: str, factory: Callable[..., Pruner], build: Callable[..., Pruner], parts: Any) -> Callable:
    """A factory with the choices of `factory` that builds the method from other parts, under another name."""
    defaults = {key: p.default for key, p in inspect.signature(factory).parameters.items()}

    @functools.wraps(factory)
    def made(**choices: Any) -> Pruner:
        if unknown := sorted(set(choices) - set(defaults)):
            raise TypeError(f"{name}: got an unexpected choice {unknown[0]!r}, expected some of {', '.join(defaults)}")
        return replace(build(parts, **defaults | choices), name=name)

    return made


_SPECPRUNE = {
    "static": SpecPruneParts(dynamic=False, controller=False),  # Section 7.5.1, technique 1
    "dynamic": SpecPruneParts(static=False, controller=False),  # technique 2
    "static-dynamic": SpecPruneParts(controller=False),  # techniques 1 and 2
    "static-controller": SpecPruneParts(dynamic=False),  # 1 and 3; the controller alone has nothing to control
    "no-reuse": SpecPruneParts(reuse=False),  # Section 7.5.2: local sets of 54 instead of 24 and global ones of 30
    "no-confidence": SpecPruneParts(confidence=False),  # Section 7.5.3: all layers weigh the same
    "mean-ranks": SpecPruneParts(heads=False),  # ranks of the head mean instead of each head's (Eq. 6)
}
_VLA_PRUNER = {
    "prefill": VlaPrunerParts(levels="prefill"),  # Section 5.4
    "action": VlaPrunerParts(levels="action"),
    "fusion": VlaPrunerParts(levels="fusion"),
    "ema": VlaPrunerParts(ema=0.5),  # Eq. 6 instead of Eq. 7; the paper gives no α
}

ABLATIONS: dict[str, Callable[..., Pruner]] = {}
"""METHOD/KIND → factory with the choices of the method."""

for _kind, _parts in _SPECPRUNE.items():
    _name = f"specprune/{_kind}"
    ABLATIONS[_name] = with_full_steps(ablation(_name, specprune, build_specprune, _parts))
for _kind, _parts in _VLA_PRUNER.items():
    _name = f"vla_pruner/{_kind}"
    ABLATIONS[_name] = with_full_steps(ablation(_name, vla_pruner, build_vla_pruner, _parts), follows="window")
