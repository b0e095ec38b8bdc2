"""`"attention"` of a request: grids of a full pass, for whoever asks and nobody else."""

import json
import urllib.request

import numpy as np
import pytest
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from tiny_policy import request

from safe_pruner_jax.analysis.trace import Call, Watch
from safe_pruner_jax.policy.fleet import Fleet
from safe_pruner_jax.robots.robots import RequestError
from safe_pruner_jax.serving import running

CAMERAS = ["base_0_rgb", "left_wrist_0_rgb"]
BOTH = {"layers": [0, -1], "of": "action"}


@pytest.fixture(scope="module")
def policy(ten_step_policy):
    return ten_step_policy


def test_grids_are_those_of_a_full_pass_with_the_noise_of_the_step(policy):
    """Against `analysis.trace`, which runs its own program; also in a step that pruned."""
    trace = Watch(policy)([Call(request(0, step), -1.0) for step in range(2)])
    session, replies = policy.session(), []
    for step in range(2):
        replies.append(session.infer(request(0, step, attention=BOTH)))
    assert not replies[1]["pruning"]["keyframe"]
    for step, reply in enumerate(replies):
        told = reply["attention"]
        assert (told["of"], told["layers"], list(told["grids"])) == ("action", [0, 3], CAMERAS)
        seen = np.concatenate([told["grids"][c].reshape(2, -1) for c in CAMERAS], axis=1)
        assert seen.dtype == np.float16 and seen.sum(1).min() > 0 and seen.sum(1).max() < 1
        np.testing.assert_allclose(seen, trace.late("half", "all")[step, [0, 3]], atol=1e-5)
    told = session.infer(request(0, 0, reset=True, attention={"layers": [1], "of": "text"}))["attention"]
    seen = np.concatenate([told["grids"][c].ravel() for c in CAMERAS])
    np.testing.assert_allclose(seen, trace.probabilities["text"][0, 1], atol=1e-5)


def test_asking_changes_no_action_and_nobody_else_pays(policy, monkeypatch):
    asked, silent = policy.session(), policy.session()
    calls = []
    look = type(policy.attention).every_layer
    monkeypatch.setattr(type(policy.attention), "every_layer", lambda *a: calls.append(a[1]) or look(*a))
    for step in range(3):
        a = asked.infer(request(1, step, attention=BOTH))
        b = silent.infer(request(1, step))
        assert a["actions"].tobytes() == b["actions"].tobytes() and "attention" not in b
    assert calls == ["action"] * 3


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("action", r'expected a map \{"layers": .*got str; leave it away'),
        ({"layers": [0]}, "expected a map"),
        ({"layers": [0], "of": "image"}, "'action' or 'text'"),
        ({"layers": [], "of": "text"}, "1 to 3 layers between -3 and 2 for 'text'"),
        ({"layers": [3], "of": "text"}, r"got \[3\]"),
        ({"layers": [-5], "of": "action"}, "between -4 and 3"),
        ({"layers": [0.5], "of": "action"}, r"got \[0.5\]"),
        ({"layers": 1, "of": "action"}, "1 to 4 layers"),
    ],
)
def test_what_cannot_be_asked_for(policy, value, text):
    with pytest.raises(RequestError, match=text):
        policy.prepare(request(0, attention=value))


def test_a_server_says_what_there_is_and_refuses_without_its_option(policy):
    with pytest.raises(RequestError, match=r"start the server with --serving\.attention"):
        Fleet(policy, limit=1).prepare("robot", request(0, attention=BOTH))
    with running(Fleet(policy, limit=1, attention=True), client_errors=(RequestError,)) as server:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/info") as info:
            assert json.load(info)["attention"] == {"layers": {"action": 4, "text": 3}, "grid": [4, 4]}
        client = WebsocketClientPolicy("127.0.0.1", server.port)
        grids = client.infer(request(0, attention=BOTH))["attention"]["grids"]
        assert {camera: grid.shape for camera, grid in grids.items()} == dict.fromkeys(CAMERAS, (2, 4, 4))
        client._ws.close()
