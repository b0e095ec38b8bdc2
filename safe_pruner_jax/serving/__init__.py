"""Serving a policy to openpi's clients: `serve`, `running` for notebooks and tests, `Recorder`."""

from safe_pruner_jax.serving.access import Access, ServerError
from safe_pruner_jax.serving.backend import Backend, Session, Sessions
from safe_pruner_jax.serving.recorder import Recorder, Step
from safe_pruner_jax.serving.scheduler import Terms
from safe_pruner_jax.serving.server import Server, running, serve
from safe_pruner_jax.serving.wire import LIMITS, Limits, WireError, pack, unpack

__all__ = [
    "LIMITS",
    "Access",
    "Backend",
    "Limits",
    "Recorder",
    "Server",
    "ServerError",
    "Session",
    "Sessions",
    "Step",
    "Terms",
    "WireError",
    "pack",
    "running",
    "serve",
    "unpack",
]
