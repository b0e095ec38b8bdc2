"""Serving on a Ray cluster: a node dies, replicas come and go, and no robot is left without an answer or a word."""

import contextlib
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import toy_service as toy
from fake_server import get
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from prometheus_client.parser import text_string_to_metric_families
from ray_cluster import WAIT_S, free_port, until
from websockets.exceptions import ConnectionClosed, InvalidMessage, InvalidStatus
from websockets.sync.client import connect

from safe_pruner_jax.serving import Access, ServerError, Terms

pytestmark = [
    pytest.mark.newest,
    pytest.mark.ray,
    pytest.mark.filterwarnings(r"ignore:connect\(\) must be used:DeprecationWarning"),
]

DATA = Path(__file__).parent / "data"
KEY = "a-key-for-tests-only"
AUTHORIZED = {"Authorization": f"Api-Key {KEY}"}


@contextlib.contextmanager
def serving(cluster, **options):
    """A service on the cluster; its port."""
    from safe_pruner_jax.cluster.serve import service

    options = {"make": toy.Backend, "access": Access(key=KEY), "everywhere": False} | options
    with service(port=(port := free_port()), **options):
        yield port


class Robot:
    """openpi's client with a name."""

    def __init__(self, port, name):
        self._port, self._name = port, name
        self.connect()

    def connect(self):
        """Also again."""
        self._client = WebsocketClientPolicy("127.0.0.1", self._port, api_key=KEY)
        self.node = self._client.get_server_metadata()["node"]

    def infer(self, **request):
        return self._client.infer({"robot_id": self._name} | request)

    def hear_of_the_move(self, reply):
        """This reply says so, or a later one if the board is slow."""
        until(lambda: "moved_from" in reply or "moved_from" in self.infer())

    def close(self):
        self._client._ws.close()

    def closed(self):
        """The code with which the server ends the connection."""
        with pytest.raises(ConnectionClosed) as end:
            self._client._ws.recv(WAIT_S)
        return end.value.rcvd.code if end.value.rcvd else None


def on_both(port, least=2):
    """Robots that are connected to two replicas, at least so many."""
    robots = []
    until(lambda: robots.append(Robot(port, f"robot {len(robots)}")) or len({r.node for r in robots}) == 2)
    while len(robots) < least:
        robots.append(Robot(port, f"robot {len(robots)}"))
    return robots


def samples(port, path, name):
    """Labels → value of a metric."""
    status, text = get(port, path, **AUTHORIZED)
    assert status == 200
    found = [s for family in text_string_to_metric_families(text.decode()) for s in family.samples]
    return {tuple(sorted(s.labels.items())): s.value for s in found if s.name == f"safe_pruner_{name}"}


def replicas(port):
    """How many say that they are ready."""
    return sum(samples(port, "/metrics/replicas", "ready").values())


def test_a_node_that_is_killed_takes_nothing_with_it_silently(cluster):
    with serving(cluster, replicas=(2, 2), cores=2) as port, ThreadPoolExecutor(1) as pool:
        robots = on_both(port)
        doomed = robots[-1].node
        lost = [robot for robot in robots if robot.node == doomed]
        kept = next(robot for robot in robots if robot.node != doomed)
        for robot in (*lost, kept):
            assert robot.infer()["pruning"]["keyframe"] and not robot.infer()["pruning"]["keyframe"]
        asked = pool.submit(lost[0].infer, seconds=600)
        time.sleep(0.5)  # it is on its way
        cluster.kill(doomed)
        with pytest.raises(ConnectionClosed):
            asked.result(WAIT_S)
        reply = kept.infer()
        assert reply["actions"][0, 0] == 3 and "moved_from" not in reply
        for robot in lost:
            robot.connect()
            reply = robot.infer()
            assert robot.node == kept.node and reply["pruning"]["keyframe"] and reply["actions"][0, 0] == 1
            robot.hear_of_the_move(reply)
            assert "moved_from" not in robot.infer()
        for robot in robots:
            robot.close()


def test_the_board_is_on_the_head_node(cluster):
    import ray

    from safe_pruner_jax.cluster.connect import head
    from safe_pruner_jax.cluster.serve import _board

    places = set()
    for _ in range(6):  # by chance it would be there one time in three
        with _board() as board:
            places.add(ray.get(board.__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id())))
    assert places == {head()}


def test_replicas_come_with_robots_and_leave_after_their_last_answer(cluster):
    terms = Terms(drain_s=30)
    options = {"replicas": (1, 2), "cores": 2, "robots": 2, "scale_s": (0.5, 1.0), "terms": terms}
    with serving(cluster, **options) as port, ThreadPoolExecutor(4) as pool:
        first = [Robot(port, f"early robot {i}") for i in range(2)]
        assert len({robot.node for robot in first}) == replicas(port) == 1  # which is meant for two
        first += [Robot(port, f"early robot {i}") for i in (2, 3)]
        until(lambda: replicas(port) == 2)
        robots = on_both(port)
        staying = [robots[0], next(robot for robot in robots if robot.node != robots[0].node)]
        for robot in (*first, *robots):
            if robot not in staying:
                robot.close()
        assert all(robot.infer()["actions"][0, 0] == 1 for robot in staying)
        stop, answers = threading.Event(), {robot: [] for robot in staying}

        def ask(robot):
            with contextlib.suppress(ConnectionClosed):
                while not stop.is_set():
                    answers[robot].append(robot.infer(seconds=0.2)["actions"][0, 0])

        asking = {robot: pool.submit(ask, robot) for robot in staying}
        until(lambda: any(future.done() for future in asking.values()))
        moved = next(robot for robot, future in asking.items() if future.done())
        other = next(robot for robot in staying if robot is not moved)
        stop.set()
        asking[other].result(WAIT_S)
        assert answers[moved] == [*range(2, len(answers[moved]) + 2)]  # every one of them, in order
        assert moved.closed() == 1001
        moved.connect()
        reply = moved.infer()
        assert moved.node == other.node and reply["pruning"]["keyframe"] and reply["actions"][0, 0] == 1
        moved.hear_of_the_move(reply)
        until(lambda: replicas(port) == 1)
        for robot in staying:
            robot.close()


def test_what_waits_is_answered_when_the_service_ends(cluster, tmp_path):
    release = tmp_path / "release"
    with ThreadPoolExecutor(2) as pool:
        with serving(cluster) as port:
            robots = [Robot(port, "one"), Robot(port, "two")]
            asked = [pool.submit(robot.infer, until=str(release)) for robot in robots]
            until(lambda: sum(samples(port, "/metrics", "waiting_requests").values()) == 1)  # and one runs
            threading.Timer(1.0, release.touch).start()
        assert [future.result(WAIT_S)["actions"][0, 0] for future in asked] == [1, 1]
        assert [robot.closed() for robot in robots] == [1001, 1001]


def test_health_readiness_and_metrics_of_each_and_of_all(cluster):
    with serving(cluster, replicas=(2, 2), cores=2) as port:
        robots = on_both(port)
        for robot in robots:
            robot.infer(), robot.infer()
        assert [get(port, path)[0] for path in ("/healthz", "/readyz", "/metrics", "/metrics/replicas")] == [
            *(200, 200),
            *(401, 401),
        ]
        with pytest.raises(InvalidStatus) as refused:
            WebsocketClientPolicy("127.0.0.1", port, api_key="wrong")
        assert refused.value.response.status_code == 401
        ok = lambda path: {k: v for k, v in samples(port, path, "requests_total").items() if ("outcome", "ok") in k}
        until(lambda: sum(ok("/metrics").values()) == 2 * len(robots))
        each, summed = ok("/metrics/replicas"), ok("/metrics")
        assert len(each) == 2 and len(summed) == 1 and sum(each.values()) == sum(summed.values())
        assert all(value >= 2 for value in each.values()) and replicas(port) == 2
        assert sum(samples(port, "/metrics", "connections").values()) == len(robots)
        assert samples(port, "/metrics", "keyframe_share") == {(): pytest.approx(0.5)}
        for robot in robots:
            robot.close()


def test_tls_with_openpis_client(cluster, monkeypatch):
    files = str(DATA / "tls_cert.pem"), str(DATA / "tls_key.pem")
    monkeypatch.setenv("SSL_CERT_FILE", files[0])
    with serving(cluster, tls_files=files) as port:
        client = WebsocketClientPolicy("wss://127.0.0.1", port, api_key=KEY)
        assert client.infer({"robot_id": "one"})["actions"][0, 0] == 1
        client._ws.close()
        with pytest.raises((EOFError, OSError, InvalidMessage)):  # nobody talks in the clear
            connect(f"ws://127.0.0.1:{port}", additional_headers=AUTHORIZED)


def test_a_second_service_on_the_cluster_is_one_line(cluster):
    text = r"expected no service on this cluster, got one: openpi; end it with"
    with serving(cluster), pytest.raises(ServerError, match=text) as told, serving(cluster):
        pass
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"replicas": (3, 3), "cores": 2, "room_s": 0.1}, r"replicas: expected room for 3, the cluster has room for 2"),
        (
            {"replicas": (2, 2), "cores": 2, "identify": toy.identify},
            r"do not start: node .*another policy .*\(checkpoint: \w+ → \w+\); put the same one on every node",
        ),
        ({"make": toy.broken}, r"the replicas do not start: .*no checkpoint at /data/pi05"),
    ],
)
def test_a_service_that_cannot_start_is_one_line(cluster, options, text):
    with pytest.raises(ServerError, match=text) as told, serving(cluster, **options):
        pass
    assert "\n" not in str(told.value)


def test_a_service_whose_nodes_have_all_died_is_there_again_when_nodes_are(cluster, caplog):
    caplog.set_level(logging.INFO, "safe_pruner_jax")
    with serving(cluster) as port:
        robot = Robot(port, "one")
        assert robot.infer()["actions"][0, 0] == 1
        cluster.kill()
        with pytest.raises(ConnectionClosed):
            until(lambda: robot.infer() is None)  # a replica outlives its node by a moment
        until(lambda: "replicas: 0" in caplog.text)
        caplog.clear()
        cluster.mend()
        until(lambda: "replicas: 1" in caplog.text)
        robot.connect()
        assert robot.infer()["pruning"]["keyframe"]
        robot.close()
