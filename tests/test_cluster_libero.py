"""LIBERO and the embedded policy on two nodes of a Ray cluster: the records of one machine."""

import dataclasses

import pytest

from safe_pruner_jax.cli import main as cli
from safe_pruner_jax.evaluation.records import Record, read_records

pytestmark = [pytest.mark.newest, pytest.mark.ray, pytest.mark.libero]

TIMES = ("seconds", "infer_ms")


def test_two_nodes_play_what_one_machine_plays(cluster, tmp_path):
    episodes = ["--suite", "libero_object", "--tasks", "0", "1", "--trials", "1", "--max-steps", "20", "--batch", "1"]
    places = {"here": ["--workers", "1"], "ray": ["--on", "ray", "--policies", "1", "--simulators", "2"]}
    records = {}
    for place, options in places.items():
        out = tmp_path / f"{place}.jsonl"
        method = ["--prompt-lengths", "16", "--pruner=safe", "policy:embedded"]
        assert cli.main(["evaluate", *episodes, *options, "--out", str(out), *method]) == 0
        records[place] = sorted(read_records(out), key=lambda record: record.key)
    assert len(records["here"]) == len(records["ray"]) == 2
    for here, there in zip(records["here"], records["ray"], strict=True):
        assert here.outcome in ("success", "failure")
        for field in dataclasses.fields(Record):
            if field.name not in TIMES:
                assert getattr(there, field.name) == getattr(here, field.name), field.name
