"""Serving a policy to openpi's clients: `serve`, `running` for notebooks and tests, `Recorder`."""

from safe_pruner_jax.serving.recorder import Recorder
from safe_pruner_jax.serving.server import Backend, Server, ServerError, Session, running, serve
from safe_pruner_jax.serving.wire import LIMITS, Limits, WireError, pack, unpack

__all__ = [
    "LIMITS",
    "Backend",
    "Limits",
    "Recorder",
    "Server",
    "ServerError",
    "Session",
    "WireError",
    "pack",
    "running",
    "serve",
    "unpack",
]
