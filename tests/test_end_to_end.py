"""openpi's own client against `serving` with a real engine behind it: SAFE-Pruner on the tiny π0.5 checkpoint."""

import socket
import threading

import numpy as np
import pytest
import websockets.sync.client
from openpi_client import image_tools
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from websockets.exceptions import ConnectionClosed

from safe_pruner_jax.policy.policy import Policy
from safe_pruner_jax.robots.robots import RequestError
from safe_pruner_jax.serving import pack, running, unpack

PROMPT = "pick up the black bowl"


@pytest.fixture(scope="module")
def policy(ten_step_policy):
    return ten_step_policy


@pytest.fixture(scope="module")
def server(policy):
    with running(policy, client_errors=(RequestError,)) as server:
        yield server


@pytest.fixture
def client(server):
    return WebsocketClientPolicy("127.0.0.1", server.port)


def request(seed: int = 0, **changes) -> dict:
    rng = np.random.default_rng(seed)
    image = np.kron(rng.integers(0, 255, (16, 16, 3), np.uint8), np.ones((16, 16, 1), np.uint8))
    return {
        "observation/image": image_tools.resize_with_pad(image, 224, 224),
        "observation/wrist_image": image_tools.resize_with_pad(image[::-1].copy(), 224, 224),
        "observation/state": rng.random(8),
        "prompt": PROMPT,
    } | changes


def test_an_episode_has_a_keyframe_forecasts_and_pruned_steps(client):
    first, second = client.infer(request()), client.infer(request())
    assert first["actions"].shape == (10, 7) and np.isfinite(first["actions"]).all()
    pruning = first["pruning"]
    assert (pruning["keyframe"], pruning["kept"], pruning["alive"], pruning["kappa"]) == (True, 32, 32, None)
    pruning = second["pruning"]
    assert (pruning["keyframe"], pruning["kept"], pruning["alive"]) == (False, 6, 32)
    # a still frame: the forecast is off only by the noise that the action queries start from
    assert 0.9 <= pruning["kappa"] <= 1
    assert len(pruning["index"]) == 6 and (np.diff(pruning["index"]) > 0).all()
    for reply in (first, second):
        timing = reply["policy_timing"]
        assert timing["infer_ms"] == pytest.approx(timing["shallow_ms"] + timing["rest_ms"])
        assert reply["server_timing"]["infer_ms"] >= timing["infer_ms"]


def test_replies_equal_a_session_without_a_server(client, policy):
    session = policy.session()
    for seed in (0, 0, 3):
        over_the_wire, direct = client.infer(request(seed)), session.infer(request(seed))
        np.testing.assert_array_equal(over_the_wire["actions"], direct["actions"])
        assert over_the_wire["pruning"]["keyframe"] == direct["pruning"]["keyframe"]


@pytest.mark.parametrize("change", [{"prompt": "open the drawer"}, {"reset": True}])
def test_a_new_prompt_or_a_reset_is_a_keyframe(client, change):
    client.infer(request())
    assert not client.infer(request())["pruning"]["keyframe"]
    assert client.infer(request(**change))["pruning"]["keyframe"]


def without(key: str) -> dict:
    return {k: v for k, v in request().items() if k != key}


BAD = {
    "missing camera": (without("observation/wrist_image"), "observation/wrist_image"),
    "missing state": (without("observation/state"), "observation/state"),
    "missing prompt": (without("prompt"), "prompt"),
    "flat image": (request(**{"observation/image": np.zeros((224, 224), np.uint8)}), "observation/image"),
    "four channels": (request(**{"observation/image": np.zeros((224, 224, 4), np.uint8)}), "observation/image"),
    "integers": (request(**{"observation/image": np.zeros((224, 224, 3), np.int64)}), "int64"),
    "text for an image": (request(**{"observation/image": "picture"}), "observation/image"),
    "nan in the state": (request(**{"observation/state": np.full(8, np.nan)}), "observation/state"),
    "short state": (request(**{"observation/state": np.zeros(3)}), "observation/state"),
    "empty prompt": (request(prompt="  "), "prompt"),
    "10 kB prompt": (request(prompt="pick " * 2000), "prompt"),
    "prompt of another kind": (request(prompt=7), "prompt"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_gets_a_clear_answer_and_harms_nobody_else(server, client, name):
    bad, word = BAD[name]
    other = WebsocketClientPolicy("127.0.0.1", server.port)
    client.infer(request()), other.infer(request())
    with pytest.raises(RuntimeError, match=word) as error:
        client.infer(bad)
    text = str(error.value)
    assert "expected" in text and "got" in text and "Traceback" not in text
    reply = other.infer(request())
    assert not reply["pruning"]["keyframe"]  # its episode went on
    assert WebsocketClientPolicy("127.0.0.1", server.port).infer(request())["pruning"]["keyframe"]


@pytest.mark.parametrize("garbage", [b"", b"\xc1" * 100, b"\x81\xa6prompt", pack(request())[:-7]])
def test_garbage_gets_a_clear_answer_and_harms_nobody_else(server, client, garbage):
    client.infer(request())
    with websockets.sync.client.connect(f"ws://127.0.0.1:{server.port}", max_size=None) as raw:
        unpack(raw.recv())
        raw.send(garbage)
        answer = raw.recv(timeout=100)
        assert isinstance(answer, str) and any(word in answer for word in ("expected", "got", "ends early"))
        with pytest.raises(ConnectionClosed):
            raw.recv(timeout=100)
    assert not client.infer(request())["pruning"]["keyframe"]


def test_a_client_that_leaves_in_mid_call_harms_nobody_else(server, client):
    client.infer(request())
    raw = websockets.sync.client.connect(f"ws://127.0.0.1:{server.port}", max_size=None)
    unpack(raw.recv())
    raw.send(pack(request()))
    raw.socket.shutdown(socket.SHUT_RDWR)
    assert not client.infer(request())["pruning"]["keyframe"]


def test_two_robots_at_once_do_not_see_each_other(server, policy):
    replies: dict[int, list] = {0: [], 1: []}

    def drive(robot: int) -> None:
        connection = WebsocketClientPolicy("127.0.0.1", server.port)
        for step in range(4):
            replies[robot].append(connection.infer(request(10 * robot + step // 2)))

    threads = [threading.Thread(target=drive, args=(robot,)) for robot in replies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=600)
    for robot, got in replies.items():
        session = policy.session()
        for step, reply in enumerate(got):
            alone = session.infer(request(10 * robot + step // 2))
            np.testing.assert_array_equal(reply["actions"], alone["actions"])
            np.testing.assert_array_equal(reply["pruning"]["index"], alone["pruning"]["index"])
        assert len(got) == 4


def test_without_a_pruner_the_reply_is_openpis(plain_policy):
    plain = Policy(plain_policy.engine, plain_policy.transform, prompt_lengths=(16,), describe=False)
    with running(plain, client_errors=(RequestError,)) as server:
        reply = WebsocketClientPolicy("127.0.0.1", server.port).infer(request())
    assert set(reply) == {"actions", "policy_timing", "server_timing"}
    assert set(reply["policy_timing"]) == {"infer_ms"}
