"""What mkdocs asks for while it builds the site (`hooks` in mkdocs.yml).

* Pages that are made and not written: the commands (their own help), CONTRIBUTING and CHANGELOG, the decisions' nav.
* Links that leave docs/, to code, rows of results, notebooks: what they point to becomes a part of the site.
* Equations become MathML, which browsers draw by themselves: no script, nothing fetched.
* What a block of commands needs (`<!-- needs: … -->`) is written beside it, and below a figure what makes it.
"""

import contextlib
import html
import io
import logging
import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

import latex2mathml.converter
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

log = logging.getLogger("mkdocs.hooks.site")

ROOT = Path(__file__).parents[1]
SOURCE, FILES = "source", "files"
"""Folders of the site with what lies outside docs/: pages that show it, and the files themselves."""
LANGUAGES = {".py": "python", ".sh": "bash", ".json": "json", ".yml": "yaml", ".toml": "toml", ".proto": "proto"}
LARGEST_PAGE = 60_000
WRITTEN = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
"""Page → file of the root folder that it shows."""

FENCE = re.compile(r"^(`{3,}|~{3,}).*?^\1\s*$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?!\w+:|#|<)([^)\s#]+)(#[^)\s]*)?\)")
FIGURE = re.compile(r"^!\[[^]]*\]\((?:\.\./)*figures/([\w.]+)\)$", re.MULTILINE)
MADE = re.compile(r"^\| `([\w.]+)` \| `([^`]+)` \|", re.MULTILINE)
"""Rows of docs/figures/README.md: a figure and the command that makes it."""
NEEDS = re.compile(r"^<!-- needs: ([a-z, ]+) -->$", re.MULTILINE)
PLAIN = "---\nsearch: {exclude: true}\nhide: [navigation, toc]\n---\n\n"


# --- links that leave docs/ --------------------------------------------------------------------------------


def prose(text: str) -> Iterator[tuple[int, int]]:
    """Spans of a page that are not fenced code."""
    start = 0
    for fence in FENCE.finditer(text):
        yield start, fence.start()
        start = fence.end()
    yield start, len(text)


def origin(page: str) -> str:
    """Folder of the repository that the links of a page start from."""
    return "" if page in WRITTEN else posixpath.dirname(f"docs/{page}")


def place(page: str, link: str) -> str:
    """What a link points to, as a path in the repository."""
    return posixpath.normpath(posixpath.join(origin(page), link))


def address(path: str) -> str:
    """Path in the site's source folder of a file or folder of the repository."""
    if path in WRITTEN.values():
        return next(page for page, file in WRITTEN.items() if file == path)
    if path == "README.md":
        return "index.md"
    if (ROOT / path).is_dir():
        return f"{SOURCE}/{path}/index.md"
    return f"{SOURCE}/{path}.md" if shown(path) else f"{FILES}/{path}"


def shown(path: str) -> bool:
    """Whether a file gets a page of its own, and is not only handed out."""
    file = ROOT / path
    return file.suffix in LANGUAGES and file.stat().st_size <= LARGEST_PAGE


def outside(path: str) -> bool:
    """Whether a path of the repository lies outside docs/ and is there."""
    return not path.startswith(("docs/", "..")) and path != "docs" and (ROOT / path).exists()


def links(page: str, text: str) -> Iterator[str]:
    """Paths in the repository, outside docs/, that a page points to."""
    for start, end in prose(text):
        for match in LINK.finditer(text, start, end):
            if outside(path := place(page, match[1])):
                yield path


def linked(path: str, config: MkDocsConfig) -> Iterator[File]:
    """What the site gets for a path of the repository: a page, a file, or a page of a folder and its files."""
    file, where = ROOT / path, address(path)
    if not where.startswith((SOURCE, FILES)):
        return
    if file.is_dir():
        inside = sorted(entry for entry in file.iterdir() if entry.is_file() and not entry.name.startswith("."))
        up = posixpath.relpath(f"{FILES}/{path}", f"{SOURCE}/{path}")
        lines = [f"* [{entry.name}]({up}/{entry.name}) ({entry.stat().st_size / 1000:.0f} kB)" for entry in inside]
        yield File.generated(config, where, content=f"{PLAIN}# {path}\n\n" + "\n".join(lines) + "\n")
        for entry in inside:
            yield File.generated(config, f"{FILES}/{path}/{entry.name}", abs_src_path=str(entry))
    elif shown(path):
        text = f"``````{LANGUAGES[file.suffix]}\n{file.read_text(encoding='utf-8')}``````\n"
        yield File.generated(config, where, content=f"{PLAIN}# {path}\n\n{text}")
    else:
        yield File.generated(config, where, abs_src_path=str(file))


def rewritten(page: str, text: str) -> str:
    """The page's text with links that leave docs/ led to where the site has what they point to."""

    def led(match: re.Match) -> str:
        path = place(page, match[1])
        if path.startswith("docs/") and origin(page) == "":
            target = path.removeprefix("docs/")
        elif outside(path):
            target = address(path)
        else:
            return match[0]
        return f"]({posixpath.relpath(target, posixpath.dirname(page) or '.')}{match[2] or ''})"

    parts, last = [], 0
    for start, end in prose(text):
        parts += [text[last:start], LINK.sub(led, text[start:end])]
        last = end
    return "".join(parts) + text[last:]


# --- pages that are made -----------------------------------------------------------------------------------


def said(*argv: str) -> str:
    """What a command prints when it is asked for help."""
    from safe_pruner_jax.cli import main as cli

    handlers, level = logging.root.handlers[:], logging.root.level
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        cli.main(argv)
    logging.root.handlers[:], logging.root.level = handlers, level
    return re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue()).strip()


def commands() -> str:
    """The page of the commands: each one's help on a screen, and all of it folded away."""
    from safe_pruner_jax import pruners
    from safe_pruner_jax.cli import main as cli
    from safe_pruner_jax.cli.help import choices

    os.environ |= {"COLUMNS": "100", "NO_COLOR": "1"}
    parts = ["# Commands\n\nWhat `openpi NAME --help` and `--help-all` say. The package installs the same command", ""]
    parts[0] += " as `safe-pruner` too.\n"
    for name in cli.COMMANDS:
        full = "\n".join(f"    {line}".rstrip() for line in said(*name.split(), "--help-all").splitlines())
        parts.append(f"## openpi {name}\n\n```text\n{said(*name.split(), '--help')}\n```\n")
        parts.append(f'??? note "openpi {name} --help-all"\n\n    ```text\n{full}\n    ```\n')
    parts.append("## Choices of the pruners\n\nAfter `--pruner=NAME`; what they mean is in [Pruners](pruners.md).\n")
    for name, factory in pruners.PRUNERS.items():
        parts.append("```text\n" + "\n".join(choices(name, factory)) + "\n```\n")
    return "\n".join(parts)


# --- what mkdocs calls -------------------------------------------------------------------------------------


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Lists every decision."""
    (decisions,) = [entry["Decisions"] for entry in config.nav or [] if "Decisions" in entry]
    decisions += [f"decisions/{path.name}" for path in sorted((ROOT / "docs" / "decisions").glob("[0-9]*.md"))]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are made, and what pages point to."""
    made = {"commands.md": commands()}
    made |= {page: (ROOT / name).read_text(encoding="utf-8") for page, name in WRITTEN.items()}
    for page, text in made.items():
        files.append(File.generated(config, page, content=text))
    paths = {path for file in files.documentation_pages() for path in links(file.src_uri, file.content_string)}
    new = {file.src_uri: file for path in sorted(paths) for file in linked(path, config)}
    for file in new.values():
        files.append(file)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Leads links, and shows what commands need."""
    note = lambda kind, text: f'<small class="{kind}">{html.escape(text)}</small>\n'
    made = dict(MADE.findall((ROOT / "docs" / "figures" / "README.md").read_text(encoding="utf-8")))
    text = NEEDS.sub(lambda match: note("needs", f"needs: {match[1]}"), markdown)
    text = FIGURE.sub(lambda match: f"{match[0]}\n\n{note('made', made.get(match[1], ''))}", text)
    return text if page.file.src_uri.startswith(f"{SOURCE}/") else rewritten(page.file.src_uri, text)


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Equations in MathML."""

    def drawn(match: re.Match) -> str:
        source = html.unescape(match[2]).strip()
        display = "block" if source.startswith("\\[") else "inline"
        return latex2mathml.converter.convert(source[2:-2].strip(), display=display)

    return re.sub(r'<(span|div) class="arithmatex">(.*?)</\1>', drawn, content, flags=re.DOTALL)
