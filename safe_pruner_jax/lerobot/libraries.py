"""What the extra `lerobot` installs, imported when it is needed."""

from types import ModuleType


class DatasetError(ValueError):
    """A dataset that cannot be read or written; the message says what was expected, what is there, what to do."""


def parquet() -> ModuleType:
    """`pyarrow.parquet`."""
    try:
        import pyarrow.parquet as found
    except ImportError as error:
        raise _absent("pyarrow") from error
    return found


def arrow() -> ModuleType:
    """`pyarrow`."""
    try:
        import pyarrow as found
    except ImportError as error:
        raise _absent("pyarrow") from error
    return found


def av() -> ModuleType:
    """PyAV."""
    try:
        import av as found
    except ImportError as error:
        raise _absent("av") from error
    return found


def _absent(name: str) -> DatasetError:
    return DatasetError(f'a LeRobot dataset needs {name}: pip install "safe-pruner-jax[lerobot]"')
