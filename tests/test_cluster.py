"""Evaluation on a Ray cluster of three nodes on loopback, of which one is killed; toy policy and toy simulator."""

import dataclasses
import importlib
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import toy_cluster as toy
from ray_cluster import WAIT_S, until
from toy_records import CONFIGURATION

from safe_pruner_jax.evaluation.evaluate import EvaluationError, episodes, play
from safe_pruner_jax.evaluation.records import Record, RecordFile, read_records
from safe_pruner_jax.evaluation.sources import Source

pytestmark = [pytest.mark.newest, pytest.mark.ray]

SUITE = "libero_object"
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
JOBS = episodes(SUITE, (0, 1), 6)
SAME = [field.name for field in dataclasses.fields(Record) if field.name not in ("seconds", "batch", "infer_ms")]
"""Fields of a record that do not tell the time, or who shared a step."""


def crew(load=toy.load, look=toy.look, make_env=toy.Env, **options):
    from safe_pruner_jax.cluster.crew import Nodes

    return Nodes(load, toy.IDENTITY, toy.SIMULATOR, look=look, make_env=make_env, policies=1, **options)


def outcomes(path):
    """What was played, without what the clock tells; every episode once."""
    records = read_records(path)
    found = {r.key: {name: getattr(r, name) for name in SAME} for r in records}
    assert len(found) == len(records)
    return found


def run(path, players, jobs=JOBS, workers=3, **options):
    with RecordFile(path, CONFIGURATION) as file:
        play(jobs, file, Source(robots=toy.Robots(), device="toy"), workers=workers, crew=players, **options)
    return outcomes(path)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"load": toy.load_another}, r"has another policy \(checkpoint: 0123456789ab → ffffffffffff\)"),
        ({"load": toy.load_nothing}, r"does not load: FileNotFoundError: no checkpoint at /data/pi05"),
        ({"look": toy.look_in_vain}, r"has no simulator: LIBERO is not installed: run this"),
        ({"look": toy.look_another}, r"has another simulator \(libero: toy 1 → toy 2\); install the same everywhere"),
    ],
)
def test_a_node_that_is_not_like_the_others_is_one_line(cluster, tmp_path, options, text):
    with pytest.raises(EvaluationError, match=text) as told:
        run(tmp_path / "records.jsonl", crew(**options))
    assert "\n" not in str(told.value)


def test_a_simulator_that_dies_is_an_error_of_its_episode_alone(cluster, tmp_path):
    found = run(
        tmp_path / "records.jsonl", crew(make_env=toy.Killed, news_s=1), jobs=episodes(SUITE, (0,), 3), workers=2
    )
    assert [found[SUITE, 0, trial]["outcome"] == "error" for trial in range(3)] == [False, True, False]
    assert "WorkerLost" in found[SUITE, 0, 1]["error"]


def test_a_killed_node_changes_no_outcome(cluster, tmp_path):
    local = run(tmp_path / "local.jsonl", None, make_env=toy.Env)
    assert {record["outcome"] for record in local.values()} == {"success", "failure"}
    players, seen = crew(), []

    def kill(record):
        seen.append(record)
        if len(seen) == 2:  # the node that holds the policy, in the middle of every episode of the run
            cluster.kill(players._policies[0].node)

    assert run(tmp_path / "ray.jsonl", players, on_record=kill) == local
    assert len(seen) == len(local)
    assert re.fullmatch(r"([\d.]+/\w{6} [\d.]+/min(, )?)+", players.rates())  # of each node


def test_a_cluster_that_shrinks_to_nothing_is_one_line_and_keeps_what_was_played(cluster, tmp_path):
    players, seen = crew(), []

    def kill(record):
        seen.append(record)
        players._room_s = 3
        cluster.kill()

    with pytest.raises(EvaluationError, match=r"no node of the cluster has had room .*episodes are kept"):
        run(tmp_path / "records.jsonl", players, on_record=kill, workers=1)
    assert len(outcomes(tmp_path / "records.jsonl")) == len(seen) == 1


def test_a_driver_that_is_killed_is_started_again_and_goes_on(cluster, tmp_path):
    local = run(tmp_path / "local.jsonl", None, make_env=toy.Env)
    path, program = tmp_path / "ray.jsonl", Path(__file__).with_name("toy_driver.py")
    driver = subprocess.Popen([sys.executable, str(program), cluster.address, str(path)], stderr=subprocess.DEVNULL)
    try:
        until(lambda: path.exists() and path.read_text().count("\n") > 2)
    finally:
        driver.kill()
    assert driver.wait(WAIT_S) == -9
    played = outcomes(path)
    assert 0 < len(played) < len(local)
    seen = []
    assert run(path, crew(), on_record=seen.append) == local
    assert len(seen) == len(local) - len(played)


@pytest.mark.parametrize(
    ("change", "address", "text"),
    [
        ("ray.__version__ = '1.0.0'", None, "install the same Ray and Python on every node"),
        ("pass", "127.0.0.1:1", "expected a running Ray cluster at 127.0.0.1:1, got none"),
    ],
)
def test_a_cluster_that_cannot_be_joined_is_one_line(cluster, change, address, text):
    program = f"""
import ray
from safe_pruner_jax.cluster.connect import ClusterError, connected
{change}
try:
    with connected({address or cluster.address!r}):
        print("joined")
except ClusterError as error:
    print(error)
"""
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=WAIT_S).stdout
    assert text in said and said.count("\n") == 1


def test_who_waits_for_the_policy_shares_its_next_step():
    from safe_pruner_jax.cluster.actors import Policy

    begun, release, steps = threading.Event(), threading.Event(), []

    class Robots:
        def start(self, name, seed):
            steps.append((name, seed))

        def step(self, requests):
            steps.append(sorted(requests))
            begun.set()
            assert release.wait(WAIT_S)
            if "broken" in requests.values():
                raise RuntimeError("the device is gone")
            return {name: name + request for name, request in requests.items()}

    policy = Policy(lambda: (toy.IDENTITY, SimpleNamespace(robots=Robots(), device="toy")))
    assert policy.load()[:2] == (toy.IDENTITY, "toy")
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(policy.answer, ("a", "1", 7))
        assert begun.wait(WAIT_S)
        others = [pool.submit(policy.answer, (name, "2", None)) for name in "bc"]
        until(lambda: len(policy._waiting) == 2)
        release.set()
        assert [future.result(WAIT_S) for future in (first, *others)] == ["a1", "b2", "c2"]
    assert steps == [("a", 7), ["a"], ["b", "c"]]
    assert str(policy.answer(("a", "broken", None))) == "the device is gone"
    assert policy.answer(("a", "3", None)) == "a3"


def test_what_ray_costs_is_measured(cluster, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    measure = importlib.import_module("cluster")
    args = measure.Toys(rounds=1, episodes=2, policy_ms=2, step_ms=1, steps=10, requests=5)
    found = measure.evaluation(args, 1)
    assert all(found["call_ms"][kind]["median"] >= 2 for kind in ("here", "ray"))
    assert all(found["episodes_per_minute"][kind]["median"] > 0 for kind in ("here", "ray"))
    found = measure.serving(args, 1)
    assert set(found) == {"1 robot", "2 robots"}
    for some in found.values():
        assert some["round_trip_ms"]["ray"]["median"] > 0 and some["replies_per_s"]["here"]["median"] > 0
        assert some["proxy_processor_ms"]["median"] >= 0
