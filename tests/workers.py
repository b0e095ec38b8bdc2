"""Which tests share a worker, and in what order groups of them begin.

xdist's own groups are written into a test's name, which the newest pytest does not let it change: they were none. So
the scheduler here reads the group from the name.
"""

from xdist.scheduler import LoadScopeScheduling

TOGETHER = {
    **dict.fromkeys(("test_engine", "test_control", "test_session"), "the tiny engine"),
    **dict.fromkeys(
        ("test_analysis", "test_deviation", "test_trace", "test_regions", "test_controls", "test_diagnose"),
        "the plain policy",
    ),
    **dict.fromkeys(("test_rtc", "test_end_to_end", "test_attention_request", "test_view"), "the policy of ten steps"),
    **dict.fromkeys(("test_fleet", "test_evaluate"), "the policy of two steps"),
    **dict.fromkeys(("test_notebooks", "test_site"), "the embedded policy"),
    **dict.fromkeys(("test_libero", "test_scenes", "test_expert"), "the simulator"),
}
"""Modules that share compiled programs run in one worker, and so do those that play in the simulator, most of a
gigabyte that a process keeps; every other module is a group by itself."""

APART = ("test_parity", "test_flops", "test_demo")
"""Modules whose tests share nothing that is dear: each test may run anywhere."""

OF_A_CASE = ("test_law", "test_safe_is_algorithm_1")
"""Tests of one pruner, whose programs they share."""

LONGEST = (
    # at night; by day there is little of these
    *("test_demo", "test_budget", "test_notebooks", "test_site", "test_libero", "test_scenes", "test_expert"),
    *("test_stages", "test_hosts", "test_bench"),
    # by day
    *("test_analysis", "test_deviation", "test_trace", "test_regions", "test_controls", "test_diagnose"),
    *("test_engine", "test_control", "test_session", "test_peers_engine", "test_kernels", "test_training"),
    *("test_rtc", "test_end_to_end", "test_attention_request", "test_view", "test_evaluate_command"),
    *("test_fleet", "test_evaluate", "test_promises", "test_parity", "test_openpi_patch", "test_loading"),
    *("test_model", "test_words", "test_savings", "test_checkpoint", "test_demonstrations", "test_peers"),
    *("test_flops", "test_precision", "test_ablations", "test_lerobot", "test_pytorch", "test_wheel"),
)
"""Modules that begin first, so that no worker is left alone with one of them at the end."""


def module(name: str) -> str:
    """tests/test_wire.py::test_it[1] → test_wire."""
    return name.partition("::")[0].rpartition("/")[2].removesuffix(".py")


def group(name: str) -> str:
    """The name of what runs in one worker: a module, several, one test, or all tests of one pruner."""
    test, _, choice = name.partition("::")[2].removesuffix("]").partition("[")
    if module(name) in APART:
        return name
    if test in OF_A_CASE:
        return f"laws of {choice.partition('-')[2] if test == 'test_law' else choice}"
    return TOGETHER.get(module(name), module(name))


def rank(name: str) -> int:
    """Place of a test's module among those that begin first."""
    return LONGEST.index(module(name)) if module(name) in LONGEST else len(LONGEST)


class Groups(LoadScopeScheduling):
    """Gives whole groups to workers, in the order in which they were collected."""

    def _split_scope(self, nodeid: str) -> str:
        return group(nodeid)
