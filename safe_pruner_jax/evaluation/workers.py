"""Simulators in processes of their own, each playing the episodes it is given.

    parent                                        worker
      start ──── (make_env, server) ──────────────> makes an environment when a job needs another one
      send(Job) ─────────────────────────────────>
            <──── ("request", observation) ─────── at every policy call, unless there is a server to ask
      send(reply), or an Exception ───────────────>
            <──── ("episode", Episode) ────────────
            <──── ("fatal", text) ───────────────── no simulator, no server: nothing would come of another try

A worker imports no jax and ends when its parent does. OpenGL in software would take every core for each of them:
they run with LP_NUM_THREADS=1 unless that is set.
"""

import contextlib
import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from safe_pruner_jax.evaluation.rollout import Episode, rollout
from safe_pruner_jax.libero.env import LiberoEnv, load_task
from safe_pruner_jax.libero.shuffled import open_env
from safe_pruner_jax.libero.simulator import LiberoUnavailable

MakeEnv = Callable[[str, int], LiberoEnv]
"""Suite and task → environment; a module's function, since it is sent to another process by name."""


@dataclass(frozen=True)
class Job:
    """One episode to play; `seed` is the one a server is asked to draw its noise from."""

    suite: str
    task: int
    trial: int
    replan: int = 5
    max_steps: int | None = None
    delay: int = 0
    rtc: bool = False
    seed: int | None = None


class PolicyFailed(RuntimeError):
    """The policy raised; the message is that of its exception."""


def libero_env(suite: str, task: int) -> LiberoEnv:
    """The environment of a task as openpi's client has it; a shuffled suite's has other initial states."""
    return open_env(load_task(suite, task))


def broken(job: Job, error: str) -> Episode:
    """The record of an episode that could not be played to its end."""
    return Episode(job.suite, job.task, job.trial, "error", steps=0, seconds=0.0, calls=(), error=error)


class Worker:
    """A simulator process, seen from its parent.

    Attributes: `connection`, to wait for; `since`, when it was last heard of or spoken to, `time.monotonic()`.

    Args:
      make_env: makes its environments.
      server: address that it asks; None: it asks its parent.
    """

    def __init__(self, make_env: MakeEnv = libero_env, server: str | None = None):
        ours, theirs = socket.socketpair()
        path = os.pathsep.join(dict.fromkeys(p or os.getcwd() for p in sys.path))
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", f"from {__name__} import main; main({theirs.fileno()})"],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={"LP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path},
            )
        self.connection = Connection(ours.detach())
        self._why = ""
        self.since = time.monotonic()
        self.send((make_env, server))

    def send(self, message: Any) -> None:
        """Sends a job or a reply; one that has died is noticed when it is next listened to."""
        self.since = time.monotonic()
        with contextlib.suppress(OSError):
            self.connection.send(message)

    def receive(self) -> tuple[str, Any]:
        """What it says, or ("lost", why) when it has died; blocks unless its connection is ready."""
        self.since = time.monotonic()
        try:
            return self.connection.recv()
        except (EOFError, OSError, pickle.UnpicklingError):
            with contextlib.suppress(subprocess.TimeoutExpired):  # it has hung up: let it tell how it ended
                self.process.wait(3)
            self.process.kill()
            return "lost", f"WorkerLost: the simulator process ended with {_exit(self.process.wait())}{self._why}"

    def give_up(self, why: str) -> None:
        """Kills it; `receive` will say why."""
        self._why = f", {why}"
        self.process.kill()

    def stop(self) -> None:
        """Ends the process; may be called again."""
        self.connection.close()
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(3)
        self.process.kill()
        self.process.wait()


def _exit(code: int) -> str:
    with contextlib.suppress(ValueError):
        return f"signal {signal.Signals(-code).name}"
    return f"exit code {code}"


# --- in the worker -----------------------------------------------------------------------------------------


def main(descriptor: int) -> None:
    """The whole life of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends us
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s simulator: %(message)s")
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError), Connection(descriptor) as connection:
        make_env, server = connection.recv()
        with contextlib.closing(Player(make_env, partial(_ask, connection), server)) as player:
            while True:
                connection.send(player.play(connection.recv()))


def _ask(connection: Connection, request: dict[str, Any]) -> Mapping[str, Any]:
    """The parent's reply."""
    connection.send(("request", request))
    reply = connection.recv()
    if isinstance(reply, Exception):
        raise reply
    return reply


class Player:
    """One environment and one client at a time, made when they are needed.

    Args:
      make_env: makes the environments.
      ask: request to reply; raises what the policy raised.
      server: address that is asked instead.
    """

    def __init__(
        self, make_env: MakeEnv, ask: Callable[[dict[str, Any]], Mapping[str, Any]], server: str | None = None
    ):
        self._make_env, self._ask, self._server = make_env, ask, server
        self._env: LiberoEnv | None = None
        self._task: tuple[str, int] | None = None
        self._client: Any = None

    def play(self, job: Job) -> tuple[str, Any]:
        """Plays an episode: ("episode", Episode), or ("fatal", text) where no other try would help."""
        try:
            env = self._environment(job.suite, job.task)
            if not job.trial < env.num_init_states:
                return "fatal", f"{job.suite} task {job.task} has {env.num_init_states} trials, got {job.trial + 1}"
            policy = self._ask if self._server is None else self._remote(job.seed)
            protocol = {"replan": job.replan, "max_steps": job.max_steps, "delay": job.delay, "rtc": job.rtc}
            episode = rollout(env, policy, init_state=job.trial, **protocol)
        except (LiberoUnavailable, _NoServer) as error:
            return "fatal", str(error)
        except Exception as error:  # the simulator did not even start: an outcome like any other
            logging.exception("%s task %d, trial %d", job.suite, job.task, job.trial)
            episode = broken(job, f"{type(error).__name__}: {error}")
        if episode.outcome == "error":
            self.close()  # nobody knows what state it left behind
        return "episode", episode

    def close(self) -> None:
        """Closes the environment; the next episode makes another one."""
        env, self._env, self._task, self._client = self._env, None, None, None
        if env is not None:
            try:
                env.close()
            except Exception:  # it has failed before: the episode must still be reported
                logging.exception("the simulator could not be closed")

    def _environment(self, suite: str, task: int) -> LiberoEnv:
        if self._env is None or self._task != (suite, task):
            self.close()
            self._env, self._task = self._make_env(suite, task), (suite, task)
        return self._env

    def _remote(self, seed: int | None) -> Callable[[dict[str, Any]], Mapping[str, Any]]:
        """The server's replies, for one episode: the first request asks it to forget the one before."""
        if self._client is None:
            self._client = connect(self._server)
        fresh = iter([{"reset": True} if seed is None else {"reset": True, "seed": seed}])
        return lambda request: self._client.infer(request | next(fresh, {}))


class _NoServer(ConnectionError):
    pass


def connect(address: str) -> Any:
    """openpi's client, connected.

    Raises:
      ConnectionError: its package or the server is not there; the message says what to do.
    """
    try:
        from openpi_client.websocket_client_policy import WebsocketClientPolicy
    except ImportError as error:
        raise _NoServer("openpi-client is not installed: pip install openpi-client") from error
    import warnings

    try:
        with warnings.catch_warnings(action="ignore"):  # it connects in a way that websockets deprecates
            return WebsocketClientPolicy(address)
    except Exception as error:  # refused, no such host, not a websocket, no address at all
        why = " ".join(str(error).split()) or type(error).__name__
        raise _NoServer(f"no policy server at {address} ({why}); start one with openpi serve") from error
