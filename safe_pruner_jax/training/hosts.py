"""Several hosts that train as one: each holds a part of the devices, the first one writes.

    join("10.0.0.1:8476", hosts=2, host=0)        on every host, before anything is computed
    array = spread(batch, sharding)               every host has the whole batch and keeps its part
    tree = gather(state)                          everything, on every host

With one host all of it does nothing, or what one would expect.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import Sharding


def join(coordinator: str, hosts: int | None = None, host: int | None = None) -> None:
    """Makes this process one of several (`jax.distributed`).

    Args:
      coordinator: host:port of the first one.
      hosts: how many there are; None asks SLURM, Open MPI or the cloud.
      host: which one this is, from 0; None as `hosts`.

    Raises:
      ValueError: an address without a port, a place that does not exist, or none that could be found out.
      ConnectionError: the coordinator does not answer.
    """
    name, _, port = coordinator.rpartition(":")
    if not name or not port.isdigit():
        raise ValueError(f"coordinator: expected HOST:PORT of the first host, got {coordinator!r}")
    if (hosts is None) != (host is None) or (hosts is not None and host not in range(hosts)):
        raise ValueError(f"host: expected --hosts N and --host from 0 to N - 1, got {hosts} and {host}")
    try:
        jax.distributed.initialize(coordinator, hosts, host)
    except ValueError as error:
        raise ValueError(f"hosts: {error}; give --hosts and --host") from error
    except RuntimeError as error:
        raise ConnectionError(
            f"coordinator: no answer from {coordinator}: {error}; is the first host running?"
        ) from error


def first() -> bool:
    """Whether this host writes."""
    return jax.process_index() == 0


def agree(value: bool) -> bool:
    """The first host's value, on all of them."""
    return value if jax.process_count() == 1 else bool(multihost_utils.broadcast_one_to_all(np.array(value)))


def spread(tree: Any, shardings: Any) -> Any:
    """Arrays over the devices of all hosts, from a tree that every host has.

    Args:
      tree: arrays; the same everywhere.
      shardings: one for all leaves, or a tree of them.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)
    if isinstance(shardings, Sharding):
        shardings = jax.tree.map(lambda _: shardings, tree)

    def place(leaf: Any, sharding: Sharding) -> jax.Array:
        values = np.asarray(leaf)
        return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])

    return jax.tree.map(place, tree, shardings)


def gather(tree: Any) -> Any:
    """NumPy arrays of all values, on every host."""
    if jax.process_count() > 1:
        tree = multihost_utils.process_allgather(tree, tiled=True)
    return jax.tree.map(np.asarray, jax.device_get(tree))


class Checkpoints:
    """The states of a run in a folder of the first host, which alone reads and writes it.

    Args:
      folder: made if absent, with its parents.
    """

    def __init__(self, folder: Path):
        several = jax.process_count() > 1
        alone = ocp.options.MultiprocessingOptions(0, {0}, "first_host") if several else None
        how = {"multiprocessing_options": alone} if alone else {}
        options = ocp.CheckpointManagerOptions(max_to_keep=2, create=False, **how)
        self._manager = None
        if first():
            folder.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def latest(self, state: Any) -> Any:
        """The last state, or the one given where there is none; of as many hosts as there were then or are now."""
        if self._manager is not None and (step := self._manager.latest_step()) is not None:
            state = self._manager.restore(step, args=ocp.args.StandardRestore(state))
        return state if jax.process_count() == 1 else multihost_utils.broadcast_one_to_all(state)

    def save(self, step: int, state: Any) -> None:
        """Writes a state, unless it is there; returns when it is complete. All hosts call it."""
        everything = gather(state) if jax.process_count() > 1 else state
        if self._manager is not None and self._manager.latest_step() != step:
            self._manager.save(step, args=ocp.args.StandardSave(everything))
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Ends what writes in the background."""
        if self._manager is not None:
            self._manager.close()
