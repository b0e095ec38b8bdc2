"""Hypothesis profiles, what makes compiling cheap, who shares a worker (`workers`), and fixtures of several modules."""

import ctypes
import gc
import os
import shutil
import tempfile
from pathlib import Path

import jax
import pytest
from hypothesis import HealthCheck, settings

from safe_pruner_jax.engine import xla

pytest.register_assert_rewrite(
    "fake_libero", "fake_server", "laws", "live_server", "oracles", "synthetic", "tiny_checkpoint", "tiny_engine"
)

# an array of fewer axes is never stretched unasked: a missing axis is a mistake, and not a broadcast; jax of openpi's
# pins is not held to it
if jax.__version_info__ >= (0, 6):
    os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"  # of children
    jax.config.update("jax_numpy_rank_promotion", "raise")

# the models are tiny, so compiling is most of the time: code that is not optimised, by the simpler of two emitters
FLAGS = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
FLAGS.append(
    "--xla_cpu_parallel_codegen_split_count=1"
)  # a quarter less work: every part has code of its own around it
if xla.trusted():  # an older jax does not know it
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(FLAGS))
os.environ["SAFE_PRUNER_PROGRAMS"] = "none"  # servers leave nothing behind

# tracing makes many objects and few cycles, and jax does work of its own in every collection: a tenth of the time
gc.set_threshold(100_000, 20, 20)

# one program is compiled once for all workers, servers and notebooks of a run; the folder goes with the run
PROGRAMS = None
if "PYTEST_XDIST_WORKER" not in os.environ and xla.trusted():
    PROGRAMS = tempfile.mkdtemp(prefix="programs-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = PROGRAMS
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"
    xla.keep_programs(PROGRAMS)  # for this process, which has imported jax; the variables are for its children


def pytest_unconfigure():
    if PROGRAMS is not None:
        shutil.rmtree(PROGRAMS, ignore_errors=True)


QUIET = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}  # the first example compiles
settings.register_profile("local", max_examples=50, **QUIET)
settings.register_profile("ci", max_examples=50, derandomize=True, **QUIET)
settings.load_profile("ci" if os.environ.get("CI") else "local")


# --- who shares a worker -----------------------------------------------------------------------------------


@pytest.hookimpl(tryfirst=True, optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    if config.getvalue("dist") != "loadgroup":
        return None
    import workers

    return workers.Groups(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    import tiers

    config.stash[tiers.COLLECTED] = list(items)  # before any is left out
    if "PYTEST_XDIST_WORKER" in os.environ:
        import workers

        items.sort(key=lambda item: workers.rank(item.nodeid))  # stable: the order within a module stays


LARGE, ROOM, GROWTH = 1_200_000_000, 700_000_000, 300_000_000
"""Bytes of a worker that forgets its programs after a module, and before one that plays in the simulator; and how much
more than was left the last time is worth another try."""

LEFT = pytest.StashKey[dict[bool, int]]()
"""Bytes that were left, or fewer, when garbage was last collected, and when programs were forgotten too."""


def resident_bytes() -> int:
    """Memory of this process; 0 where the system does not tell."""
    file = Path("/proc/self/statm")
    return int(file.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if file.exists() else 0


def shrink(config, limit: int, *, forget: bool) -> None:
    """Collects garbage where a worker has grown above `limit`.

    With `forget` the programs of earlier modules go as well: they are most of its memory, and who needs one again reads
    it from the disk.
    """
    left, now = config.stash.setdefault(LEFT, {False: 0, True: 0}), resident_bytes()
    if now > max(limit, left[forget] + GROWTH):
        if forget:
            jax.clear_caches()
        gc.collect()
        if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)
        left[False] = left[forget] = now = resident_bytes()
    left[False], left[True] = min(left[False], now), min(left[True], now)


@pytest.fixture(scope="module", autouse=True)
def large_workers_forget_their_programs(request):
    """The simulator, its scenes and textures take nearly a gigabyte more."""
    own = [item for item in request.session.items if item.path == request.path]
    if any("libero" in item.keywords for item in own):
        shrink(request.config, ROOM, forget=True)
    yield
    shrink(request.config, LARGE, forget=True)


@pytest.fixture(autouse=True)
def closed_simulators_go(pytestconfig):
    """One leaves much in cycles, and the rare collections here would leave it for many tests."""
    yield
    shrink(pytestconfig, LARGE, forget=False)


# --- openpi's small π0.5 in an engine ----------------------------------------------------------------------


@pytest.fixture(scope="session")
def ref():
    import tiny_engine

    return tiny_engine.small()


@pytest.fixture(scope="session")
def weights():
    import tiny_engine

    return tiny_engine.small_weights()


@pytest.fixture(scope="session")
def engine():
    """SAFE on openpi's small π0.5; a module may have an engine of its own."""
    import tiny_engine

    return tiny_engine.safe_engine()


@pytest.fixture(scope="session")
def full_engine(ref, weights):
    from safe_pruner_jax.engine.engine import Engine
    from safe_pruner_jax.pruners import full

    return Engine(weights, ref.config, full())


@pytest.fixture(scope="session")
def scenes():
    import tiny_engine

    return tiny_engine.two_scenes()


@pytest.fixture(scope="session")
def alone():
    import tiny_engine

    return tiny_engine.lone_robot()


@pytest.fixture(scope="session")
def golden_examples():
    import tiny_engine

    return tiny_engine.golden_examples()


# --- the tiny policy ---------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def plain_policy():
    """Without a pruner, with all denoise steps; tests make policies of their own around its weights and engine."""
    from tiny_policy import load_small

    return load_small()


@pytest.fixture(scope="session")
def two_step_policy():
    """SAFE with two denoise steps; its first step is a keyframe and no other."""
    from tiny_policy import pruned_after_the_first

    return pruned_after_the_first(num_steps=2, prompt_lengths=(16, 32))


@pytest.fixture(scope="session")
def ten_step_policy():
    """The same with all denoise steps, for prompts of up to 16 tokens."""
    from tiny_policy import pruned_after_the_first

    return pruned_after_the_first(num_steps=10, prompt_lengths=(16,))


@pytest.fixture(scope="session")
def tiny_params():
    """The parameters of openpi's tiny checkpoint."""
    from tiny_checkpoint import GOLDEN, TINY

    from safe_pruner_jax.model.checkpoint import load_params

    return load_params(GOLDEN["pure"], TINY)


# --- servers and records -----------------------------------------------------------------------------------


@pytest.fixture
def backend():
    """A backend of plain numpy."""
    from fake_server import FakeBackend

    return FakeBackend()


@pytest.fixture
def server(backend):
    """A live server of `backend`."""
    from fake_server import Mistake

    from safe_pruner_jax.serving import running

    with running(backend, client_errors=(Mistake,), max_message_bytes=2**20) as server:
        yield server
        backend.release.set()


@pytest.fixture
def connect(server):
    """A function that connects another of openpi's clients."""
    from openpi_client.websocket_client_policy import WebsocketClientPolicy

    clients = []

    def new():
        clients.append(WebsocketClientPolicy("127.0.0.1", server.port))
        return clients[-1]

    yield new
    for client in clients:
        client._ws.close()


@pytest.fixture(scope="session")
def machines():
    """A Ray cluster of three nodes; this process is its driver."""
    import ray_cluster

    with ray_cluster.running() as machines:
        yield machines


@pytest.fixture
def cluster(machines):
    """The same with all its nodes."""
    machines.mend()
    return machines


@pytest.fixture
def path(tmp_path):
    """Where an evaluation's records go."""
    return tmp_path / "records.jsonl"
