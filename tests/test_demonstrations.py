"""Demonstrations on disk, and the collector with workers that are scripts of three lines."""

import dataclasses
import importlib.util
import json
import sys
import textwrap
from pathlib import Path

import h5py
import numpy as np
import pytest
from demonstrations import SIDE, STEPS, demo
from tiers import at_night

from safe_pruner_jax.libero import demonstrations
from safe_pruner_jax.libero.demonstrations import (
    CAMERAS,
    Demo,
    merge_demos,
    pack,
    packed_index,
    read_demos,
    read_packed,
    seeds,
    write_demos,
)

pytestmark = pytest.mark.newest

SCRIPT = Path(__file__).parents[1] / "scripts" / "collect_demos.py"


def assert_same(a: Demo, b: Demo, images=True) -> None:
    assert [getattr(a, k) for k in ("prompt", "suite", "task", "name", "seed", "every")] == [
        getattr(b, k) for k in ("prompt", "suite", "task", "name", "seed", "every")
    ]
    pairs = [(a.state, b.state), (a.actions, b.actions), *((a.extra[k], b.extra[k]) for k in a.extra)]
    for x, y in pairs + ([(a.images[k], b.images[k]) for k in CAMERAS] if images else []):
        np.testing.assert_array_equal(x, y)
        assert x.dtype == y.dtype


def test_hdf5_round_trip(tmp_path):
    demos = [demo(3), demo(4, steps=7)]
    write_demos(tmp_path / "deep" / "a_demo.hdf5", demos)
    for written, read in zip(demos, read_demos(tmp_path / "deep" / "a_demo.hdf5"), strict=True):
        assert_same(written, read)
    assert seeds(tmp_path / "deep" / "a_demo.hdf5") == [3, 4]
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["a_demo.hdf5"]


def test_the_file_has_libero_s_layout(tmp_path):
    one = demo()
    write_demos(tmp_path / "a.hdf5", [one], {"env_name": "Libero_Floor_Manipulation", "bddl_file": "a.bddl"})
    with h5py.File(tmp_path / "a.hdf5") as file:
        data, episode = file["data"], file["data/demo_0"]
        assert (data.attrs["num_demos"], data.attrs["total"]) == (1, STEPS)
        assert json.loads(data.attrs["problem_info"])["language_instruction"] == one.prompt
        assert json.loads(data.attrs["env_args"])["env_name"] == "Libero_Floor_Manipulation"
        np.testing.assert_array_equal(episode["obs/agentview_rgb"][0], one.images["observation/image"][0, ::-1, ::-1])
        assert episode["obs/agentview_rgb"].compression
        shapes = {name: episode["obs"][name].shape for name in episode["obs"]}
        assert shapes == {
            "agentview_rgb": (STEPS, SIDE, SIDE, 3),
            "eye_in_hand_rgb": (STEPS, SIDE, SIDE, 3),
            "ee_pos": (STEPS, 3),
            "ee_ori": (STEPS, 3),
            "ee_states": (STEPS, 6),
            "gripper_states": (STEPS, 2),
            "joint_states": (STEPS, 7),
        }
        assert episode["actions"].shape == (STEPS, 7) and episode.attrs["num_samples"] == STEPS
        assert list(episode["dones"]) == list(episode["rewards"]) == [0, 0, 0, 0, 1]
        assert {"states", "robot_states"} <= set(episode)


@pytest.mark.parametrize("instruction", ["put it down", '"put it down"', list("put it down")])
def test_a_human_demonstration_reads_through_the_same_reader(tmp_path, instruction):
    folder = tmp_path / "libero_goal"
    folder.mkdir()
    frames = np.random.default_rng(0).integers(0, 256, (3, 128, 128, 3), np.uint8)
    with h5py.File(folder / "put_it_down_demo.hdf5", "w") as file:  # what LIBERO's own tool writes, no more
        data = file.create_group("data")
        data.attrs["problem_info"] = json.dumps({"language_instruction": instruction})
        for number in (0, 1, 10, 2):
            obs = data.create_group(f"demo_{number}/obs")
            obs["agentview_rgb"] = obs["eye_in_hand_rgb"] = frames
            obs["ee_states"], obs["gripper_states"] = np.full((3, 6), float(number)), np.ones((3, 2))
            data[f"demo_{number}/actions"] = np.zeros((3, 7))
    demos = list(read_demos(folder / "put_it_down_demo.hdf5", size=56))
    assert [d.state[0, 0] for d in demos] == [0, 1, 2, 10]
    assert {(d.prompt, d.suite, d.task, d.name, d.seed) for d in demos} == {
        ("put it down", "libero_goal", -1, "put_it_down", -1)
    }
    assert demos[0].images["observation/image"].shape == (3, 56, 56, 3)
    kept = next(read_demos(folder / "put_it_down_demo.hdf5"))
    np.testing.assert_array_equal(kept.images["observation/wrist_image"], frames[:, ::-1, ::-1])


def test_other_files_are_refused_by_name(tmp_path):
    with h5py.File(tmp_path / "other.hdf5", "w") as file:
        file.create_group("data/demo_0")
    with pytest.raises(ValueError, match=r"other\.hdf5"):
        list(read_demos(tmp_path / "other.hdf5"))
    with pytest.raises(ValueError, match=r"state \[5, 6\]"):
        Demo(demo().images, np.zeros((5, 6)), np.zeros((5, 7)), "")


def test_a_file_that_cannot_be_finished_leaves_the_old_one(tmp_path):
    write_demos(tmp_path / "a.hdf5", [demo(1)])

    def broken():
        yield demo(2)
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        write_demos(tmp_path / "a.hdf5", broken())
    assert seeds(tmp_path / "a.hdf5") == [1] and len(list(tmp_path.iterdir())) == 1


def test_merging_keeps_each_seed_once(tmp_path):
    for name, members in {"a": [1, 2], "b": [2], "c": [5]}.items():
        write_demos(tmp_path / name, [demo(seed) for seed in members])
    assert merge_demos([tmp_path / "a", tmp_path / "b", tmp_path / "c"], tmp_path / "a") == 3
    assert seeds(tmp_path / "a") == [1, 2, 5]
    assert_same(list(read_demos(tmp_path / "a"))[2], demo(5))


@pytest.mark.parametrize("side", [33, *at_night(32)])
def test_pack_round_trip(tmp_path, side):
    demos = [demo(0, side=side), demo(1, steps=9, side=side)]
    write_demos(tmp_path / "a.hdf5", demos)
    report = pack([tmp_path / "a.hdf5"], tmp_path / "a.zip")
    assert [(p.seed, p.steps) for p in report] == [(0, 5), (1, 9)]
    assert min(min(p.psnr.values()) for p in report) > 30
    for written, read in zip(demos, read_packed(tmp_path / "a.zip"), strict=True):
        assert_same(written, read, images=False)
        assert read.images["observation/image"].shape == written.images["observation/image"].shape
    assert [entry["seed"] for entry in packed_index(tmp_path / "a.zip")] == [0, 1]
    (one,) = read_packed(tmp_path / "a.zip", size=16, only=[1])
    assert one.seed == 1 and one.images["observation/image"].shape == (9, 16, 16, 3)


def test_frames_of_every_third_step_survive_both_formats(tmp_path):
    sparse = demo(every=3)
    assert len(sparse) == STEPS and len(sparse.images["observation/image"]) == -(-STEPS // 3)
    write_demos(tmp_path / "a.hdf5", [sparse])
    assert_same(sparse, next(read_demos(tmp_path / "a.hdf5")))
    pack([tmp_path / "a.hdf5"], tmp_path / "a.zip")
    assert_same(sparse, next(read_packed(tmp_path / "a.zip")), images=False)
    with pytest.raises(ValueError, match="not a demonstration"):
        dataclasses.replace(sparse, every=1)


def test_a_video_with_another_number_of_frames_is_refused():
    frames = demo().images["observation/image"]
    with pytest.raises(ValueError, match="5 frames where 6"):
        demonstrations._decode(demonstrations._encode(frames, 20), (6, *frames.shape[1:]))


# ------------------------------------------------------------------------------------------------------ the collector


@pytest.fixture(scope="module")
def collector():
    spec = importlib.util.spec_from_file_location("collect_demos", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["collect_demos"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["collect_demos"]


def worker(tmp_path, body: str) -> list[str]:
    """A worker whose answer to a job is made by `body`; it notes the seeds it was given."""
    file, jobs = tmp_path / "worker.py", tmp_path / "jobs"
    template = tmp_path / "template.hdf5"
    write_demos(template, [demo(0)])
    code = f"""
        import json, os, pathlib, shutil, sys, h5py
        def succeed(job):
            path = pathlib.Path(job["path"])
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy({str(template)!r}, path)
            with h5py.File(path, "a") as file:
                file["data/demo_0"].attrs["seed"] = job["seed"]
            return {{"outcome": "success", "steps": 5, "seconds": 0.1}}
        for line in sys.stdin:
            job = json.loads(line)
            seed = job["seed"]
            with open({str(jobs)!r}, "a") as file: print(job["task"], seed, file=file)
            print(json.dumps({body}), flush=True)
    """
    file.write_text(textwrap.dedent(code))
    return [sys.executable, str(file)]


def played(tmp_path) -> list[tuple[int, ...]]:
    return [tuple(map(int, line.split())) for line in (tmp_path / "jobs").read_text().splitlines()]


def args(collector, tmp_path, **other):
    return collector.Args(out=tmp_path / "out", **{"episodes": 3, "workers": 2, **other})


def test_failures_and_errors_are_counted_and_made_up_for(collector, tmp_path):
    body = '{"outcome": "failure", "steps": 9} if seed == 1 else {"outcome": "error", "error": "x"} if seed == 2 else '
    command = worker(tmp_path, body + "succeed(job)")
    assert collector.Collection(args(collector, tmp_path), {6: "a", 7: "b"}, command).run()
    folder = tmp_path / "out" / "libero_object"
    for name in "ab":
        assert sorted(seeds(folder / f"{name}_demo.hdf5")) == [0, 3, 4]
        assert not (folder / name).exists()
    log = collector.read_log(folder / "attempts.jsonl")
    assert sorted(entry["outcome"] for entry in log) == ["error"] * 2 + ["failure"] * 2 + ["success"] * 6
    assert all({"task", "seed", "outcome"} <= set(entry) for entry in log)


def test_episodes_that_the_leading_policy_solves_are_no_failures(collector, tmp_path):
    command = worker(tmp_path, '{"outcome": "solved"} if seed < 20 else succeed(job)')
    led = args(collector, tmp_path, led_by="embedded")
    assert collector.Collection(led, {6: "a"}, command).run()
    assert sorted(seeds(tmp_path / "out" / "libero_object" / "a_demo.hdf5")) == [20, 21, 22]
    command = worker(tmp_path, '{"outcome": "solved"}')
    assert not collector.Collection(led, {7: "b"}, command).run()  # it needs no help, and that comes to an end
    assert collector.Collection(args(collector, tmp_path, led_by="embedded", episodes=1), {6: "a"}, command).run()
    with pytest.raises(SystemExit, match="led_by"):
        collector.Collection(args(collector, tmp_path), {6: "a"}, command)


def test_a_second_run_goes_on_where_the_first_was(collector, tmp_path):
    command = worker(tmp_path, '{"outcome": "failure"} if seed == 0 else succeed(job)')
    assert collector.Collection(args(collector, tmp_path), {6: "a"}, command).run()
    before = played(tmp_path)
    folder = tmp_path / "out" / "libero_object"
    # an episode that was finished when everything was killed, and a line of the log that was not
    write_demos(folder / "a" / "4.hdf5", [demo(4)])
    with (folder / "attempts.jsonl").open("a") as file:
        file.write('{"task": 6, "se')
    assert collector.Collection(args(collector, tmp_path, episodes=5), {6: "a"}, command).run()
    assert sorted(played(tmp_path)) == [*sorted(before), (6, 5)]
    assert sorted(seeds(folder / "a_demo.hdf5")) == [1, 2, 3, 4, 5]
    assert collector.Collection(args(collector, tmp_path, episodes=5), {6: "a"}, command).run()
    assert len(played(tmp_path)) == len(before) + 1


def test_a_worker_that_dies_costs_one_attempt(collector, tmp_path):
    command = worker(tmp_path, "os._exit(9) if seed == 1 else succeed(job)")
    assert collector.Collection(args(collector, tmp_path), {6: "a"}, command).run()
    log = collector.read_log(tmp_path / "out" / "libero_object" / "attempts.jsonl")
    assert [entry["error"] for entry in log if entry["outcome"] == "error"] == ["the worker died, exit code 9"]
    assert sum(entry["outcome"] == "success" for entry in log) == 3


def test_workers_that_always_die_end_the_run(collector, tmp_path, capsys):
    command = worker(tmp_path, "os._exit(9)")
    assert not collector.Collection(args(collector, tmp_path), {6: "a"}, command).run()
    assert "died in a row" in capsys.readouterr().err
    assert len(played(tmp_path)) <= 2 * collector.DEATHS_IN_A_ROW


def test_a_hopeless_task_ends(collector, tmp_path):
    command = worker(tmp_path, '{"outcome": "failure"}')
    assert not collector.Collection(args(collector, tmp_path, episodes=1), {6: "a"}, command).run()
    assert len(played(tmp_path)) <= 13


def test_a_full_disk_ends_the_run_with_what_is_complete(collector, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(collector, "SPACE", 2**80)
    command = worker(tmp_path, "succeed(job)")
    assert not collector.Collection(args(collector, tmp_path, workers=1), {6: "a"}, command).run()
    assert "MiB are free" in capsys.readouterr().err
    assert seeds(tmp_path / "out" / "libero_object" / "a_demo.hdf5") == [0]


def test_other_settings_need_another_folder(collector, tmp_path):
    command = worker(tmp_path, "succeed(job)")
    assert collector.Collection(args(collector, tmp_path, episodes=1), {6: "a"}, command).run()
    with pytest.raises(SystemExit, match="another --out"):
        collector.Collection(args(collector, tmp_path, noise=0.2), {6: "a"}, command)


def test_a_folder_from_before_there_were_pushes_goes_on(collector, tmp_path):
    command = worker(tmp_path, "succeed(job)")
    assert collector.Collection(args(collector, tmp_path, episodes=1), {6: "a"}, command).run()
    file = tmp_path / "out" / "libero_object" / "settings.json"
    settings = json.loads(file.read_text())
    assert settings.pop("pushes") == 0
    file.write_text(json.dumps(settings))
    assert collector.Collection(args(collector, tmp_path, episodes=2), {6: "a"}, command).run()
    with pytest.raises(SystemExit, match="another --out"):
        collector.Collection(args(collector, tmp_path, pushes=3.0), {6: "a"}, command)
