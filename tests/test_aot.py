"""Compiling for GPUs that are not there: targets, the modelled time, and a guard on the number of launches."""

import dataclasses
import json
import subprocess
from importlib import util

import jax
import pytest
from kernel_programs import by_kernel

from safe_pruner_jax.bench import aot
from safe_pruner_jax.bench import launches as counted
from safe_pruner_jax.bench.hlo import Cost, parse
from safe_pruner_jax.bench.measure import Bench
from safe_pruner_jax.bench.modelled import Assumptions, launch_time, sequence_time
from safe_pruner_jax.bench.targets import FOLDER, TargetError, known, target
from safe_pruner_jax.bench.thunks import Launch, Sequence, sequence
from safe_pruner_jax.engine import xla
from safe_pruner_jax.robots.configs import get_config

pytestmark = pytest.mark.newest


def test_every_target_has_what_a_model_of_time_needs_and_its_sources():
    assert set(known()) == {"h100", "h200", "orin", "rtx4090", "rtx5090", "thor"}
    for name in known():
        gpu = target(name)
        assert gpu.bytes_per_s > 1e11 and gpu.macs_per_s("bfloat16") * 2 == gpu.flops_per_s["bfloat16"]
        assert len(gpu.sources) >= 2


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda d: d.pop("multiprocessors"), "gpu.json has no field multiprocessors"),
        (lambda d: d.update(tensor_cores=4), "unknown field tensor_cores"),
        (lambda d: d.update(bytes_per_s=0), "bytes_per_s: expected a positive number, got 0"),
        (lambda d: d["flops_per_s"].pop("bfloat16"), "no rate of bfloat16"),
    ],
)
def test_a_target_that_is_wrong_is_told_in_a_line(change, told, tmp_path):
    data = json.loads((FOLDER / "h100.json").read_text())
    change(data)
    (tmp_path / "gpu.json").write_text(json.dumps(data))
    with pytest.raises(TargetError, match=told) as caught:
        target("gpu", tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(TargetError, match="target b200: expected one of gpu"):
        target("b200", tmp_path)


def test_a_launch_takes_the_longest_of_its_least_time_its_bytes_and_its_products():
    gpu, assumed = target("h100"), Assumptions(least_us=2.0)
    launch = Launch("kernel", "small", None, Cost(0, 0))
    assert launch_time(launch, gpu, assumed).launch == pytest.approx(2e-6)
    moves = dataclasses.replace(launch, cost=Cost(bytes=3_350_000_000, macs=0))
    assert launch_time(moves, gpu, assumed).memory == pytest.approx(1e-3)
    multiplies = dataclasses.replace(launch, cost=Cost(bytes=0, macs=494_500_000_000), times=2)
    assert launch_time(multiplies, gpu, assumed).products == pytest.approx(2e-3)
    few = dataclasses.replace(moves, blocks=33)  # a quarter of the chip
    assert launch_time(few, gpu, assumed).memory == pytest.approx(4e-3)
    run = Sequence(outside=[launch], loop=[launch, moves], turns=10)
    assert run.total == 21 and sequence_time(run, gpu, assumed).total == pytest.approx(2e-6 + 10 * (2e-6 + 1e-3))


def test_the_ladder_begins_with_openpi_and_ends_with_pruned_steps():
    launch = Launch("kernel", "small", None, Cost(0, 0))

    def report(count, *more):
        done = aot.Compiled(Sequence([launch] * count), argument_bytes=0, temporary_bytes=0, seconds=0.0)
        names = ("decision, safe", "full, safe", "pruned, safe 0.2", *more)
        programs = {name: counted.row(done, target("h100"), "bfloat16") for name in names}
        return {"targets": {"h100": {"programs": programs}}}

    figure = counted.ladder({"before": report(20), "after": report(10, "openpi")}, "h100")
    (axes,) = figure.axes
    told = [label.get_text() for label in axes.get_yticklabels()]
    assert told == ["openpi", *(f"{c}: {s}" for s in ("full, safe", "pruned, safe 0.2") for c in ("before", "after"))]
    assert [text.get_text() for text in axes.texts][1:3] == [" 0.1 ms, 40 launches", " 0.0 ms, 20 launches"]


def test_without_the_plugin_or_with_another_one_a_line_says_what_to_install(monkeypatch):
    def absent(name):
        raise aot.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(aot.metadata, "version", absent)
    with pytest.raises(TargetError, match=r"got none; pip install 'safe-pruner-jax\[aot\]'"):
        aot.device(target("h100"))
    monkeypatch.setattr(aot.metadata, "version", lambda _: "0.0.1")
    with pytest.raises(TargetError, match=f"expected jax-cuda12-plugin {jax.__version__} as jax, got 0.0.1"):
        aot.device(target("h100"))


def test_a_chip_that_ends_the_compiler_is_told_in_a_line(monkeypatch):
    """LLVM aborts the process where it does not know a chip."""
    said = "E1130 gpu_compiler.cc] LLVM Fatal Error Reason: PTX version 8.8 does not support target 'sm_110'.\n*** x\n"
    ended = lambda *_, **how: subprocess.CompletedProcess([], -6, "", said)
    monkeypatch.setattr(aot.metadata, "version", lambda _: jax.__version__)
    monkeypatch.setattr(aot.subprocess, "run", ended)
    with pytest.raises(
        TargetError, match=r"target thor: this jax has no compiler for it \(PTX version 8\.8 does not"
    ) as e:
        aot.device(target("thor"))
    assert "\n" not in str(e.value)


def launch_of(bytes_):
    return Launch("kernel", "small_1", 100, Cost(bytes_, 0))


def done(outside, loop=()):
    s = Sequence(
        list(map(launch_of, outside)), list(map(launch_of, loop)), turns=10 if loop else 0, graphs=[len(outside)]
    )
    return aot.Compiled(s, argument_bytes=sum(outside), temporary_bytes=3, seconds=1.0)


def test_what_does_not_compile_is_a_line_and_the_other_rows_come(monkeypatch):
    """A target without a file, one without a compiler, and a program that finds no tiles on one of the others."""

    def device(to):
        if to.name == "orin":
            raise TargetError("target orin: this jax has no compiler for it (no)")
        return to.name

    def compiled(gpu, program):
        if (gpu, program) == ("rtx4090", "vision"):
            raise TargetError("does not compile for rtx4090: Couldn't find output tile sizes")
        return done([8] * 3)

    monkeypatch.setattr(aot, "device", device)
    monkeypatch.setattr(aot, "programs", lambda *_, **__: {n: n for n in ("vision", "decision", "full", "pruned")})
    monkeypatch.setattr(aot, "compiled", compiled)
    args = Bench(compile_for=("h100", "b200", "orin", "rtx4090"), keeps=(0.2,))
    report = counted.compile_for(args, get_config("pi05_libero").model, lambda what: None)
    rows = report["targets"]
    assert rows["b200"].startswith("target b200: expected one of") and rows["orin"].startswith("target orin: this jax")
    assert set(rows["h100"]["programs"]) == {"vision, safe", "decision, safe", "full, safe", "pruned, safe 0.2"}
    assert set(rows["rtx4090"]["programs"]) == set(rows["h100"]["programs"]) - {"vision, safe"}
    assert rows["rtx4090"]["failed"] == {
        "vision, safe": "does not compile for rtx4090: Couldn't find output tile sizes"
    }
    text = counted.table(report)
    for line in (rows["b200"], rows["orin"], "rtx4090: vision, safe: does not compile for rtx4090"):
        assert sum(line in there for there in text.splitlines()) == 1
    assert text.count("pruned, safe 0.2") == 4  # programs and steps of two targets


def test_few_layers_are_extended_to_the_models(monkeypatch):
    """One layer more has two launches more of 8 bytes; the loop one; π0.5 has 18 layers, its tower 27 blocks."""
    monkeypatch.setattr(aot, "device", lambda to: to)
    names = ("vision", "decision", "pruned")
    monkeypatch.setattr(aot, "programs", lambda config, *_, **__: {name: (name, config) for name in names})

    def compiled(gpu, program):
        name, config = program
        size = config.depth if name == "pruned" else config.vision.depth
        return done([8] * (5 + 2 * size), [16] * size if name == "pruned" else ())

    monkeypatch.setattr(aot, "compiled", compiled)
    args = Bench(compile_for=("h100",), keeps=(0.2,), extend=True)
    report = counted.compile_for(args, get_config("pi05_libero").model, lambda what: None)
    assert "extended" in report["kind"] and "extended" in counted.table(report)
    programs = report["targets"]["h100"]["programs"]
    assert programs["vision, safe"] == counted.row(done([8] * (5 + 2 * 27)), target("h100"), "bfloat16") | {
        "compile_s": 2.0,
        "modelled_s": programs["vision, safe"]["modelled_s"],
    }
    want = counted.row(done([8] * (5 + 2 * 18), [16] * 18), target("h100"), "bfloat16")
    assert programs["pruned, safe 0.2"]["launches"] == want["launches"] == 41 + 180
    assert programs["pruned, safe 0.2"]["modelled_s"]["1.5 µs"] == pytest.approx(want["modelled_s"]["1.5 µs"])


def test_a_switch_is_undone_where_it_changes_a_program(monkeypatch):
    """Of two savings one is in the vision tower alone; the other makes a loop a graph, which only options tell."""
    monkeypatch.setattr(aot, "device", lambda to: to)
    shape = (jax.ShapeDtypeStruct((), "float32"),)

    def programs(config, *_, **__):
        tower = jax.numpy.sin if "vision" in config.savings else jax.numpy.cos
        loop = lambda x: jax.lax.fori_loop(0, 3, lambda i, y: y * 2, x)
        options = {"graph": True} if "graph" in config.savings else {}
        return {"vision": aot.Program(tower, shape, options), "pruned": aot.Program(loop, shape, options)}

    def compiled(gpu, program):
        if program.function is jax.numpy.cos:
            raise TargetError("does not compile for h100: no")
        return done([8] * (2 if program.options else 5))

    monkeypatch.setattr(aot, "programs", programs)
    monkeypatch.setattr(aot, "compiled", compiled)
    args = Bench(compile_for=("h100",), keeps=(0.2,), undo=True)
    config = get_config("pi05_libero").model.replace(savings=("vision", "graph"))
    entry = counted.compile_for(args, config, lambda what: None)["targets"]["h100"]
    assert entry["programs"]["pruned, safe 0.2"]["launches"] == 2
    assert entry["without"]["savings: vision"] == {"vision": "does not compile for h100: no"}
    assert {name: row["launches"] for name, row in entry["without"]["savings: graph"].items()} == {"pruned": 5}


def test_what_the_host_starts():
    """A graph is one start; what is in none, and what a loop does in every turn, is started each time."""
    lines = """\
000: kCommandBuffer [source | sink]
    001: kCustomKernel [source | sink] a grid: [1, 1, 1] threads: [1, 1, 1]
    002: kCustomKernel [source | sink] b grid: [1, 1, 1] threads: [1, 1, 1]
003: kWhile [source | sink]
condition:
    004: kCustomKernel [source | sink] c grid: [1, 1, 1] threads: [1, 1, 1]
  body:
    000: kCommandBuffer [source | sink]
        005: kCustomKernel [source | sink] d grid: [1, 1, 1] threads: [1, 1, 1]
006: kCopy [source | sink] kCopy
"""
    ten = """ENTRY %main (x: f32[]) -> f32[] {
  %w = f32[] while(%x), condition=%c, body=%b, backend_config={"known_trip_count":{"n":"10"}}
}"""
    apart = sequence(lines, {3: "w"}, parse(ten))
    assert (apart.starts, apart.total, apart.loop_in_graph) == (1 + 10 + 1, 2 + 10 * 2 + 1, False)
    inside = "\n".join(["000: kCommandBuffer [source | sink]", *("    " + line for line in lines.splitlines()[3:-1])])
    assert (sequence(inside, {3: "w"}, parse(ten)).starts, sequence(inside, {3: "w"}, parse(ten)).turns) == (1, 10)


# ----------------------------------------------------------------------------------------------------------- the guard

LIMITS = {
    "vision block": 14.0,
    "vision block by a kernel": 9.0,
    "expert layer": 14.0,
    "expert layer by kernels": 5.0,
    "decision": 67.0,
    "decision by kernels": 28.0,
    "denoise step without its layers by kernels": 5.0,
}
"""Launches at most, per unit: what was reached when this was written, and nothing above it (docs/performance.md)."""


@pytest.fixture(scope="module")
def gpu():
    if util.find_spec("jax_cuda12_plugin") is None:
        pytest.skip("jax's CUDA plugin is not installed; `make test-aot` installs it")
    return aot.device(target("h100"))


def launches(gpu, depth, blocks, names, savings=None, kernels=()):
    """Launches of programs of a π0.5 of so many layers and vision blocks, at full width; "pruned" of a denoise step."""
    config = get_config("pi05_libero").model
    config = config.with_depth(depth).replace(vision=dataclasses.replace(config.vision, depth=blocks))
    config = config.replace(savings=xla.savings("gpu") if savings is None else savings, kernels=kernels)
    own = aot.programs(config, num_steps=2)
    runs = {name: aot.compiled(gpu, own[name]).sequence for name in names}
    one_graph = "graph" in config.savings
    assert {name: run.starts == 1 for name, run in runs.items()} == dict.fromkeys(names, one_graph), runs["pruned"]
    counted = lambda name, run: sum(launch.times for launch in run.loop) if name == "pruned" else run.total
    return {name: counted(name, run) for name, run in runs.items()}


@pytest.mark.aot
@pytest.mark.parametrize(("kernels", "how"), [((), ""), (("layer", "vision"), " by kernels")])
def test_launches_per_unit_do_not_rise(gpu, kernels, how):
    low = launches(gpu, 4, 1, ("vision", "before", "decision", "pruned"), kernels=kernels)
    high = launches(gpu, 6, 3, ("vision", "pruned"), kernels=kernels)
    found = {
        "vision block" + (" by a kernel" if kernels else ""): (high["vision"] - low["vision"]) / 2,
        f"expert layer{how}": (high["pruned"] - low["pruned"]) / 2,
        f"decision{how}": low["decision"] - low["before"],
    }
    if kernels:
        found["denoise step without its layers by kernels"] = low["pruned"] - 4 * found[f"expert layer{how}"]
    assert all(found[name] <= LIMITS[name] for name in found), f"expected at most {LIMITS}, got {found}"


@pytest.mark.aot
def test_the_guard_sees_a_program_without_savings(gpu):
    low, high = (launches(gpu, depth, 1, ("pruned",), savings=())["pruned"] for depth in (4, 6))
    assert (high - low) / 2 > LIMITS["expert layer"]


@pytest.mark.aot
@pytest.mark.parametrize("name", known())
def test_every_kernel_becomes_machine_code_of_every_target(name):
    if util.find_spec("jax_cuda12_plugin") is None:
        pytest.skip("jax's CUDA plugin is not installed; `make test-aot` installs it")
    try:
        chip = aot.device(target(name))
    except TargetError as error:
        assert f"target {name}: this jax has no compiler for it" in str(error)
        pytest.skip(str(error))
    for kernel, programs in by_kernel().items():
        for program, shape in programs:
            sequence = aot.compiled(chip, aot.Program(program, (shape,))).sequence
            assert any(
                "_kernel" in launch.name or "attention" in launch.name or "gated" in launch.name
                for launch in sequence.outside
            ), kernel
