"""What README and docs show runs: Python blocks, imports, commands of `openpi`, names of scripts."""

import ast
import contextlib
import importlib
import io
import re
import shlex
from pathlib import Path

import numpy as np
import openpi_standin
import pytest

from safe_pruner_jax import get_config, load_policy
from safe_pruner_jax.cli import main as cli

pytestmark = pytest.mark.newest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def lines(page: Path) -> list[str]:
    """The commands of a page's bash blocks, one line each and without comments."""
    joined = "\n".join(blocks(page, "bash")).replace("\\\n", " ")
    return [line.partition(" #")[0].strip() for line in joined.splitlines() if line and not line.startswith("#")]


def spans(page: Path) -> list[str]:
    """Commands in running text that name an option or a policy."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    found = (" ".join(span.split()) for span in re.findall(r"`(openpi [^`]+)`", text))
    return [span for span in found if " --" in span or " policy:" in span]


def openpi(page: Path) -> list[str]:
    """The arguments of every complete command of `openpi` on a page."""
    commands = [line.removeprefix(".venv/bin/") for line in lines(page)] + (spans(page) if page == README else [])
    return [c.removeprefix("openpi ") for c in commands if c.startswith("openpi ") and "…" not in c]


def test_readme_is_short():
    assert len(README.read_text(encoding="utf-8").split()) <= 700


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_names_that_are_imported_exist(page):
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in ("safe_pruner_jax", "openpi_patch"):
                module = importlib.import_module(node.module)
                assert [name.name for name in node.names if not hasattr(module, name.name)] == [], node.module


@pytest.mark.parametrize("page", [page for page in PAGES if openpi(page)], ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_understood(page, monkeypatch, capsys):
    quiet = {name: command._replace(run=lambda *_: 0) for name, command in cli.COMMANDS.items()}
    monkeypatch.setattr(cli, "COMMANDS", quiet)
    for command in openpi(page):
        try:
            code = cli.main(shlex.split(command))
        except SystemExit as e:
            code = e.code
        assert code == 0, f"openpi {command}\n{capsys.readouterr()}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_scripts_exist(page):
    named = re.findall(
        r"(?:python|bash) ((?:scripts|benchmarks|docs)/\S+\.(?:py|sh))", page.read_text(encoding="utf-8")
    )
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_every_decision_is_listed():
    pages = {page.name for page in (ROOT / "docs" / "decisions").glob("[0-9]*.md")}
    listed = re.findall(r"\[(\d{4})\]\((\1-[^)]+)\)", (ROOT / "docs" / "decisions" / "README.md").read_text("utf-8"))
    assert pages == {name for _, name in listed} and len(pages) == len({number for number, _ in listed})


def test_python_of_the_readme():
    example = get_config("mini_libero").robot.example(np.random.default_rng(0))
    asked = example | {"prompt": "pick up the cream cheese"}
    session, patch, pruner = blocks(README, "python")
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(session, {"request": asked})
    assert re.fullmatch(r"\(10, 7\) \d+\n", said.getvalue())

    names = {"policy": openpi_standin.Policy()}
    given = names["policy"]
    exec(patch, names)
    assert names["policy"] is not given and callable(names["policy"].infer)

    exec(pruner, names)
    assert len([line for line in pruner.splitlines() if line]) <= 12
    mine = load_policy("mini_libero", pruner=names["mine"]()).session()
    told = mine.infer(asked)["pruning"]
    assert told["kept"] == round(0.2 * told["alive"]) and not told["keyframe"]
