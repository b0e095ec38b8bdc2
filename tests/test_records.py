"""Records on disk: what survives a kill, a full disk, another configuration and a second writer."""

import dataclasses
import errno
import json
import os
import subprocess
import sys

import pytest
from toy_records import CONFIGURATION, record

from safe_pruner_jax.evaluation import records
from safe_pruner_jax.evaluation.records import (
    RecordFile,
    RecordsError,
    describe_calls,
    episode_seed,
    latest,
    percentiles,
    read_records,
)
from safe_pruner_jax.evaluation.rollout import Call, Episode
from safe_pruner_jax.policy.identity import checkpoint_fingerprint, differences
from safe_pruner_jax.policy.loading import CALIBRATION

pytestmark = pytest.mark.newest


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new folder" / "records.jsonl"


def written(path, *some):
    with RecordFile(path, CONFIGURATION) as file:
        for r in some:
            file.append(r)
    return path


def test_what_is_written_is_read(path):
    some = [record(0), record(1, "error")]
    assert read_records(written(path, *some)) == some
    with RecordFile(path, CONFIGURATION) as file:
        assert file.finished == {("libero_object", 0, 0), ("libero_object", 0, 1)}
        file.append(record(2))
    assert [r.trial for r in read_records(path)] == [0, 1, 2]


@pytest.mark.parametrize("torn", ['{"suite": "libero_obj', "{", "\x00\x00"])
def test_a_line_torn_by_a_kill_is_removed(path, torn):
    with written(path, record(0)).open("a") as file:
        file.write(torn)
    assert [r.trial for r in read_records(path)] == [0]
    written(path, record(1))
    assert [r.trial for r in read_records(path)] == [0, 1]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_whole_line_without_its_newline_is_kept(path):
    written(path, record(0), record(1)).write_text(path.read_text().rstrip("\n"))
    assert len(read_records(path)) == 2
    written(path, record(2))
    assert [r.trial for r in read_records(path)] == [0, 1, 2]


@pytest.mark.parametrize("line", ["not json", '{"suite": "libero_object"}', "[]", ""])
def test_a_broken_line_in_the_middle_is_named(path, line):
    lines = written(path, record(0), record(1)).read_text().splitlines()
    path.write_text("\n".join([lines[0], line, lines[1], ""]))
    with pytest.raises(RecordsError, match="line 2: not a record"):
        read_records(path)
    with pytest.raises(RecordsError, match="line 2"):
        RecordFile(path, CONFIGURATION)


def test_another_configuration_is_refused_and_the_difference_named(path):
    before = written(path, record(0)).read_bytes()
    other = dataclasses.replace(CONFIGURATION, choices=CONFIGURATION.choices | {"keep": 0.1}, precision="bfloat16")
    with pytest.raises(RecordsError, match=r"choices\.keep: 0\.2 → 0\.1; precision: float32 → bfloat16.*another file"):
        RecordFile(path, other)
    assert path.read_bytes() == before


def test_records_from_before_the_temperature_were_made_at_1(path):
    path.parent.mkdir(exist_ok=True)
    told = dataclasses.asdict(record())
    del told["configuration"]["temperature"]
    path.write_text(json.dumps(told) + "\n", encoding="utf-8")
    assert read_records(path)[0].configuration["temperature"] == 1.0
    with RecordFile(path, CONFIGURATION) as file:
        assert len(file.finished) == 1
    with pytest.raises(RecordsError, match=r"temperature: 1\.0 → 0\.0"):
        RecordFile(path, dataclasses.replace(CONFIGURATION, temperature=0.0))


def test_records_from_before_a_choice_have_its_default(path):
    configuration = dataclasses.replace(CONFIGURATION, choices={"keep": 0.3, "cut": 1})
    with RecordFile(path, configuration) as file:
        file.append(dataclasses.replace(record(0), configuration=configuration.as_json()))
    today = dataclasses.replace(
        CONFIGURATION, choices=CONFIGURATION.choices | {"keep": 0.3, "cut": 1, "late_layers": None}
    )
    with RecordFile(path, today) as file:
        assert len(file.records) == 1
    with pytest.raises(RecordsError, match=r"choices.soft: 0.0 → 0.1"):
        RecordFile(path, dataclasses.replace(today, choices=today.choices | {"soft": 0.1}))
    assert read_records(path)[0].configuration["choices"]["warm_start"] is None
    unknown = dataclasses.replace(record(1), configuration=configuration.as_json() | {"pruner": "theirs"})
    with path.open("a") as file:
        file.write(json.dumps(dataclasses.asdict(unknown)) + "\n")
    assert read_records(path)[1].configuration["choices"] == {"keep": 0.3, "cut": 1}


def test_differences_see_missing_fields():
    assert differences({"a": 1}, {"b": {"c": 1}}) == ["a: 1 → None", "b: None → {'c': 1}"]
    assert differences(CONFIGURATION.as_json(), CONFIGURATION.as_json()) == []


def test_a_second_writer_is_refused_while_the_first_one_writes(path):
    with RecordFile(path, CONFIGURATION), pytest.raises(RecordsError, match="another process"):
        RecordFile(path, CONFIGURATION)
    written(path, record(0))


@pytest.mark.parametrize("number, text", [(errno.ENOSPC, "the disk is full"), (errno.EIO, os.strerror(errno.EIO))])
def test_a_write_that_fails_keeps_what_was_finished(path, monkeypatch, number, text):
    file = RecordFile(path, CONFIGURATION)
    file.append(record(0))

    def half(fd, data, write=os.write):
        write(fd, data[: len(data) // 2])
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(records.os, "write", half)
        with pytest.raises(RecordsError, match=f"{text}.*1 finished episodes are kept.*same command again"):
            file.append(record(1))
    assert read_records(path) == [record(0)]
    file.append(record(1))
    file.close()
    assert [r.trial for r in read_records(path)] == [0, 1]


def test_a_short_write_is_a_full_disk(path, monkeypatch):
    with RecordFile(path, CONFIGURATION) as file:
        with monkeypatch.context() as patch:
            patch.setattr(records.os, "write", lambda fd, data, write=os.write: write(fd, data[:7]))
            with pytest.raises(RecordsError, match="the disk is full"):
                file.append(record(0))
        assert path.read_bytes() == b"" and file.finished == set()


def test_a_killed_process_leaves_a_file_that_continues(path):
    """A process is killed in the middle of writing many records; every line that was acknowledged is there."""
    written(path)
    child = subprocess.Popen(
        [
            *(sys.executable, "-c"),
            "import sys; sys.path[:0] = sys.argv[2].split(':')\n"
            "from test_records import CONFIGURATION, RecordFile, record\n"
            "file = RecordFile(sys.argv[1], CONFIGURATION)\n"
            "for k in range(10**6): file.append(record(k)); print(k, flush=True)",
            *(str(path), ":".join(sys.path)),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    acknowledged = [int(child.stdout.readline()) for _ in range(20)]
    child.kill()
    acknowledged += [int(line) for line in child.stdout.read().split()]
    child.wait()
    child.stdout.close()
    with RecordFile(path, CONFIGURATION) as file:
        assert {("libero_object", 0, k) for k in acknowledged} <= file.finished


def test_the_last_record_of_an_episode_counts():
    again = [record(0, "error"), record(1), record(0, "success")]
    assert sorted((r.trial, r.outcome) for r in latest(again)) == [(0, "success"), (1, "success")]
    other = dataclasses.replace(CONFIGURATION, precision="bfloat16")
    assert len(latest([record(0), record(0, configuration=other)])) == 2


def test_seeds_depend_on_the_episode_alone():
    seeds = {episode_seed(s, t, k) for s in ("libero_object", "libero_goal") for t in range(10) for k in range(50)}
    assert len(seeds) == 1000 and all(0 <= seed < 2**31 for seed in seeds)
    assert episode_seed("libero_object", 0, 0, base=1) != episode_seed("libero_object", 0, 0)


def test_fingerprint_of_a_checkpoint(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "params").mkdir(parents=True)
        (tmp_path / name / "params" / "data").write_bytes(b"weights")
    a = checkpoint_fingerprint(tmp_path / "a")
    (tmp_path / "a" / CALIBRATION).write_text("{}")  # its choices are recorded, so it is no other checkpoint
    assert a == checkpoint_fingerprint(tmp_path / "a")
    assert a == checkpoint_fingerprint(tmp_path / "b") != checkpoint_fingerprint(tmp_path / "b", "note")
    (tmp_path / "b" / "params" / "data").write_bytes(b"weightS")
    assert a != checkpoint_fingerprint(tmp_path / "b")
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        checkpoint_fingerprint(tmp_path / "c")


def test_fingerprint_of_a_large_file_reads_its_ends(tmp_path):
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(70 << 20)
    zeros = checkpoint_fingerprint(tmp_path)
    with large.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    assert checkpoint_fingerprint(tmp_path) != zeros


def test_percentiles_are_nearest_ranks():
    assert percentiles([]) is None
    assert percentiles([5.0]) == {"count": 1, "p50": 5.0, "p90": 5.0}
    assert percentiles(range(1, 11)) == {"count": 10, "p50": 5, "p90": 9}


def call(keyframe, ms, kept, **more):
    told = {"keyframe": keyframe, "kept": kept, "alive": 512, "views": ("a", "b"), "text": 32}
    return Call(0, 1.0, told, {"policy_timing": {"infer_ms": ms, "batch": 2, **more}})


def test_what_calls_say():
    calls = (call(True, 900.0, 512, compiled=True), call(True, 30.0, 512), call(False, 10.0, 100))
    told = describe_calls(Episode("s", 0, 0, "success", 15, 1.0, calls))
    assert (told["calls"], told["keyframes"], told["alive"], told["batch"]) == (3, 2, 512, 2)
    assert told["kept"] == pytest.approx((512 + 512 + 100) / 3)
    assert told["infer_ms"]["keyframe"] == {"count": 1, "p50": 30.0, "p90": 30.0}
    assert told["views"] == ["a", "b"] and told["prompt_slots"] == 32


def test_what_calls_of_a_plain_server_say():
    calls = (Call(0, 1.0, None, {"server_timing": {"infer_ms": 7.0}}),)
    told = describe_calls(Episode("s", 0, 0, "failure", 5, 1.0, calls))
    assert (told["keyframes"], told["kept"], told["views"]) == (1, None, None)
    assert told["infer_ms"] == {"keyframe": {"count": 1, "p50": 7.0, "p90": 7.0}, "pruned": None}
    nothing = describe_calls(Episode("s", 0, 0, "error", 0, 0.0, (), "OSError: x"))
    assert (nothing["calls"], nothing["kept"], nothing["infer_ms"]["keyframe"]) == (0, None, None)
