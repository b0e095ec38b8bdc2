"""Records of episodes that nobody played; shared by tests of records and reports."""

import dataclasses
import inspect

from safe_pruner_jax.evaluation.records import Record, episode_seed
from safe_pruner_jax.policy.identity import Configuration
from safe_pruner_jax.pruners import factory

CONFIGURATION = Configuration(
    pruner="safe",
    choices={name: p.default for name, p in inspect.signature(factory("safe")).parameters.items()}
    | {"keep": 0.2, "late_layers": (0, -1)},
    plan={"cut": {"layer": 3, "keep": 0.2}},
    policy="mini_libero",
    checkpoint="0123456789ab",
    precision="float32",
    num_steps=10,
    prompt_lengths=(16, 32),
    noise="per episode, seed 0",
    simulator={"mujoco": "3.2.3"},
)


def record(trial=0, outcome="success", configuration=CONFIGURATION, **changes):
    base = Record(
        suite="libero_object",
        task=0,
        trial=trial,
        seed=episode_seed("libero_object", 0, trial),
        outcome=outcome,
        error="OSError: –" if outcome == "error" else None,
        steps=110,
        seconds=12.5,
        calls=22,
        keyframes=2,
        kept=139.5,
        alive=512.0,
        paper_flops=1e9,
        exact_flops=2e9,
        infer_ms={
            "keyframe": {"count": 2, "p50": 20.0, "p90": 21.0},
            "pruned": {"count": 20, "p50": 10.0, "p90": 12.0},
        },
        batch=1.5,
        views=["base_0_rgb", "left_wrist_0_rgb"],
        prompt_slots=32,
        device="cpu",
        versions={"jax": "0"},
        configuration=configuration.as_json(),
    )
    return dataclasses.replace(base, **changes)


FULL = dataclasses.replace(CONFIGURATION, pruner="full", choices={}, plan={"cut": None})


def group(configuration, wins, episodes=10, suite="libero_object", **changes):
    return [
        record(k, "success" if k < wins else "failure", configuration, suite=suite, **changes) for k in range(episodes)
    ]
