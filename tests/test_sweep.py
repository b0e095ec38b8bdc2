"""The sweep: which cells there are, that finished ones are skipped, and that every shard enters the report."""

import dataclasses

import pytest
from toy_records import CONFIGURATION, record

from safe_pruner_jax.cli import main as cli
from safe_pruner_jax.cli import sweep
from safe_pruner_jax.cli.arguments import parse
from safe_pruner_jax.cli.evaluate import Evaluate
from safe_pruner_jax.evaluation.records import RecordFile, RecordsError, read_records
from safe_pruner_jax.pruners import PRUNERS

pytestmark = pytest.mark.newest


def player(played: list[str], codes: dict[str, int] | None = None):
    """Writes the records that `openpi evaluate` would; every second trial succeeds."""

    def play(args, cell) -> int:
        played.append(cell.name)
        if cell.name in (codes or {}):
            return codes[cell.name]
        asked, method = parse(Evaluate, sweep.arguments(args, cell), "openpi evaluate")
        configuration = asked.describe("LIBERO", asked.fit("LIBERO", method))
        part, parts = map(int, args.shard.split("/"))
        trials = range(args.trials * (part - 1) // parts, args.trials * part // parts)
        with RecordFile(sweep.records_file(args, cell), configuration) as file:
            for trial in trials:
                outcome = "success" if trial % 2 else "failure"
                file.append(record(trial, outcome, configuration))
        return 0

    return play


def test_a_cell_is_a_pruner_with_arguments_that_evaluate_takes():
    made = sweep.cells(sweep.Sweep(keeps=(0.3, 0.1)))
    assert len(made) == 1 + 5 * 2 and made[0].name == "full" and len({cell.name for cell in made}) == 11
    found = set()
    for cell in made:
        _, method = parse(Evaluate, ["--suite", "libero_object", *cell.arguments], "openpi evaluate")
        pruner = method.make()
        assert pruner.name in PRUNERS
        found.add((pruner.name, *sorted(method.choices.items())[:1]) if pruner.plan.cut else ("full",))
        if pruner.plan.cut:
            assert cell.name.endswith(f"keep{pruner.plan.cut.keep:g}")
        given = method.choices
        assert (given.get("fuse") == 0.0) == ("shallow" in cell.name)
        assert (given.get("every") == 10) == ("every" in cell.name)
    names = sweep.MEMORYLESS
    _, *warm = sweep.cells(sweep.Sweep(methods=tuple(f"{name}-warm" for name in names), keeps=(0.2,)))
    for name, cell in zip(names, warm, strict=True):
        _, method = parse(Evaluate, ["--suite", "libero_object", *cell.arguments], "openpi evaluate")
        assert method.make().name == name and method.choices["warm_start"] == 3
    _, tuned, *grid = sweep.cells(sweep.Sweep(methods=("safe:keep=0.3,warm_start=1", "fastv:cut=2"), keeps=(0.2, 0.1)))
    _, method = parse(Evaluate, ["--suite", "libero_object", *tuned.arguments], "openpi evaluate")
    assert (method.choices["keep"], method.choices["warm_start"]) == (0.3, 1)
    assert [cell.name for cell in grid] == ["fastv-cut2-keep0.2", "fastv-cut2-keep0.1"]


def test_choices_that_are_several_values_are_told_as_in_an_analysis():
    text = "safe:late_layers=(0,-1),grippers=(6,),keep=0.4"
    _, cell = sweep.cells(sweep.Sweep(methods=(text,), keeps=(0.2,)))
    _, method = parse(Evaluate, ["--suite", "libero_object", *cell.arguments], "openpi evaluate")
    assert (method.choices["late_layers"], method.choices["grippers"]) == ((0, -1), (6,))
    assert cell.name == "safe-late_layers0_-1-grippers6-keep0.4"


def test_a_wrong_choice_is_told_before_the_first_episode(tmp_path):
    played = []
    run = lambda *methods: sweep.run(sweep.Sweep(methods=methods, keeps=(0.2,), out=tmp_path), player(played))
    with pytest.raises(
        ValueError,
        match=r"methods: expected NAME:choice=value,… with choices of safe \(keep, cut, .*\), got safe:kep=0.3",
    ):
        run("fastv", "safe:kep=0.3")
    with pytest.raises(ValueError, match=r"fuse: expected λ in \[0, 1\], got 7"):
        run("fastv", "safe:fuse=7")
    assert not played


def test_finished_cells_are_skipped_and_all_shards_are_reported(tmp_path, capsys):
    options = {"tasks": (0,), "trials": 4, "keeps": (0.5, 0.2), "methods": ("safe", "fastv"), "out": tmp_path}
    names = ["full", "safe-keep0.5", "safe-keep0.2", "fastv-keep0.5", "fastv-keep0.2"]
    for shard, left in (("1/2", 2), ("2/2", 2)):
        args, played = sweep.Sweep(**options, shard=shard), []
        assert sweep.run(args, player(played)) == 0 and played == names
        assert capsys.readouterr().out.count(f"{left} episodes to play") == len(names)
        assert sweep.run(args, player(played)) == 0 and played == names
        assert capsys.readouterr().out.count(": finished\n") == len(names)
    report = (tmp_path / "report.md").read_text()
    assert report.count("| 4 |") >= len(names)  # episodes of both shards together
    assert (tmp_path / "success_by_keep.png").stat().st_size > 5000
    with (tmp_path / "full.1-of-2.jsonl").open("rb+") as file:
        file.truncate(file.seek(0, 2) - 20)  # a torn record is played again
    assert sweep.missing(sweep.Sweep(**options, shard="1/2"), sweep.Cell("full", ())) == 1
    assert len(read_records(tmp_path / "full.1-of-2.jsonl")) == 1
    other = sweep.Sweep(**options, shard="2/2", evaluate="policy:embedded --num-steps 5")
    with pytest.raises(RecordsError, match="num_steps: 10 → 5"):
        sweep.run(other, player([]))


def test_a_cell_that_fails_stops_the_sweep_and_the_next_run_goes_on_there(tmp_path, capsys):
    args = sweep.Sweep(tasks=(0,), trials=1, keeps=(0.5,), methods=("safe", "random"), out=tmp_path)
    played: list[str] = []
    assert sweep.run(args, player(played, {"safe-keep0.5": 130})) == 130
    assert played == ["full", "safe-keep0.5"] and "exit code 130" in capsys.readouterr().err
    played.clear()
    assert sweep.run(args, player(played)) == 0 and played == ["safe-keep0.5", "random-keep0.5"]


def test_a_report_of_nothing_says_so(tmp_path, capsys):
    assert cli.main(["sweep", "--methods", "saef", "--tasks", "0", "--out", str(tmp_path)]) == 2
    assert "methods: expected some of safe" in capsys.readouterr().err
    assert cli.main(["sweep", "--out", str(tmp_path), "--report-only"]) == 2
    assert "openpi sweep: out: expected records" in capsys.readouterr().err


def test_a_cluster_and_the_place_in_a_job_array_reach_every_cell(tmp_path, monkeypatch):
    for name, value in (("ID", "12"), ("MIN", "10"), ("COUNT", "3"), ("STEP", "1")):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    args = sweep.Sweep(out=tmp_path, shard="slurm", on="ray", address="auto", policies=2)
    cell = sweep.cells(args)[1]
    assert sweep.records_file(args, cell).name == "safe-keep0.5.3-of-3.jsonl"
    asked, _ = parse(Evaluate, sweep.arguments(args, cell), "openpi evaluate")
    assert (asked.shard, asked.on, asked.address, asked.policies, asked.simulators) == ("3/3", "ray", "auto", 2, None)


def test_shards_of_one_run_must_be_of_one_configuration(tmp_path, capsys):
    other = dataclasses.replace(CONFIGURATION, checkpoint="ffffffffffff")
    files = [tmp_path / f"safe.{part}-of-3.jsonl" for part in (1, 2, 3)]
    for path, configuration, trial in zip(files, (CONFIGURATION, CONFIGURATION, other), range(3), strict=True):
        with RecordFile(path, configuration) as file:
            file.append(record(trial, configuration=configuration))
    assert cli.main(["report", *map(str, files[:2])]) == 0
    said = capsys.readouterr()
    assert "| 2 | 0 |" in said.out and "parts 3 of 3 are not there" in said.err
    assert cli.main(["report", *map(str, files)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "safe.3-of-3.jsonl: another configuration than" in error and "0123456789ab → ffffffffffff" in error


@pytest.mark.parametrize("shard", ["half", "1-2", "slurm"])
def test_a_shard_that_is_none_is_one_line(shard, capsys, monkeypatch):
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    assert cli.main(["sweep", "--shard", shard]) == 2
    assert "openpi sweep: shard: expected" in capsys.readouterr().err
