"""`openpi serve --protocol vla-eval`, driven by the harness' own client."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest

from safe_pruner_jax.policy.reply import Result

pytestmark = pytest.mark.newest  # what imports the harness does so inside tests: openpi's pins are without it

RNG = np.random.default_rng(0)


class Counting:
    """A backend of LIBERO requests: actions count the robot's steps since its last reset, and rows count inside."""

    metadata, limit, real_time, attention, evicted = {}, 4, False, None, 0

    def __init__(self):
        self.warm, self.sizes, self.requests, self.steps = 0, [], [], {}
        self.together = threading.Event()

    def warmup(self):
        self.warm += 1

    def prepare(self, robot, request):
        self.requests.append(request)
        return SimpleNamespace(group=0, request=request)

    def step(self, prepared):
        self.sizes.append(len(prepared))
        return [self._one(robot, one.request) for robot, one in prepared]

    def _one(self, robot, request):
        if request["prompt"] == "fail":
            return Result(None, FloatingPointError("not finite"))
        self.steps[robot] = 1 if request["reset"] else self.steps[robot] + 1
        rows = 100 * self.steps[robot] + np.arange(10.0)
        return Result({"actions": np.repeat(rows[:, None], 7, axis=1)})

    def forget(self, robot):
        pass


def observation(prompt="pick up the soup", **changes):
    images = {name: RNG.integers(0, 256, (256, 256, 3), np.uint8) for name in ("agentview", "wrist")}
    return {"images": images, "states": np.zeros(8, np.float32), "task_description": prompt} | changes


def drive(backend, scenario):
    """Runs a scenario(connect), connect() being the harness' client, against a live server of the harness."""
    import anyio
    from vla_eval.connection import Connection
    from vla_eval.model_servers.serve import serve_async

    from safe_pruner_jax.serving.vla_eval import PolicyServer

    async def both():
        async with anyio.create_task_group() as group:
            port = await group.start(serve_async, PolicyServer(backend), "127.0.0.1", 0)
            await scenario(lambda: Connection(f"ws://127.0.0.1:{port}"))
            group.cancel_scope.cancel()

    anyio.run(both)


def test_two_episodes_with_five_actions_per_call():
    backend, played = Counting(), []

    async def scenario(connect):
        async with connect() as client:
            assert client.server_info["model_server"] == "PolicyServer"
            for _ in range(2):
                await client.start_episode({"task": {"name": "soup"}})
                played.append([float((await client.act(observation()))["actions"][0]) for _ in range(7)])
                await client.end_episode({"success": True})

    drive(backend, scenario)
    assert played == [[100, 101, 102, 103, 104, 200, 201]] * 2, "a new episode begins with an empty memory"
    assert backend.warm == 1 and [asked["reset"] for asked in backend.requests] == [True, False] * 2
    assert set(backend.requests[0]) == {
        "observation/image",
        "observation/wrist_image",
        "observation/state",
        "prompt",
        "reset",
    }


def test_shards_share_device_steps():
    import anyio

    backend, played = Counting(), {}

    async def shard(connect, number, ready):
        async with connect() as client:
            await client.start_episode({"task": {"name": "soup"}})
            ready.append(number)
            while len(ready) < 4:
                await anyio.sleep(0.01)
            played[number] = [float((await client.act(observation()))["actions"][0]) for _ in range(12)]

    async def scenario(connect):
        ready = []
        async with anyio.create_task_group() as group:
            for number in range(4):
                group.start_soon(shard, connect, number, ready)

    drive(backend, scenario)
    one = [100, 101, 102, 103, 104, 200, 201, 202, 203, 204, 300, 301]
    assert played == dict.fromkeys(range(4), one)
    assert sum(backend.sizes) == 12 and max(backend.sizes) > 1


def test_what_the_harness_is_asked_to_send():
    from safe_pruner_jax.serving.vla_eval import PolicyServer

    server = PolicyServer(Counting())
    assert server.get_observation_params() == {"send_wrist_image": True, "send_state": True}
    assert set(server.get_action_spec()) == {"position", "rotation", "gripper"}
    assert set(server.get_observation_spec()) == {"image", "state", "language"}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"images": {"agentview": np.zeros((8, 8, 3), np.uint8)}}, "got 1 cameras and a state; set send_wrist_image"),
        ({"states": None}, "got 2 cameras and no state"),
    ],
)
def test_an_observation_that_lacks_something(changes, text):
    from safe_pruner_jax.serving.vla_eval import request

    with pytest.raises(ValueError, match=text):
        request(observation(**changes), reset=True)


def test_a_failure_reaches_the_client():
    async def scenario(connect):
        async with connect() as client:
            await client.start_episode({"task": {"name": "soup"}})
            with pytest.raises(RuntimeError, match="not finite"):
                await client.act(observation("fail"))

    drive(Counting(), scenario)
