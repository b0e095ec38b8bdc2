"""A backend for replicas: tells its node, takes the time it is asked to, and calls a memory's first step a keyframe."""

import os
import time

import fake_server


class Session(fake_server.FakeSession):
    def infer(self, request):
        time.sleep(request.get("seconds", 0))
        while "until" in request and not os.path.exists(request["until"]):
            time.sleep(0.01)
        reply = super().infer(request)
        reply["pruning"]["keyframe"] = self.step == 1
        return reply


class Backend(fake_server.FakeBackend):
    def __init__(self):
        import ray  # where tests are only collected it need not be there

        super().__init__({"model": "fake", "node": ray.get_runtime_context().get_node_id()})

    def session(self):
        return Session(self)


def identify():
    """Every node has a checkpoint of its own."""
    import ray

    return {"policy": "toy", "checkpoint": ray.get_runtime_context().get_node_id()[:6]}


def broken():
    """A node without the checkpoint."""
    raise FileNotFoundError("no checkpoint at /data/pi05")
