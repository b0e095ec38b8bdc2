"""What the extra `lerobot` installs, imported when it is needed."""

from types import ModuleType


class DatasetError(ValueError):
    """A dataset that cannot be read or written; the message says what was expected, what is there, what to do."""


def parquet() -> ModuleType:
    """`pyarrow.parquet`."""
    try:
        import pyarrow.parquet as library
    except ImportError as error:
        raise _absent("pyarrow", error) from error
    return library


def arrow() -> ModuleType:
    """`pyarrow`."""
    try:
        import pyarrow as library
    except ImportError as error:
        raise _absent("pyarrow", error) from error
    return library


def av() -> ModuleType:
    """PyAV."""
    try:
        import av as library
    except ImportError as error:
        raise _absent("av", error) from error
    return library


def _absent(name: str, error: ImportError) -> DatasetError:
    """What to install; why the library does not load where it is installed, such as one built for another numpy."""
    why = "" if isinstance(error, ModuleNotFoundError) else f" (it is installed but does not load: {error})"
    return DatasetError(f'a LeRobot dataset needs {name}: pip install "safe-pruner-jax[lerobot]"{why}')
