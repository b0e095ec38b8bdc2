"""What a robot sees of a server, through openpi's own client: the same over one server and over Ray Serve."""

import os

import numpy as np
import pytest
from fake_server import DEADLINE_S, FakeBackend, Mistake, get
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from ray_cluster import free_port
from websockets.exceptions import ConnectionClosed, InvalidStatus

from safe_pruner_jax.serving import Access, running

pytestmark = pytest.mark.newest

KEY = "a-key-for-tests-only"


@pytest.fixture(scope="module", params=["one", pytest.param("ray", marks=pytest.mark.ray)])
def port(request):
    """Of a live server that asks for a key."""
    options = {"access": Access(key=KEY), "client_errors": (Mistake,)}
    if request.param == "one":
        with running(FakeBackend(), **options) as server:
            yield server.port
        return
    from safe_pruner_jax.cluster.serve import service

    request.getfixturevalue("machines").mend()
    with service(FakeBackend, replicas=(1, 1), port=(port := free_port()), everywhere=False, **options):
        yield port


@pytest.fixture
def connect(port):
    clients = []

    def new(key=KEY):
        clients.append(WebsocketClientPolicy("127.0.0.1", port, api_key=key))
        return clients[-1]

    yield new
    for client in clients:
        client._ws.close()


def test_metadata_comes_first(connect):
    metadata = connect().get_server_metadata()
    assert metadata["model"] == "fake"
    np.testing.assert_array_equal(metadata["mean"], [0, 1, 2])


def test_a_request_reaches_the_session_and_the_reply_the_client(connect):
    request = {"observation/image": np.random.default_rng(0).integers(0, 256, (224, 224, 3), np.uint8), "prompt": "π"}
    client = connect()
    for number in (1, 2):
        reply = client.infer(request)
        assert reply["actions"].shape == (10, 7) and reply["actions"][0, 0] == number
        np.testing.assert_array_equal(reply["echo"]["observation/image"], request["observation/image"])
    assert set(reply["server_timing"]) == {"infer_ms", "prev_total_ms", "queue_ms", "batch"}


def test_each_connection_has_its_session(connect):
    one, two = connect(), connect()
    assert [c.infer({})["actions"][0, 0] for c in (one, two, one, one, two)] == [1, 1, 2, 3, 2]


def test_a_robot_id_keeps_its_memory_over_connections(connect):
    name = {"robot_id": f"robot {os.getpid()}"}
    assert connect().infer(name)["actions"][0, 0] == 1
    assert connect().infer(name)["actions"][0, 0] == 2


@pytest.mark.parametrize(
    ("what", "says"), [("mistake", "expected 2 cameras"), ("crash", "internal error"), ("not finite", "finite")]
)
def test_an_error_is_explained_and_ends_that_connection_alone(connect, what, says):
    client, other = connect(), connect()
    with pytest.raises(RuntimeError, match=says) as told:
        client.infer({"do": what})
    assert "secret" not in str(told.value)
    with pytest.raises(ConnectionClosed) as closed:
        client._ws.recv(DEADLINE_S)
    assert closed.value.rcvd.code == 1011
    assert other.infer({})["actions"][0, 0] == 1


def test_a_wrong_key_is_refused_before_anything_is_said(connect, port):
    with pytest.raises(InvalidStatus) as refused:
        connect("wrong")
    assert refused.value.response.status_code == 401
    assert [get(port, path)[0] for path in ("/metrics", "/healthz", "/readyz")] == [401, 200, 200]


def test_metrics_count_what_was_answered(connect, port):
    name = b'safe_pruner_requests_total{outcome="ok"} '
    count = lambda: float(get(port, "/metrics", Authorization=f"Api-Key {KEY}")[1].partition(name)[2].split()[0])
    client, before = connect(), count()
    client.infer({}), client.infer({})
    client.infer({})  # the second one has been counted when this one is answered
    assert count() >= before + 2
