"""The queue in front of the accelerator: who is joined, who is turned away, and that everybody is answered."""

import asyncio
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safe_pruner_jax.policy.reply import Result
from safe_pruner_jax.serving.backend import Served
from safe_pruner_jax.serving.scheduler import Scheduler, Terms, Turned

HANGS_S, LONG_S = 60.0, 600.0
"""What no test waits for: a request that is not answered, and a delay that must not be waited out."""


@dataclass(frozen=True)
class Job:
    group: str = "a"
    number: int = 0


class FakeDevice:
    """Answers with the job; `gate` holds its steps back."""

    robots = 1

    def __init__(self, limit=2):
        self.limit, self.steps, self.gate, self.fail = limit, [], None, None

    async def step(self, prepared):
        self.steps.append([(robot, job.number) for robot, job in prepared])
        if self.gate is not None:
            await self.gate.wait()
        if self.fail is not None:
            return [Result(None, self.fail) for _ in prepared], 0.0
        return [Result({"number": job.number}) for _, job in prepared], 0.0


def play(scenario, *, backend=None, robots=1, **terms):
    """Runs `scenario(scheduler, backend)` in a loop with the queue running, and drains it."""
    backend = backend or FakeDevice()

    async def main():
        backend.robots = robots
        scheduler = Scheduler(backend, Terms(**terms))
        queue = asyncio.ensure_future(scheduler.run())
        result = await scenario(scheduler, backend)
        scheduler.close()
        await asyncio.wait_for(queue, HANGS_S)
        return result

    return asyncio.run(main())


async def outcome(answer):
    """Number of the job that was run, or the kind of refusal."""
    try:
        return (await asyncio.wait_for(answer, HANGS_S)).result.reply["number"]
    except Turned as turned:
        return turned.kind


def test_one_robot_never_waits_for_others():
    async def scenario(scheduler, backend):
        served: Served = await asyncio.wait_for(scheduler.submit("r", Job()), HANGS_S)
        return served

    served = play(scenario, robots=1, max_delay_s=LONG_S)
    assert served.batch == 1 and served.queue_s < LONG_S


def test_waiting_robots_of_one_group_are_joined_up_to_the_limit():
    async def scenario(scheduler, backend):
        groups = {"r0": "a", "r1": "b", "r2": "a", "r3": "a"}
        answers = [scheduler.submit(robot, Job(group, i)) for i, (robot, group) in enumerate(groups.items())]
        return [(await a).batch for a in answers], backend.steps

    batches, steps = play(scenario, robots=4, max_delay_s=0.05)
    assert steps == [[("r0", 0), ("r2", 2)], [("r1", 1)], [("r3", 3)]] and batches == [2, 1, 2, 1]


def test_a_full_batch_does_not_wait_out_the_delay():
    async def scenario(scheduler, backend):
        answers = [scheduler.submit(robot, Job()) for robot in ("r0", "r1")]
        return [(await asyncio.wait_for(a, HANGS_S)).batch for a in answers]

    assert play(scenario, robots=3, max_delay_s=LONG_S) == [2, 2]


def test_the_newest_observation_wins_and_keeps_its_place():
    async def scenario(scheduler, backend):
        backend.gate = asyncio.Event()
        running = scheduler.submit("r", Job(number=0))
        await asyncio.sleep(0.01)  # it runs, and can no longer be superseded
        answers = [running, *(scheduler.submit("r", Job(number=i)) for i in (1, 2))]
        answers += [scheduler.submit("s", Job(number=10)), scheduler.submit("r", Job(number=3))]
        backend.gate.set()
        return [await outcome(a) for a in answers], backend.steps

    outcomes, steps = play(scenario, backend=FakeDevice(limit=1))
    assert outcomes == [0, "superseded", "superseded", 10, 3]
    assert steps == [[("r", 0)], [("r", 3)], [("s", 10)]]


def test_who_has_left_takes_no_place_in_a_step():
    async def scenario(scheduler, backend):
        backend.gate = asyncio.Event()
        running, there = scheduler.submit("run", Job()), [True, True, True]
        await asyncio.sleep(0.01)
        answers = [scheduler.submit(f"r{i}", Job(number=i), None, lambda i=i: there[i]) for i in range(3)]
        there[1] = False
        backend.gate.set()
        return [await outcome(a) for a in (running, *answers)], backend.steps

    outcomes, steps = play(scenario, backend=FakeDevice(limit=2))
    assert outcomes == [0, 0, "rejected", 2] and steps[1:] == [[("r0", 0), ("r2", 2)]]


def test_a_full_queue_rejects_at_once_but_not_a_newer_observation():
    async def scenario(scheduler, backend):
        backend.gate = asyncio.Event()
        running = scheduler.submit("run", Job())
        await asyncio.sleep(0.01)
        answers = [scheduler.submit(robot, Job(number=i)) for i, robot in enumerate(("r", "s", "t", "r"))]
        with pytest.raises(Turned, match="rejected: 2 requests wait already; send a fresh observation"):
            await asyncio.wait_for(asyncio.shield(answers[2]), HANGS_S)  # while the step still runs
        backend.gate.set()
        return [await outcome(a) for a in (running, *answers)]

    assert play(scenario, max_queue=2) == [0, "superseded", 1, "rejected", 3]


def test_what_waits_too_long_is_not_run():
    async def scenario(scheduler, backend):
        backend.gate = asyncio.Event()
        running = scheduler.submit("run", Job())
        await asyncio.sleep(0.01)
        short, patient = scheduler.submit("r", Job(number=1), 0.02), scheduler.submit("s", Job(number=2), 1e9)
        with pytest.raises(Turned, match="expired: not run within its 20 ms"):
            await asyncio.wait_for(asyncio.shield(short), HANGS_S)  # told while the accelerator is busy
        backend.gate.set()
        return [await outcome(a) for a in (running, short, patient)], backend.steps

    outcomes, steps = play(scenario)
    assert outcomes == [0, "expired", 2] and [("r", 1)] not in steps


def test_a_robot_that_left_is_not_run():
    async def scenario(scheduler, backend):
        backend.gate = asyncio.Event()
        running = scheduler.submit("run", Job())
        await asyncio.sleep(0.01)
        gone = scheduler.submit("r", Job(number=1))
        scheduler.cancel(gone)
        backend.gate.set()
        return [await outcome(a) for a in (running, gone)], backend.steps

    assert play(scenario) == ([0, "rejected"], [[("run", 0)]])


def test_a_step_that_fails_is_told_to_everybody_in_it_and_the_next_one_runs():
    async def scenario(scheduler, backend):
        backend.fail = RuntimeError("RESOURCE_EXHAUSTED")
        failed = [scheduler.submit(robot, Job()) for robot in ("r", "s")]
        errors = [(await a).result.error for a in failed]
        backend.fail = None
        return errors, await outcome(scheduler.submit("r", Job(number=7)))

    errors, after = play(scenario)
    assert [str(e) for e in errors] == ["RESOURCE_EXHAUSTED"] * 2 and after == 7


def test_closing_answers_what_waits_and_rejects_what_comes():
    async def scenario(scheduler, backend):
        backend.gate = asyncio.Event()
        answers = [scheduler.submit(robot, Job(number=i)) for i, robot in enumerate(("r", "s", "t"))]
        await asyncio.sleep(0.01)
        scheduler.close()
        answers.append(scheduler.submit("u", Job(number=3)))
        backend.gate.set()
        return [await outcome(a) for a in answers]

    assert play(scenario) == [0, 1, 2, "rejected"]


def test_draining_ends_by_itself():
    async def scenario(scheduler, backend):
        backend.gate = asyncio.Event()
        running = scheduler.submit("run", Job())
        await asyncio.sleep(0.01)
        waiting = scheduler.submit("r", Job())
        scheduler.close()
        answers = [await outcome(waiting)]
        backend.gate.set()
        return [*answers, await outcome(running)]

    assert play(scenario, drain_s=0.02) == ["rejected", 0]


@settings(max_examples=60)
@given(
    requests=st.lists(st.tuples(st.integers(0, 3), st.sampled_from("ab"), st.sampled_from([None, 1e-9])), max_size=12),
    pauses=st.lists(st.booleans(), min_size=12, max_size=12),
    limit=st.integers(1, 3),
    queue=st.integers(1, 4),
)
def test_every_request_gets_exactly_one_answer_and_steps_keep_the_rules(requests, pauses, limit, queue):
    groups = {}

    async def scenario(scheduler, backend):
        answers = []
        for number, ((robot, group, deadline), pause) in enumerate(zip(requests, pauses, strict=False)):
            groups[number] = group
            answers.append(scheduler.submit(robot, Job(group, number), deadline))
            assert scheduler.waiting <= queue
            if pause:
                await asyncio.sleep(0)
        scheduler.close()
        return [await outcome(a) for a in answers], backend.steps

    outcomes, steps = play(scenario, backend=FakeDevice(limit), robots=2, max_queue=queue, max_delay_s=0.0)
    run = [number for step in steps for _, number in step]
    assert sorted(run) == [n for n, o in enumerate(outcomes) if o == n] and len(set(run)) == len(run)
    for step in steps:
        assert 1 <= len(step) <= limit and len({groups[n] for _, n in step}) == 1
        assert len({robot for robot, _ in step}) == len(step)
    for robot in range(4):  # a robot's observations are run in the order they were taken
        own = [n for step in steps for r, n in step if r == robot]
        assert own == sorted(own)


@pytest.mark.parametrize(
    "terms, says",
    [({"max_queue": 0}, "max_queue"), ({"max_delay_s": -1}, "max_delay_s"), ({"deadline_s": 0}, "deadline_s")],
)
def test_terms_out_of_range(terms, says):
    with pytest.raises(ValueError, match=f"{says}: expected"):
        Terms(**terms)
