"""The notebooks run from top to bottom without simulator or network, and are stored without results."""

import ast
import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiers import by_day
from toy_records import CONFIGURATION, record

from safe_pruner_jax.evaluation.records import RecordFile
from safe_pruner_jax.figures.theme import Table
from safe_pruner_jax.policy import embedded

pytestmark = pytest.mark.newest

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
PICTURES = {"first_step": 1, "where_does_it_look": 5, "forecast_error": 3, "success_against_speed": 4}
PICTURES |= {"your_own_episode": 2}


def code_cells(path: Path) -> list[str]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def run(path: Path) -> tuple[list, str]:
    """Executes the code cells in one namespace, as a kernel would; what the cells show, and what they print."""
    namespace: dict = {"__name__": "__main__"}
    results, printed = [], io.StringIO()
    with contextlib.redirect_stdout(printed):
        for number, source in enumerate(code_cells(path)):
            tree = ast.parse(source, f"{path.name}, code cell {number}")
            last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
            exec(compile(tree, f"{path.name}[{number}]", "exec"), namespace)
            if last is not None:
                results.append(eval(compile(ast.Expression(last.value), f"{path.name}[{number}]", "eval"), namespace))
    return results, printed.getvalue()


def test_the_five_notebooks_are_there():
    assert {path.stem for path in NOTEBOOKS} == set(PICTURES)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_results_and_begins_with_the_install_cell(path):
    book = json.loads(path.read_text(encoding="utf-8"))
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in book["cells"]}) == len(book["cells"])
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert 'find_spec("safe_pruner_jax") is None' in code_cells(path)[0]
    for source in code_cells(path):
        tree = ast.parse(source)  # no magics: cells are Python
        logic = (ast.FunctionDef, ast.ClassDef, ast.While, ast.Try)
        assert not any(isinstance(node, logic) for node in ast.walk(tree)), "logic belongs into the library"
        assert len(source.splitlines()) <= 16


@pytest.mark.parametrize("path", by_day(lambda path: path.stem == "first_step", NOTEBOOKS), ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_pictures(path, tmp_path, monkeypatch):
    records = tmp_path / "sweep"
    for keep in (1, 0.2):
        plan = {"cut": None} if keep == 1 else {"cut": {"layer": 3, "keep": keep}}
        name = "full" if keep == 1 else "safe"
        configuration = type(CONFIGURATION)(**CONFIGURATION.as_json() | {"pruner": name, "choices": {}, "plan": plan})
        with RecordFile(records / f"{name}.jsonl", configuration) as file:
            for trial in range(4):
                file.append(record(trial, "success" if trial % 3 else "failure", configuration))
    monkeypatch.setenv("RECORDS", str(records))
    monkeypatch.setenv("KEEPS", "0.2")  # programs of one share kept take their time to compile
    results, printed = run(path)
    pictures = [result for result in results if isinstance(result, Image.Image)]
    assert len(pictures) == PICTURES[path.stem]
    for picture in pictures:
        assert picture.mode == "RGB" and min(picture.size) > 200
        assert len(np.unique(np.asarray(picture.resize((64, 64))).reshape(-1, 3), axis=0)) > 20
    if path.stem == "first_step":
        assert "keyframe" in printed and embedded.EMBEDDED_WEIGHTS in printed
    if path.stem == "your_own_episode":
        assert "tokens" in printed and ("This episode bears" in printed or "No share kept" in printed)
    if path.stem in ("forecast_error", "success_against_speed"):
        tables = [result for result in results if isinstance(result, Table)]
        assert len(tables) == 2 and all("| --- |" in table for table in tables)


def test_without_records_the_notebook_says_how_to_make_them(tmp_path, monkeypatch):
    monkeypatch.setenv("RECORDS", str(tmp_path))
    *_, load, keep, flops, speed = code_cells(FOLDER / "success_against_speed.ipynb")
    namespace: dict = {}
    *body, last = ast.parse(load).body
    exec(compile(ast.Module(body, []), "load", "exec"), namespace)
    assert "openpi sweep" in eval(compile(ast.Expression(last.value), "load", "eval"), namespace)
    # `picture` was imported by an earlier cell; without records it is not called
    assert all(eval(source, namespace) is None for source in (keep, flops, speed))
