"""The line between a simulator and its policy: pickles over TCP, as `evaluation.workers` has them over a pipe.

    place = listen(host, answer)          at the policy: `answer` is called in a thread per line
    with call(place) as line:             at the simulator
        line.send(question)
        reply = line.recv()               EOFError, OSError: the policy is lost

Ray starts both and tells when one has died. It does not carry the messages: an actor call of two pictures takes several
times as long (docs/decisions/0019-ray.md).
"""

import contextlib
import secrets
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from typing import Any

REACH_S = 20.0
"""Seconds in which a policy must be reached, and after which a machine that says nothing any more counts as lost."""


@dataclass(frozen=True)
class Place:
    """Where a policy listens, and what both sides must know before anything is unpickled."""

    host: str
    port: int
    key: bytes = field(repr=False)


def listen(host: str, answer: Callable[[Any], Any]) -> Place:
    """Answers questions at a free port, for as long as this process lives."""
    server = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    place = Place(host, server.getsockname()[1], secrets.token_bytes(32))
    threading.Thread(target=_accept, args=(server, place.key, answer), daemon=True).start()
    return place


def call(place: Place) -> Connection:
    """A line to a policy; raises OSError, EOFError or AuthenticationError if nobody answers there."""
    line = _line(socket.create_connection((place.host, place.port), REACH_S))
    try:
        answer_challenge(line, place.key)
        deliver_challenge(line, place.key)
    except BaseException:
        line.close()
        raise
    return line


def _accept(server: socket.socket, key: bytes, answer: Callable[[Any], Any]) -> None:
    while True:
        line = _line(server.accept()[0])
        threading.Thread(target=_serve, args=(line, key, answer), daemon=True).start()


def _serve(line: Connection, key: bytes, answer: Callable[[Any], Any]) -> None:
    """One line, until it ends."""
    with line, contextlib.suppress(EOFError, OSError, AuthenticationError):
        deliver_challenge(line, key)
        answer_challenge(line, key)
        while True:
            line.send(answer(line.recv()))


def _line(stream: socket.socket) -> Connection:
    """A line that sends at once, and that ends when the other machine has gone without a word."""
    stream.settimeout(None)
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    quarter = int(REACH_S / 4)
    for name, value in (
        ("TCP_KEEPIDLE", quarter),
        ("TCP_KEEPINTVL", quarter),
        ("TCP_KEEPCNT", 3),
        ("TCP_USER_TIMEOUT", int(REACH_S * 1e3)),
    ):
        if (option := getattr(socket, name, None)) is not None:  # not every system has them all
            stream.setsockopt(socket.IPPROTO_TCP, option, value)
    return Connection(stream.detach())
