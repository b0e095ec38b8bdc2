"""`openpi evaluate --on ray`: the episodes of one machine, played on the nodes of a cluster.

The driver knows the policy by its configuration alone; weights are read where they are used. Records are written by the
driver, in its own file.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from safe_pruner_jax.cluster.connect import ClusterError, connected, room
from safe_pruner_jax.cluster.crew import Nodes
from safe_pruner_jax.evaluation.evaluate import play
from safe_pruner_jax.evaluation.records import Record, RecordFile
from safe_pruner_jax.evaluation.sources import Cost, Source, local
from safe_pruner_jax.evaluation.workers import Job
from safe_pruner_jax.libero.simulator import provenance
from safe_pruner_jax.policy.identity import Configuration, identity
from safe_pruner_jax.policy.spec import Method, Model
from safe_pruner_jax.pruners import make
from safe_pruner_jax.robots.configs import get_config


def load(model: Model, method: Method, batch: int, seed: int) -> tuple[dict[str, Any], Source]:
    """The policy of a node, and its identity."""
    configuration = model.describe("LIBERO", method)
    policy = model.load("LIBERO", method.make())
    return identity(configuration.as_json()), local(policy, configuration, batch=batch, seed=seed)


def source_of(configuration: Configuration, seed: int) -> Source:
    """What records need to know of a policy that is elsewhere."""
    plan = make(configuration.pruner, **configuration.choices).plan
    return Source(cost=Cost(get_config(configuration.policy).model, plan, configuration.num_steps), seed=seed)


def play_on_ray(
    jobs: Sequence[Job],
    file: RecordFile,
    configuration: Configuration,
    policy: tuple[Model, Method, int, int],
    *,
    address: str | None = None,
    package: str = "libero",
    policies: int | None = None,
    simulators: int | None = None,
    retry_errors: bool = False,
    on_start: Callable[[Nodes], None] = lambda crew: None,
    on_record: Callable[[Record], None] = lambda record: None,
) -> None:
    """`evaluate.play` with policies and simulators on the nodes of a cluster.

    Args:
      jobs, file, retry_errors, on_record: see `evaluate.play`.
      configuration: that of the file.
      policy: what every policy loads: see `load`.
      address: see `connect.connected`.
      package: of the simulator.
      policies: None: one per accelerator, without any one per node.
      simulators: None: one for every core that is left.
      on_start: called with the crew when it is there.

    Raises:
      ClusterError: no Ray, no cluster, another version, no room at all.
      EvaluationError, RecordsError: as `evaluate.play`; also another policy or simulator on a node, and a cluster that
        has shrunk to nothing.
    """
    if simulators is not None and simulators < 1:
        raise ValueError(f"simulators: expected at least 1, got {simulators}")
    with connected(address):
        look = partial(provenance, package)
        crew = Nodes(partial(load, *policy), identity(file.configuration), look(), policies=policies, look=look)
        cores, _ = room("simulator")
        if cores < 1:
            raise ClusterError("expected nodes with CPU cores for simulators, got none; see ray status")
        on_start(crew)
        number = simulators or max(1, cores - crew.cores)
        source = source_of(configuration, policy[-1])
        play(jobs, file, source, workers=number, retry_errors=retry_errors, crew=crew, on_record=on_record)
