"""SAFE-Pruner and its peers for π0.5 in JAX: training-free visual token pruning behind openpi's interface.

Public names in reading order. They are imported when first used, so that what needs no jax (the robots' border,
the server, the simulator) stay light.
"""

import importlib

__version__ = "0.2.0"

_HOME = {
    # a pruner
    "Plan": "pruners.base",
    "Evidence": "pruners.base",
    "Selection": "pruners.base",
    "Pruner": "pruners.base",
    "PRUNERS": "pruners",
    "full": "pruners.full",
    "fastv": "pruners.fastv",
    "random": "pruners.random",
    "safe": "pruners.safe",
    "vla_pruner": "pruners.vla_pruner",
    "specprune": "pruners.specprune",
    "vla_cache": "pruners.vla_cache",
    "sparsevlm": "pruners.sparsevlm",
    "divprune": "pruners.divprune",
    # a model
    "Pi0Config": "model.config",
    "pi05": "model.config",
    "pi0": "model.config",
    "mini": "model.config",
    "prepare": "model.pi0",
    # the two together
    "Engine": "engine.engine",
    "Inputs": "engine.state",
    "ControlState": "engine.state",
    # a policy
    "Policy": "policy.policy",
    "Session": "policy.policy",
    "load_policy": "policy.loading",
    "get_config": "robots.configs",
}

__all__ = [*_HOME, "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
