"""The soak's own judgement: it must notice a wrong answer, a leak, and what is broken must be broken."""

import random
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from safe_pruner_jax.serving import WireError, pack, unpack

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import soak
import soak_faults

pytestmark = pytest.mark.newest

WANT = {0: [(np.zeros((10, 7)), True)], 1: [(np.ones((10, 7)), True)]}


@pytest.mark.parametrize(
    ("actions", "keyframe", "problem"),
    [
        (np.zeros((10, 7)), True, None),
        (np.full((10, 7), 0.9e-4), True, None),  # rounding
        (np.full((10, 7), 2e-4), True, "wrong answers"),
        (np.zeros((10, 7)), False, "wrong answers"),
        (np.ones((10, 7)), True, "answers of another robot"),
        (np.zeros((5, 7)), True, "wrong answers"),
        (np.full((10, 7), np.nan), True, "wrong answers"),
    ],
)
def test_it_notices_wrong_answers_and_leaks(actions, keyframe, problem):
    world = SimpleNamespace(seed=0, episodes={0: []}, alone=WANT, tally=soak.Tally(), server=SimpleNamespace(lives=1))
    reply = {"actions": actions, "pruning": {"keyframe": keyframe}, "server_timing": {"batch": 1}}
    soak.Robot(0, world).judge(0, reply)
    found = [text.partition(":")[0] for text in world.tally.problems]
    assert found == ([problem] if problem else []) and world.tally.counts["replies"] == 1


def test_episodes_are_seeded_and_each_robots_own():
    one, again, other = (soak_faults.episode(robot, 0) for robot in (0, 0, 1))
    assert pack({"steps": one}) == pack({"steps": again}) != pack({"steps": other})
    assert [step["reset"] for step in one] == [True] + [False] * 7
    assert np.array_equal(one[1]["observation/image"], one[2]["observation/image"])  # frozen
    assert not one[3]["observation/image"].any() and one[7]["prompt"] != one[6]["prompt"]
    assert ["rtc" in soak_faults.episode(robot, 0)[1] for robot in range(5)] == [False, False, False, True, False]


def test_mutated_messages_are_seeded_various_and_mostly_refused():
    request = soak_faults.episode(0, 0)[0]
    rng, frames = random.Random(0), []
    for _ in range(200):
        frames.append(soak_faults.mutate(request, rng))
    rng = random.Random(0)
    assert frames[:5] == [soak_faults.mutate(request, rng) for _ in range(5)]
    refused = set()
    for frame in frames:
        try:
            unpack(frame)
        except WireError as error:
            refused.add(str(error)[:40])
    assert len(set(frames)) > 100 and len(refused) > 15
