"""The script that asks whether a policy looks and listens: what it shows and says in each of its probes."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytestmark = pytest.mark.newest

SCRIPT = Path(__file__).parents[1] / "scripts" / "probe_sight.py"


@pytest.fixture
def sight(monkeypatch):
    """The script, whose episodes only tell what they were given."""
    spec = importlib.util.spec_from_file_location("probe_sight", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "probe_sight", module)
    spec.loader.exec_module(module)
    module.played = []

    def play(env, policy, trial, replan, *, target=None, pictures=lambda _, own: own):
        shown = [{"camera": np.full(2, 10 * trial + call)} for call in range(2)]
        module.played.append((trial, target, [pictures(call, shown[min(call, 1)])["camera"][0] for call in range(3)]))
        return target is None, 30, shown

    monkeypatch.setattr(module, "play", play)
    monkeypatch.setattr(module, "another", lambda env, trial: f"thing_{trial}")
    return module


def test_each_probe_changes_what_it_says_and_nothing_else(sight):
    env, args = SimpleNamespace(task=SimpleNamespace(index=4)), sight.Args(trials=3)
    rows = list(sight.probe(env, None, args, lambda name, trial: trial == 2))
    assert [(row["probe"], row["task"], row["trial"]) for row in rows] == [(name, 4, 2) for name in sight.PROBES]
    assert [row["success"] for row in rows] == [True, True, True, False]
    assert rows[3]["target"] == "thing_2" and rows[0]["target"] is None
    assert sight.played == [
        (2, None, [20, 21, 21]),
        (2, None, [0, 0, 0]),
        (0, None, [0, 1, 1]),  # the stranger's pictures are those of the next trial, which has to be played
        (2, None, [0, 1, 1]),
        (2, "thing_2", [20, 21, 21]),
    ]


def test_the_table_has_shares_with_intervals(sight):
    rows = [{"probe": "own", "success": k < 9} for k in range(10)] + [{"probe": "black", "success": False}] * 10
    text = sight.table(rows)
    assert "| own | 9 of 10 | 90% [60%, 98%] |" in text
    assert "| black | 0 of 10 | 0% [0%, 28%] |" in text


def test_a_finished_run_plays_nothing_and_one_trial_is_refused(sight, tmp_path, capsys, monkeypatch):
    opened = []
    monkeypatch.setattr(sight, "load_policy", lambda *_: None)
    monkeypatch.setattr(sight, "checkpoint_fingerprint", lambda folder, note: "abc")
    monkeypatch.setattr(sight, "load_task", lambda *place: place)

    class Env(SimpleNamespace):
        def __enter__(self):
            opened.append(self.task.index)
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(sight, "open_env", lambda place: Env(task=SimpleNamespace(index=place[1])))
    args = sight.Args(tasks=(1, 2), trials=2, out=tmp_path / "sight.jsonl")
    assert sight.main(args) == 0
    count = len(sight.played)
    rows = [json.loads(line) for line in args.out.read_text().splitlines()]
    assert len(rows) == 2 * 2 * 4 and {row["checkpoint"] for row in rows} == {"abc"}
    assert sight.main(args) == 0 and len(sight.played) == count
    assert "| own | 4 of 4 |" in capsys.readouterr().out
    assert sight.main(sight.Args(trials=1)) == 2
    assert "expected at least 2" in capsys.readouterr().err
