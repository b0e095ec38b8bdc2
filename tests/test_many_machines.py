"""What many machines need beside Ray: the planning script, the example configurations, words where Ray is missing."""

import dataclasses
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tyro
import yaml

from safe_pruner_jax.cli import main as cli
from safe_pruner_jax.cli.arguments import parse
from safe_pruner_jax.cli.evaluate import Evaluate
from safe_pruner_jax.cli.serve import Serve
from safe_pruner_jax.cli.sweep import Sweep

pytestmark = pytest.mark.newest

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "docs" / "cluster"


@pytest.fixture(scope="module")
def planner():
    """The script."""
    spec = importlib.util.spec_from_file_location("plan_fleet", ROOT / "scripts" / "plan_fleet.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["plan_fleet"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["plan_fleet"]


@pytest.fixture
def plan(planner):
    """Ten milliseconds per request and nothing else, one robot per step, no keyframes."""
    costs = planner.Costs("a test", 10.0, 0.0, 0.0, 0.0, 0.0, 1, 0.0, 1e-6, 0.0)
    return planner.Plan(costs, request_kb=1e-6, wire_ms=0.0, delay_ms=0.0, jitter=0.0, seconds=10.0)


# --- the planning table ------------------------------------------------------------------------------------


def test_a_queue_serves_one_after_the_other(planner):
    rng = np.random.default_rng(0)
    arrivals, free, expected = np.sort(rng.random(50)), 0.0, []
    for arrival in arrivals:
        free = max(arrival, free) + 0.02
        expected.append(free)
    np.testing.assert_allclose(planner.queue(arrivals, 0.02), expected)
    mixed, group = rng.permutation(arrivals), rng.integers(0, 3, 50)
    left = planner.queues(mixed, group, 0.02)
    for one in range(3):
        np.testing.assert_allclose(np.sort(left[group == one]), planner.queue(np.sort(mixed[group == one]), 0.02))


def test_steps_are_joined_as_the_server_joins_them(planner, plan):
    costs = dataclasses.replace(plan.costs, limit=4, pruned_row_ms=1.0, keyframe_ms=20.0, keyframe_row_ms=5.0)
    assert costs.step_s(3, 0) == pytest.approx(0.013)  # padded to four rows
    assert costs.step_s(1, 2) == pytest.approx(0.010 + 0.025)
    arrivals, keyframes = [0.0, 0.001, 0.002, 0.020, 0.0205, 0.021, 0.0215, 0.0216], [False] * 8
    answered, busy = planner.steps(arrivals, keyframes, costs, robots=8, delay_s=0.002)
    # three gather for 2 ms; four fill a step and wait for no more; the last one waits for that step
    np.testing.assert_allclose(answered, [0.015] * 3 + [0.0345] * 4 + [0.0445])
    assert busy == pytest.approx(0.013 + 0.013 + 0.010)
    alone, _ = planner.steps([0.0, 1.0], [False, True], costs, robots=1, delay_s=0.005)
    np.testing.assert_allclose(alone, [0.010, 1.020])


def test_the_fewest_accelerators_are_those_that_the_load_needs(planner, plan):
    waited, load = planner.simulate(plan, planner.Case(1, 1, 10, 10, "each"))
    np.testing.assert_allclose(waited, 0.010, atol=1e-6)
    assert load["accelerator"] == pytest.approx(0.1, rel=0.02)
    # 100 robots at 5 Hz are 500 steps of 10 ms per second: five accelerators without any slack, and no answer late
    row = planner.smallest(plan, 100, 5, 10, "each")
    assert row["accelerators"] in (5, 6) and row["p99_ms"] <= 200
    assert not planner.enough(plan, planner.Case(100, 4, 5, 10, "each"))[0]
    assert row == planner.smallest(plan, 100, 5, 10, "each")  # seeded
    tight = dataclasses.replace(plan, within=0.1)
    assert planner.smallest(tight, 100, 5, 10, "each")["accelerators"] > row["accelerators"]


def test_what_no_number_of_accelerators_mends_is_named(planner, plan):
    slow = dataclasses.replace(plan, costs=dataclasses.replace(plan.costs, pruned_ms=300.0))
    assert planner.smallest(slow, 3, 5, 10, "each")["breaks"] == "a step alone is too long"
    wide = dataclasses.replace(plan, request_kb=301.0)
    row = planner.smallest(wide, 100, 10, 1, "head")  # 2.4 Gbit/s
    assert row["accelerators"] is None and row["breaks"] == "network" and row["network_load"] == pytest.approx(2.408)
    busy = dataclasses.replace(plan, costs=dataclasses.replace(plan.costs, front_ms=2.0))
    assert planner.smallest(busy, 100, 10, 10, "head")["breaks"] == "proxy"
    assert planner.smallest(busy, 100, 10, 10, "each")["accelerators"] is not None
    assert planner.most(busy, 1)["proxy"] == 500


def test_the_command_writes_tables_and_a_record(planner, tmp_path, capsys):
    out = tmp_path / "plan.json"
    planner.main(["pi05-h100", "--robots", "1", "4", "--hz", "10", "--seconds", "3", "--out", str(out)])
    said, record = capsys.readouterr().out, json.loads(out.read_text())
    assert said.count("| robots | 1 GbE, 10 Hz | 10 GbE, 10 Hz |") == 2 and "MODELLED" in said
    assert len(record["rows"]) == 8 and all(row["accelerators"] == 1 for row in record["rows"])
    assert record["settings"]["costs"]["pruned_ms"] == planner.H100.pruned_ms and record["settings"]["seed"] == 0


# --- the examples ------------------------------------------------------------------------------------------


def documents(name):
    return list(yaml.safe_load_all((EXAMPLES / name).read_text(encoding="utf-8")))


def commands(name):
    """Every command line of `openpi` in an example, comments included."""
    text = re.sub(r"\\\n\s*|\n\s+(?=--)", " ", (EXAMPLES / name).read_text(encoding="utf-8"))
    text = text.replace("$((SLURM_CPUS_PER_TASK - 1))", "7").replace("$RAY_ADDRESS", "head:6379")
    return [shlex.split(line) for line in re.findall(r"(?<![\w/-])openpi ((?:serve|sweep|evaluate) .*)", text)]


def test_ray_takes_the_configuration_of_a_cluster():
    (config,) = documents("ray.yaml")
    assert set(config) >= {"cluster_name", "provider", "auth", "head_start_ray_commands", "worker_start_ray_commands"}
    assert config["max_workers"] == len(config["provider"]["worker_ips"])
    starts = [config[f"{kind}_start_ray_commands"][-1] for kind in ("head", "worker")]
    assert "--head" in starts[0] and "--address=$RAY_HEAD_IP:6379" in starts[1]


@pytest.mark.ray
def test_ray_validates_the_configuration_of_a_cluster():
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(documents("ray.yaml")[0]))


def test_the_objects_of_kuberay_belong_together():
    job, service = documents("kuberay.yaml")
    assert (job["apiVersion"], job["kind"], service["kind"]) == ("ray.io/v1", "RayJob", "Service")
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    containers = [group["template"]["spec"]["containers"][0] for group in groups]
    for group, container in zip(groups, containers, strict=True):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())  # or KubeRay refuses it
        assert container["image"] == containers[0]["image"]
        assert container["env"][0]["name"] == "OPENPI_API_KEY"
    (worker,) = cluster["workerGroupSpecs"]
    assert worker["template"]["metadata"]["labels"].items() >= service["spec"]["selector"].items()
    ports = {port["name"]: port["containerPort"] for port in containers[1]["ports"]}
    args, _ = parse(Serve, shlex.split(job["spec"]["entrypoint"])[2:], "openpi serve")
    assert args.port == ports[service["spec"]["ports"][0]["targetPort"]]
    assert int(args.replicas) == worker["replicas"]  # a proxy on every pod that the balancer knows
    assert worker["template"]["spec"]["terminationGracePeriodSeconds"] > args.serving.drain_s + 10


@pytest.mark.parametrize("name", ["kuberay.yaml", "slurm_ray.sh", "slurm_array.sh"])
def test_the_commands_of_the_examples_exist(name):
    found = commands(name)
    assert found
    for command, *arguments in found:
        if command == "sweep":
            args = tyro.cli(Sweep, args=arguments)
            parse(Evaluate, [*shlex.split(args.evaluate), "--suite", args.suite, "--pruner=safe"], "openpi evaluate")
        else:
            parse({"serve": Serve, "evaluate": Evaluate}[command], arguments, f"openpi {command}")


@pytest.mark.parametrize("name", ["slurm_ray.sh", "slurm_array.sh"])
def test_the_scripts_are_scripts(name):
    checked = subprocess.run(["bash", "-n", EXAMPLES / name], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    text = (EXAMPLES / name).read_text(encoding="utf-8")
    assert text.startswith("#!/bin/bash") and "#SBATCH" in text


# --- without Ray -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(
            [
                "evaluate",
                "--suite",
                "libero_object",
                "--tasks",
                "0",
                "--trials",
                "1",
                "--pruner=full",
                "policy:embedded",
            ],
            marks=[pytest.mark.libero, pytest.mark.filterwarnings("default")],  # LIBERO's own
        ),
        ["serve", "--pruner=full", "policy:embedded"],
    ],
)
def test_without_ray_one_line_says_what_to_install(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "ray", None)  # what an import then meets is an ImportError
    command, *rest = command
    assert cli.main([command, "--on", "ray", *rest]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert (
        error[-1].startswith(f"openpi {command}: ") and "pip install 'safe-pruner-jax[ray]', on every node" in error[-1]
    )


def test_replicas_that_are_none_are_one_line(capsys):
    assert cli.main(["serve", "--on", "ray", "--replicas", "3..1", "--pruner=full", "policy:embedded"]) == 2
    assert "replicas: expected N, or LEAST..MOST" in capsys.readouterr().err.splitlines()[-1]
