"""Several robots over one connection: `{"batch": [...]}`, with openpi's own client."""

import re
import threading

import numpy as np
import pytest
from fake_server import DEADLINE_S, FakeBackend, raw
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from websockets.exceptions import ConnectionClosed

from safe_pruner_jax.client.batch import NoBatches, TurnedAway, infer_batch
from safe_pruner_jax.policy.reply import Result
from safe_pruner_jax.serving import Terms, pack, running, unpack
from safe_pruner_jax.serving.backend import Sessions


class Joined(Sessions):
    """Counts each robot's steps, up to 8 robots per device step."""

    limit = 8

    def __init__(self):
        super().__init__(FakeBackend())
        self.sizes, self.forgotten, self.left = [], [], threading.Event()

    def prepare(self, robot, request):
        prepared = super().prepare(robot, request)
        return type(prepared)(prepared.request, 0)  # one group

    def step(self, prepared):
        self.sizes.append(len(prepared))
        return [result for one in prepared for result in super(Joined, self).step([one])]

    def forget(self, robot):
        super().forget(robot)
        self.forgotten.append(robot)
        self.left.set()


@pytest.fixture
def joined():
    return Joined()


@pytest.fixture
def server(joined):
    with running(joined, client_errors=(ValueError,), terms=Terms(max_queue=9)) as server:
        yield server


@pytest.fixture
def client(server):
    client = WebsocketClientPolicy("127.0.0.1", server.port)
    yield client
    client._ws.close()


def steps(replies):
    return [int(reply["actions"][0, 0]) for reply in replies]


def test_one_reply_each_from_one_device_step(client, joined):
    replies = infer_batch(client, [{"prompt": str(k)} for k in range(5)])
    assert [reply["echo"]["prompt"] for reply in replies] == list("01234")
    assert joined.sizes == [5] and {reply["server_timing"]["batch"] for reply in replies} == {5}
    assert infer_batch(client, []) == [] and joined.sizes == [5]


def test_a_place_in_the_batch_is_a_robot_and_so_is_an_id(client):
    assert steps(infer_batch(client, [{}, {}, {"robot_id": "left"}])) == [1, 1, 1]
    assert steps(infer_batch(client, [{"robot_id": "left"}, {}])) == [2, 2]
    assert steps([client.infer({})]) == [1], "alone, a connection has a memory of its own"
    assert steps([client.infer({"robot_id": "left"})]) == [3]


def test_memories_of_places_end_with_their_connection(server, joined):
    client = WebsocketClientPolicy("127.0.0.1", server.port)
    infer_batch(client, [{}, {"robot_id": "left"}, {}])
    client._ws.close()
    assert joined.left.wait(DEADLINE_S)
    again = WebsocketClientPolicy("127.0.0.1", server.port)
    assert steps(infer_batch(again, [{}, {"robot_id": "left"}, {}])) == [1, 2, 1]
    again._ws.close()
    assert not any("left" in robot for robot in joined.forgotten)


def test_more_than_a_device_step_holds_is_split(client, joined):
    assert len(infer_batch(client, [{}] * 9)) == 9 and joined.sizes == [8, 1]


def test_a_request_that_was_not_run_says_so_and_the_others_have_their_replies(server, joined):
    client, other = (WebsocketClientPolicy("127.0.0.1", server.port) for _ in range(2))
    blocker = threading.Thread(target=other.infer, args=({"do": "wait"},))
    blocker.start()
    backend = joined._maker
    assert backend.started.wait(DEADLINE_S)
    timer = threading.Timer(0.3, backend.release.set)
    timer.start()
    with pytest.raises(TurnedAway, match=r"\{1: 'expired: not run within its 20 ms") as caught:
        infer_batch(client, [{}, {"deadline_ms": 20}, {}])
    assert [("actions" in reply) for reply in caught.value.replies] == [True, False, True]
    blocker.join(DEADLINE_S)
    assert steps(infer_batch(client, [{}, {}, {}])) == [2, 1, 2], "the connection goes on"
    for one in (client, other):
        one._ws.close()


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"batch": []}, "batch: expected 1 to 9 requests under this key and no other key, got 0 requests"),
        ({"batch": [{}] * 10}, "expected 1 to 9 requests under this key and no other key, got 10 requests"),
        ({"batch": {}}, "under this key and no other key, got dict"),
        ({"batch": [{}], "prompt": ""}, "no other key, got 1 requests"),
        ({"batch": [{}, 3]}, r"batch\[1\]: expected a request, a map, got int"),
        ({"batch": [{"robot_id": "a"}, {"robot_id": "a"}]}, r"batch\[1\]: expected each robot once, got 'a' again"),
        ({"batch": [{}, {"robot_id": 7}]}, "robot_id: expected a str"),
        ({"batch": [{}, {"do": "mistake"}, {}]}, "expected 2 cameras, got 1"),
    ],
)
def test_a_batch_that_cannot_be_used_is_one_error_and_the_end_of_its_connection(server, message, text):
    with raw(server) as socket:
        unpack(socket.recv())
        socket.send(pack(message))
        answer = socket.recv(DEADLINE_S)
        assert isinstance(answer, str)
        with pytest.raises(ConnectionClosed):
            socket.recv(DEADLINE_S)
    assert re.search(text, answer), answer


def test_a_server_without_batches_is_named():
    class Openpi:
        def infer(self, obs):
            return {"actions": np.zeros((10, 7))}

    with pytest.raises(NoBatches, match=r"expected 2 replies under 'batch', got the keys \['actions'\]"):
        infer_batch(Openpi(), [{}, {}])


def test_results_that_fail_name_the_failure(client, joined):
    joined.step = lambda prepared: [Result({"actions": np.zeros((1, 7))}), Result(None, ValueError("no grip"))]
    with pytest.raises(RuntimeError, match="no grip"):
        infer_batch(client, [{}, {}])
