"""The site: it builds without a warning, works without a network, and its commands run or say what they need."""

import html.parser
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tiers import by_day

from safe_pruner_jax.cli import main as cli

pytestmark = pytest.mark.newest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if path.parent.name not in ("decisions", "figures"))
BLOCK = re.compile(r"(?:^<!-- (run|needs: [a-z, ]+) -->\n+)?^```(?:bash|console)\n(.*?)^```", re.DOTALL | re.MULTILINE)
NEEDS = {"checkpoint", "gpu", "cluster", "simulator", "network", "openpi", "viewer", "hours", "minutes"}
NEEDS |= {"a second terminal"}


def settings():
    """mkdocs.yml, as mkdocs reads it; mkdocs is not there where openpi's pins are tested."""
    from mkdocs.config import load_config

    return load_config(str(ROOT / "mkdocs.yml"))


def blocks(page: Path) -> list[tuple[str, list[str]]]:
    """What is said of each block of commands of a page, and its commands."""
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    lines = lambda block: [line.partition(" #")[0].strip() for line in block.replace("\\\n", " ").splitlines()]
    return [(mark, [line for line in lines(block) if line and not line.startswith("#")]) for mark, block in found]


def test_every_command_runs_here_or_says_what_it_needs():
    of_pages = settings().extra["needs"]
    assert {name for name in of_pages if not (DOCS / name).is_file()} == set()
    silent = []
    for page in PAGES:
        whole = of_pages.get(str(page.relative_to(DOCS)))
        for mark, commands in blocks(page):
            said = mark or (f"needs: {whole}" if whole else "")
            silent += [] if said else [f"{page.name}: {commands}"]
            assert said == "run" or set(said.removeprefix("needs: ").split(", ")) - {""} <= NEEDS, (page.name, said)
    assert silent == []


RUN = [(page, command) for page in PAGES for mark, commands in blocks(page) if mark == "run" for command in commands]


def is_quick(case: tuple[Path, str]) -> bool:
    """Analyses compile much; by day `test_words.py` reads their commands, and `test_new_pruner.py` runs its script."""
    return not case[1].startswith(("openpi analyze", "openpi diagnose", "python docs/new_pruner.py"))


@pytest.mark.parametrize(("page", "command"), by_day(is_quick, RUN), ids=lambda value: getattr(value, "stem", value))
def test_commands_that_need_nothing_run(page, command, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    program, *arguments = shlex.split(command)
    if program == "openpi":
        assert cli.main(arguments) == 0, capfd.readouterr().err
    else:
        assert program == "python"
        script = [sys.executable, str(ROOT / arguments[0]), *arguments[1:]]
        done = subprocess.run(script, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        print(done.stdout)
    assert capfd.readouterr().out.strip()


def test_the_pages_that_everybody_reads_have_commands_that_run():
    assert {"start", "your_pruner"} <= {page.stem for page, _ in RUN}


# --- the site as it is built -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, built as `make docs` builds it."""
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    quiet = {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(build, cwd=ROOT, env={**os.environ, **quiet}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


class Loaded(html.parser.HTMLParser):
    """Addresses that a browser fetches by itself to show a page."""

    def __init__(self):
        super().__init__()
        self.addresses = []

    def handle_starttag(self, tag, attrs):
        named = dict(attrs)
        if tag in ("script", "img", "iframe", "source", "video"):
            self.addresses.append(named.get("src") or "")
        if tag == "link" and named.get("rel") in ("stylesheet", "preload", "preconnect", "icon"):
            self.addresses.append(named.get("href") or "")


@pytest.mark.nightly
def test_the_site_needs_nothing_from_elsewhere(site):
    for page in site.rglob("*.html"):
        loaded = Loaded()
        loaded.feed(page.read_text(encoding="utf-8"))
        assert [address for address in loaded.addresses if re.match(r"(https?:)?//", address)] == [], page


@pytest.mark.nightly
def test_search_finds_pages_and_not_the_code(site):
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    places = {entry["location"].partition("#")[0] for entry in index["docs"] if "keyframe" in entry["text"]}
    assert {"method/", "pruners/", "commands/", "api/"} <= places
    assert not any(entry["location"].startswith("source/") for entry in index["docs"])


@pytest.mark.nightly
def test_every_command_and_equation_is_there(site):
    commands = (site / "commands" / "index.html").read_text(encoding="utf-8")
    assert all(f"openpi {name} --help-all" in commands for name in cli.COMMANDS) and "--serving.max-batch" in commands
    method = (site / "method" / "index.html").read_text(encoding="utf-8")
    written = (DOCS / "method.md").read_text(encoding="utf-8")
    assert method.count("<math") == written.count("$$") // 2 + len(re.findall(r"(?<!\$)\$[^$]+\$(?!\$)", written))
    assert 'class="arithmatex"' not in method and "<merror" not in method


def test_every_page_of_docs_is_in_the_navigation():
    named = set(re.findall(r"[\w/]+\.md", json.dumps(settings().nav)))
    assert {str(page.relative_to(DOCS)) for page in PAGES} <= named
    made = {"commands.md", "contributing.md", "changelog.md", "decisions/README.md"}
    assert named - made == {str(page.relative_to(DOCS)) for page in PAGES}


def test_every_figure_is_used_and_has_its_command():
    made = re.findall(r"^\| `([\w.]+)` \|", (DOCS / "figures" / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    there = {path.name for path in (DOCS / "figures").iterdir() if path.suffix != ".md"}
    assert sorted(made) == sorted(there)
    text = "".join(page.read_text(encoding="utf-8") for page in [ROOT / "README.md", *DOCS.rglob("*.md")])
    assert {name for name in there if f"figures/{name})" not in text} == set()
    assert all((DOCS / "figures" / name).stat().st_size < 3_000_000 for name in there)
