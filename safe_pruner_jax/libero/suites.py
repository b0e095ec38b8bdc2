"""Suites and tasks by name: LIBERO's five, every variant of them that the installed package ships, LIBERO-plus.

    load_task("libero_object", 0)             # LIBERO
    load_task("libero_object_swap", 0)        # LIBERO-PRO, listed by the package
    load_task("libero_object_temp_x0.1", 0)   # LIBERO-PRO, scene and initial-state files without a listing
    load_task("liberoplus_object", 0)         # LIBERO-plus
    load_task("libero_object_shuffled", 0)    # a parent's tasks in scenes drawn anew, see `placements`

Reference: openpi, examples/libero/main.py (limits); LIBERO-PRO, arXiv:2510.03827 (perturbations).
"""

import contextlib
import functools
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from safe_pruner_jax.libero.simulator import PLUS, LiberoUnavailable, simulator

LIMITS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400}
"""Control steps (20 Hz) per episode of each suite: a little over its longest demonstration, from openpi's client."""
SUITES = tuple(LIMITS)
"""The standard suites. Variants of them are named like their parent."""

SHUFFLED = "_shuffled"
"""End of the name of a suite that is another's tasks with everything in other places."""

_ORPHANS = ("libero_mine", "libero_study_table")  # of LIBERO-PRO; single tasks at one table, as libero_90's are
_PERTURBATIONS = {
    "": "standard",
    "swap": "position",
    "lan": "language",
    "object": "object",
    "task": "task",
    "env": "environment",
    "shuffled": "position",
}


@dataclass(frozen=True)
class Task:
    """One task: its place in its suite, its name, what the robot is told, and the scene file."""

    suite: str
    index: int
    name: str
    language: str
    bddl: Path


def parent(suite: str) -> str:
    """The standard suite that a suite is a variant of: "libero_object_swap" → "libero_object".

    LIBERO-PRO's two suites of its own, `libero_mine` and `libero_study_table`, count as variants of libero_90.

    Raises:
      ValueError: it is a variant of none.
    """
    name = _class(suite)
    if name in _ORPHANS:
        return "libero_90"
    standards = [standard for standard in SUITES if name == standard or name.startswith(f"{standard}_")]
    if not standards:
        raise ValueError(f"unknown suite {suite!r}; there are {', '.join(SUITES)}, and variants, libero_object_swap")
    return max(standards, key=len)


def package(suite: str) -> str:
    """The package that has a suite: "libero", or LIBERO-plus's."""
    return PLUS if suite.startswith(f"{PLUS}_") else "libero"


def perturbation(suite: str) -> str:
    """What a variant changes of its parent, in LIBERO-PRO's terms; "standard" if nothing, "other" if unknown.

    >>> [perturbation(f"libero_object{end}") for end in ("", "_swap", "_temp_x0.1", "_lan", "_with_mug")]
    ['standard', 'position', 'position', 'language', 'added object']
    """
    if package(suite) == PLUS:
        return "LIBERO-plus"
    standards = [standard for standard in SUITES if suite == standard or suite.startswith(f"{standard}_")]
    end = suite.removeprefix(max(standards, key=len)).removeprefix("_") if standards else "other"
    if end.startswith("temp_"):
        return "position"
    return "added object" if end.startswith("with_") else _PERTURBATIONS.get(end, "other")


def is_shuffled(suite: str) -> bool:
    """Whether a suite is another's tasks in scenes drawn anew.

    >>> is_shuffled("libero_object_shuffled"), is_shuffled("libero_object_swap")
    (True, False)
    """
    return suite.endswith(SHUFFLED)


def num_tasks(suite: str) -> int:
    """How many tasks a suite has; raises as `load_task` does."""
    return _benchmark(suite).n_tasks


def load_task(suite: str, index: int) -> Task:
    """One task of a suite (libero_90 has 90, most others 10), numbered as in the benchmark.

    The robot is told what the benchmark says, which is the name of the scene file. Variants that change the
    instruction or the goal keep that name, so there the instruction inside the scene file counts.

    Raises:
      ValueError: for a suite or task that does not exist; the message lists what does.
      LiberoUnavailable: without the simulator, or without the scene file.
    """
    benchmark = _benchmark(suite)
    if not 0 <= index < benchmark.n_tasks:
        tasks = "; ".join(f"{i} {benchmark.get_task(i).language}" for i in range(benchmark.n_tasks))
        raise ValueError(f"{suite} has the tasks 0 to {benchmark.n_tasks - 1}, got {index}: {tasks}")
    task = benchmark.get_task(index)
    if re.search(r"_noise_[1-9]", task.bddl_file):
        raise LiberoUnavailable(
            f"{task.name}: LIBERO-plus's own renderer blurs the pictures of this task; leave it out"
        )
    bddl, language = Path(benchmark.get_task_bddl_file_path(index)), task.language
    if perturbation(suite) in ("language", "task"):
        language = _instruction(bddl)
    return Task(suite, index, task.name, language, bddl)


def load_init_states(suite: str, index: int) -> np.ndarray:
    """A task's fixed initial states, flattened: [number, 1 + nq + nv]."""
    return np.asarray(_benchmark(suite).get_task_init_states(index))


def shipped(source: str = "libero") -> list[str]:
    """Names of the suites whose scenes and initial states the installed package has, in alphabetical order."""
    lib, (scenes, states) = simulator(source), _folders(source)
    both = {folder.name for folder in scenes.iterdir()} & {folder.name for folder in states.iterdir()}
    listed = {name: _quiet(make) for name, make in lib.benchmark.get_benchmark_dict().items()}
    there = lambda task: (scenes / task.problem_folder / task.bddl_file).is_file()
    # a scene of LIBERO-plus is a file of LIBERO and changes in its name, which its package reads
    complete = lambda name: source == PLUS or name not in listed or all(map(there, listed[name].tasks))
    return sorted(name for name in both if name.startswith("libero_") and complete(name))


@functools.cache
def _benchmark(suite: str) -> Any:
    standard = parent(suite)
    source, name = package(suite), _class(suite)
    if name not in (names := shipped(source)):
        variants = ", ".join(other for other in names if other.startswith(standard) and other != standard)
        raise ValueError(f"unknown suite {suite!r}; of {standard} the installed package has {variants or 'none'}")
    suites = simulator(source).benchmark.get_benchmark_dict()
    return _quiet(suites[name]) if name in suites else _unlisted(name, standard, source)


def _class(suite: str) -> str:
    """The suite's name in its package."""
    suite = suite.removesuffix(SHUFFLED)
    return suite.replace(f"{PLUS}_", "libero_", 1) if package(suite) == PLUS else suite


def _unlisted(name: str, standard: str, source: str) -> Any:
    """A benchmark of the files in a suite's folder; tasks that its parent has too keep the parent's order."""
    lib = simulator(source)
    tasks = {task.name: task for task in _quiet(lib.benchmark.get_benchmark_dict()[standard]).tasks}
    files = sorted(path.stem for path in (_folders(source)[0] / name).glob("*.bddl"))
    order = [task for task in tasks if task in files] + [file for file in files if file not in tasks]
    example = next(iter(tasks.values()))

    class Unlisted(lib.benchmark.Benchmark):
        def __init__(self):
            super().__init__()
            self.name, self.n_tasks = name, len(order)
            self.tasks = [
                example._replace(
                    name=task,
                    language=tasks[task].language if task in tasks else task.replace("_", " "),
                    problem_folder=name,
                    bddl_file=f"{task}.bddl",
                    init_states_file=f"{task}.pruned_init",
                )
                for task in order
            ]

    return Unlisted()


def _instruction(bddl: Path) -> str:
    """The instruction inside a scene file."""
    match = re.search(r"\(:language\s+([^()]*)\)", bddl.read_text(encoding="utf-8"))
    if match is None:
        raise ValueError(f"{bddl}: expected an instruction, (:language …), got none; is the package complete?")
    return " ".join(match[1].split())


def _folders(source: str) -> tuple[Path, Path]:
    """Where a package has its suites' scenes and initial states."""
    path = simulator(source).get_libero_path
    return Path(path("bddl_files")), Path(path("init_states"))


def _quiet(make: Any) -> Any:
    """A benchmark's instance without what it prints about its task order."""
    with contextlib.redirect_stdout(io.StringIO()):
        return make()
