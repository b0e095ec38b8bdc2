"""The server and what goes wrong on one connection: mistakes, faults, garbage, clients that leave or do not wait."""

import logging
import socket
import struct
import threading

import numpy as np
import pytest
from fake_server import DEADLINE_S, raw, until
from websockets.exceptions import ConnectionClosed

from safe_pruner_jax.serving import pack, unpack


def test_a_mistake_of_the_client_is_explained_to_it_alone(connect):
    bystander, client = connect(), connect()
    bystander.infer({})
    client.infer({})
    with pytest.raises(RuntimeError, match="expected 2 cameras, got 1; send observation/wrist_image ☃"):
        client.infer({"do": "mistake"})
    with pytest.raises(ConnectionClosed) as closed:
        client.infer({})
    assert closed.value.rcvd.code == 1011
    assert bystander.infer({})["actions"][0, 0] == 2
    assert connect().infer({})["actions"][0, 0] == 1


@pytest.mark.parametrize("fault", ["crash", "stop iteration", "unpackable", "not a dict"])
def test_an_internal_error_is_in_the_log_not_on_the_wire(connect, caplog, fault):
    bystander, client = connect(), connect()
    with caplog.at_level(logging.ERROR), pytest.raises(RuntimeError, match="internal error") as error:
        client.infer({"do": fault})
    identifier = str(error.value).split("(id ")[1].rstrip(")")
    assert "secret" not in str(error.value) and "Traceback" not in str(error.value)
    (record,) = [r for r in caplog.records if identifier in r.getMessage()]
    assert "Traceback" in caplog.text and record.exc_info[2] is not None
    assert fault != "crash" or "a secret detail" in caplog.text
    assert bystander.infer({})["actions"][0, 0] == 1


def test_actions_that_are_not_finite_are_told_counted_and_nobody_elses(connect, server):
    bystander, client = connect(), connect()
    bystander.infer({})
    with pytest.raises(RuntimeError, match=r"expected finite actions.*check its observation"):
        client.infer({"do": "not finite"})
    assert server.metrics.errors.labels("non_finite")._value.get() == 1
    assert bystander.infer({})["actions"][0, 0] == 2


@pytest.mark.parametrize(
    "message, says",
    [
        (b"\xc1 garbage", "0xc1"),
        (b"", "ends early"),
        (b"\x91\x01", "a message is a map"),
        ("a text frame", "expected a binary frame"),
        (b"\x81\xa1x" + b"\x91" * 10_000, "nested"),
    ],
    ids=["garbage", "empty", "list", "text", "deep"],
)
def test_a_malformed_message(connect, server, message, says):
    bystander = connect()
    with raw(server) as client:
        client.recv(DEADLINE_S)
        client.send(message)
        answer = client.recv(DEADLINE_S)
        assert isinstance(answer, str) and says in answer
        with pytest.raises(ConnectionClosed) as closed:
            client.recv(DEADLINE_S)
        assert closed.value.rcvd.code == 1011
    bystander.infer({})


def test_a_message_over_the_limit(connect, server):
    bystander, client = connect(), connect()
    assert client.infer({"x": np.zeros(2**20 - 200, np.uint8)})["echo"]["x"].size == 2**20 - 200
    with pytest.raises(ConnectionClosed) as closed:
        client.infer({"x": np.zeros(2**20, np.uint8)})
    assert closed.value.rcvd.code == 1009
    bystander.infer({})


def test_a_client_that_leaves_in_mid_call(connect, backend, server, caplog):
    with caplog.at_level(logging.INFO):
        with raw(server) as client:
            client.recv(DEADLINE_S)
            client.send(pack({"do": "wait"}))
            assert backend.started.wait(DEADLINE_S)
        backend.release.set()
        until(lambda: "left before its reply" in caplog.text)
    assert not [r for r in caplog.records if r.levelno > logging.INFO]
    assert connect().infer({})["actions"][0, 0] == 1


def test_a_client_that_vanishes_without_a_close(connect, backend, server, caplog):
    with caplog.at_level(logging.INFO):
        client = raw(server)
        client.recv(DEADLINE_S)
        client.send(pack({"do": "wait"}))
        assert backend.started.wait(DEADLINE_S)
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close_socket()  # a reset, as from a machine that lost power
        backend.release.set()
        until(lambda: "left" in caplog.text)
    assert connect().infer({})["actions"][0, 0] == 1


def test_calls_of_clients_that_left_the_queue_are_not_run(connect, backend, server):
    first = connect()
    call = threading.Thread(target=first.infer, args=({"do": "wait"},))
    call.start()
    assert backend.started.wait(DEADLINE_S)
    with raw(server) as impatient:
        impatient.recv(DEADLINE_S)
        impatient.send(pack({}))
    backend.release.set()
    call.join(DEADLINE_S)
    first.infer({})
    assert backend.finished == 2 and backend.sessions == 1


def test_requests_sent_ahead_get_one_reply_each_in_order(server):
    with raw(server) as client:
        client.recv(DEADLINE_S)
        for i in range(20):
            client.send(pack({"i": i}))
        replies = [client.recv(DEADLINE_S) for _ in range(20)]
    run = [unpack(reply)["echo"]["i"] for reply in replies if isinstance(reply, bytes)]
    assert run == sorted(run) and run[-1] == 19  # the newest observation is never given up
    assert all(reply.startswith("superseded: ") for reply in replies if isinstance(reply, str))
    assert [isinstance(reply, bytes) for reply in replies] == [i in run for i in range(20)]


def test_fragments_make_one_message(server):
    message = pack({"x": np.arange(1000)})
    with raw(server) as client:
        client.recv(DEADLINE_S)
        client.send(message[i : i + 100] for i in range(0, len(message), 100))
        assert unpack(client.recv(DEADLINE_S))["echo"]["x"].size == 1000
