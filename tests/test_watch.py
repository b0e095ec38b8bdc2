"""People who look on: observer connections and the page `/watch`, in a real browser; robots do not notice."""

import json
import threading
import time

import numpy as np
import pytest
import websockets.sync.client
from browser import Browser
from fake_server import DEADLINE_S, get, until
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from pictures import CAMERAS, KEY, Pictures, scene
from websockets.exceptions import ConnectionClosed, InvalidStatus

from safe_pruner_jax.serving import Access, running, unpack
from safe_pruner_jax.serving.observers import MOST, QUEUE, ROBOTS


@pytest.fixture
def server():
    with running(Pictures(), watch=True, access=Access(key=KEY)) as server:
        yield server


def client(server, key=KEY):
    return WebsocketClientPolicy("127.0.0.1", server.port, api_key=key)


def observer(server, key=KEY, path="/observe"):
    headers = {"Authorization": f"Api-Key {key}"}
    url = f"ws://127.0.0.1:{server.port}{path}"
    return websockets.sync.client.connect(url, compression=None, max_size=None, additional_headers=headers)


def state(server):
    status, body = get(server.port, "/watch/state", Authorization=f"Api-Key {KEY}")
    assert status == 200
    return json.loads(body)["robots"]


def test_an_observer_gets_every_step_and_its_maps(server):
    robot = client(server)
    with observer(server) as socket:
        assert unpack(socket.recv(DEADLINE_S)) == {"model": "pictures"}
        sent = [scene(step, robot_id="left", reset=step == 0) for step in range(3)]
        replies = [robot.infer(request) for request in sent]
        seen = [unpack(socket.recv(DEADLINE_S)) for _ in range(3)]
    assert [message["number"] for message in seen] == [1, 2, 3]
    assert {message["robot"] for message in seen} == {"left"}
    for request, reply, message in zip(sent, replies, seen, strict=True):
        np.testing.assert_array_equal(message["images"][CAMERAS[0]], request[CAMERAS[0]])
        np.testing.assert_array_equal(message["reply"]["actions"], reply["actions"])
        assert message["request"]["prompt"] == request["prompt"] and CAMERAS[0] not in message["request"]
        shapes = {name: value.shape for name, value in message["saliency"].items()}
        assert shapes == {"score": (1, 512), "late": (3, 512)}


def test_off_unless_the_server_allows_it():
    with running(Pictures()) as server:
        for path in ("/watch", "/watch/state", "/observe"):
            status, body = get(server.port, path)
            assert status == 404 and b"--serving.watch" in body
        with pytest.raises(InvalidStatus, match="404"):
            observer(server)


def test_the_same_key_as_robots(server):
    assert get(server.port, "/watch")[0] == 200, "the page itself holds no secret"
    assert get(server.port, "/watch/state")[0] == 401
    with pytest.raises(InvalidStatus, match="401"):
        observer(server, key="another-key-of-nobody")


def test_an_observer_is_no_robot(server):
    """A robot that is alone waits for nobody, though somebody looks on; and there are so many who may."""
    robot = client(server)
    sockets = [observer(server) for _ in range(MOST)]
    for socket in sockets:
        socket.recv(DEADLINE_S)
    waited = [robot.infer(scene(step))["server_timing"]["queue_ms"] for step in range(5)]
    assert server._device.robots == 1 and min(waited) < 1e3 * server._terms.max_delay_s
    with pytest.raises(InvalidStatus, match="429"):
        observer(server)
    for socket in sockets:
        socket.close()
    until(lambda: not server._observers.full)


def test_a_slow_observer_misses_steps_and_robots_go_on(server):
    robot = client(server)
    with observer(server) as socket:
        socket.recv(DEADLINE_S)
        hold = threading.Event()
        blocked = server._observers.threads.submit(hold.wait, DEADLINE_S)
        for step in range(QUEUE + 10):
            robot.infer(scene(step % 20, reset=step == 0))
        hold.set()
        blocked.result()
        numbers = [unpack(socket.recv(DEADLINE_S))["number"] for _ in range(QUEUE)]
        assert numbers[-1] >= QUEUE + 9 and numbers == sorted(numbers)


def test_only_so_many_robots_are_remembered(server):
    robot = client(server)
    for number in range(ROBOTS + 3):
        robot.infer({"robot_id": f"robot {number}", "prompt": ""})
    names = [shown["robot"] for shown in state(server)]
    assert len(names) == ROBOTS and names[-1] == f"robot {ROBOTS + 2}"


def test_stopping_ends_observers():
    with running(Pictures(), watch=True) as server:
        socket = observer(server)
        socket.recv(DEADLINE_S)
        server.stop()
        with pytest.raises(ConnectionClosed):
            socket.recv(DEADLINE_S)
        assert socket.close_code == 1001


def test_a_robot_that_never_sent_a_picture_is_shown_without_one(server):
    client(server).infer({"robot_id": "blind", "prompt": "wait"})
    (shown,) = state(server)
    assert shown["cameras"] == [] and shown["kept"] == 512 and shown["history"][0]["keyframe"]


@pytest.mark.browser
@pytest.mark.newest
def test_the_page_in_a_browser(server, tmp_path):
    robots = {name: client(server) for name in ("left", "right")}
    for step in range(8):
        for name, robot in robots.items():
            robot.infer(scene(step, robot_id=name))
    with Browser(tmp_path) as page:
        page.open(f"http://127.0.0.1:{server.port}/watch")
        page.until("!document.getElementById('login').hidden")
        assert "API key" in page.ask("document.getElementById('status').textContent")
        page.ask(f"document.getElementById('key').value = {KEY!r}")
        page.ask("document.querySelector('#login button').click()")
        page.until("document.querySelectorAll('.robot').length == 2")
        page.until("document.querySelectorAll('canvas.camera[data-drawn]').length == 4")
        assert page.ask("document.getElementById('login').hidden")
        left = "document.querySelector('[data-robot=left]')"
        text = page.ask(f"{left}.innerText")
        assert "left pruned" in text and "kept 96 of 512" in text and "κ 0.700" in text and "28.0 ms" in text
        assert "pick up the <b>soup</b>" in text, "what clients send is text, never markup"
        # green is the row of a pixel: 200 in patches 224 (dropped) and 225 (kept) of the first camera
        green = "(c => [7, 21].map(x => c.getContext('2d').getImageData(x, 200, 1, 1).data[1]))"
        dropped, kept = page.ask(f"{green}({left}.querySelector('canvas.camera'))")
        assert dropped < 100 and abs(kept - 200) < 10
        step = page.ask(f"{left}.innerText.match(/step (\\d+)/)[1]")
        robots["left"].infer(scene(9, robot_id="left"))
        page.until(f"{left}.innerText.match(/step (\\d+)/)[1] == {int(step) + 1}")
        page.picture(tmp_path / "watch.png")
        assert (tmp_path / "watch.png").stat().st_size > 10_000


def test_looking_on_costs_robots_little(server):
    """Steps with an observer against steps without, in turns. The bound is loose: shared machines."""
    robot, times = client(server), {True: [], False: []}
    for block in range(20):
        socket = observer(server) if block % 2 else None
        if socket is not None:
            socket.recv(DEADLINE_S)
            threading.Thread(target=lambda s=socket: [None for _ in s], daemon=True).start()
        for step in range(10):
            start = time.perf_counter()
            robot.infer(scene(step))
            times[bool(block % 2)].append(time.perf_counter() - start)
        if socket is not None:
            socket.close()
    assert np.median(times[True]) < 3 * np.median(times[False]) + 0.01
