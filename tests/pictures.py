"""A backend whose replies have what people look on for, and scenes to send it; shared by tests of looking on."""

from types import SimpleNamespace

import numpy as np

from safe_pruner_jax.policy.reply import Result

KEY, CAMERAS = "a-key-for-tests-only", ("base_0_rgb", "left_wrist_0_rgb")


class Pictures:
    """A backend whose replies have what the page draws: 512 patches, 96 kept, κ rising, keyframe at the first step."""

    metadata, limit, real_time, attention, evicted = {"model": "pictures"}, 4, False, None, 0

    def __init__(self):
        self.steps = {}

    def warmup(self):
        pass

    def prepare(self, robot, request):
        images = {camera: request[camera] for camera in CAMERAS if camera in request}
        return SimpleNamespace(group=0, example=SimpleNamespace(images=images))

    def step(self, prepared):
        return [self._one(robot) for robot, _ in prepared]

    def _one(self, robot):
        number = self.steps[robot] = self.steps.get(robot, 0) + 1
        kept = 512 if number == 1 else 96
        pruning = {"kept": kept, "alive": 512, "keyframe": number == 1, "kappa": None if number == 1 else 0.7}
        pruning |= {"index": np.arange(kept, dtype=np.int32) * (512 // kept), "views": list(CAMERAS), "text": 16}
        reply = {"actions": np.zeros((10, 7)), "policy_timing": {"infer_ms": 20.0 + number}, "pruning": pruning}
        saliency = {"score": np.linspace(0, 1, 512, dtype=np.float32), "late": np.ones((1, 3, 512), np.float32)}
        return Result(reply, None, pruning, number == 1, saliency)

    def forget(self, robot):
        self.steps.pop(robot, None)


def scene(step, **more):
    y, x = np.mgrid[:224, :224]
    image = np.stack([x, y, (x + y) // 2], -1).astype(np.uint8)
    image[20 + 6 * step : 80 + 6 * step, 60:140] = (220, 60, 40)
    return {CAMERAS[0]: image, CAMERAS[1]: image[::-1].copy(), "prompt": "pick up the <b>soup</b>", **more}
