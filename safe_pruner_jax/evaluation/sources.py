"""Where replies come from: a policy in this process, or a server; what it is called, and what its calls cost.

config = describe("pi05_libero", folder, pruner, choices)       known before any weights are read
source = local(policy, config)
config, source = remote("ws://gpu:8000")                        a server tells its own configuration
"""

import contextlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from safe_pruner_jax.engine.flops import exact_flops, keys_per_layer, paper_flops, tokens_per_layer
from safe_pruner_jax.evaluation.batched import Robots
from safe_pruner_jax.evaluation.rollout import Episode
from safe_pruner_jax.evaluation.workers import connect
from safe_pruner_jax.model.config import Pi0Config
from safe_pruner_jax.policy.identity import SERVED, Configuration, local_device
from safe_pruner_jax.policy.policy import Policy
from safe_pruner_jax.pruners import Plan, make
from safe_pruner_jax.robots.configs import get_config
from safe_pruner_jax.tokens import PrefixLayout


@dataclass(frozen=True)
class Cost:
    """What the calls of an episode cost, in multiply-adds; see `flops`."""

    config: Pi0Config
    plan: Plan
    num_steps: int = 10

    def of(self, episode: Episode) -> tuple[float | None, float | None]:
        """Paper's and exact FLOPs, mean over the calls; None where replies do not tell their layout."""
        counts = Counter()
        for call in episode.calls:
            p = call.pruning or {}
            if "views" not in p or "text" not in p:
                return None, None
            counts[tuple(p["views"]), p["text"], bool(p["keyframe"])] += 1
        if not counts:
            return None, None
        paper = exact = 0.0
        for (views, text, keyframe), count in counts.items():
            layout = PrefixLayout(views, self.config.tokens_per_camera, text)
            of = {"pruned": not keyframe}
            tokens = tokens_per_layer(self.plan, layout, self.config.depth, **of)
            keys = keys_per_layer(self.plan, layout, self.config.depth, **of)
            paper += count * paper_flops(tokens, self.config.prefix.width, self.config.prefix.mlp_dim, keys)
            steps = self.num_steps
            exact += count * exact_flops(self.config, self.plan, layout, pruned=not keyframe, num_steps=steps).total
        return paper / counts.total(), exact / counts.total()


@dataclass(frozen=True)
class Source:
    """Where replies come from.

    Args:
      robots: in this process; None: every simulator asks `server`.
      server: websocket address.
      cost: of the calls, where it is known.
      seed: the episodes' seeds are derived from it; None: of a server that is not this package's.
      device: what the policy runs on.
    """

    robots: Robots | None = None
    server: str | None = None
    cost: Cost | None = None
    seed: int | None = 0
    device: str = ""


def local(policy: Policy, config: Configuration, *, batch: int = 8, seed: int = 0) -> Source:
    """A policy in this process as the source of replies; `config` is from `describe`."""
    engine = policy.engine
    return Source(Robots(policy, batch), None, Cost(engine.config, engine.plan, config.num_steps), seed, local_device())


def remote(
    address: str, expected: tuple[str, Mapping[str, Any]] | None = None, *, seed: int = 0
) -> tuple[Configuration, Source]:
    """A policy server as the source of replies, and what it says about itself.

    A server that says nothing (openpi's own, or `--pruner=none`) is the method "server" with an unknown checkpoint.

    Args:
      address: ws://host:port.
      expected: pruner, and those of its choices, that it must have; None takes what it has.
      seed: the episodes' seeds are derived from it, as in this process; only this package's servers are told.

    Raises:
      ConnectionError: there is no server.
      ValueError: it runs another method, or another version of this package.
    """
    client = connect(address)
    served = client.get_server_metadata().get(SERVED, {})
    if served and set(served.get("configuration", ())) != {field.name for field in fields(Configuration)}:
        raise ValueError(f"server: {address} is another version of this package; install the same on both sides")
    with contextlib.suppress(AttributeError):  # it offers no way to hang up
        client._ws.close()
    runs = served["configuration"] if served else {"pruner": "an unknown pruner", "choices": {}}
    method = runs["pruner"], runs["choices"]
    name, choices = expected or method
    has = json.loads(json.dumps({key: method[1].get(key) for key in choices}))
    if name != method[0] or has != json.loads(json.dumps(dict(choices))):
        raise ValueError(f"pruner: {address} runs {method[0]} {method[1] or ''}, leave --pruner to the server")
    if served:
        config, device = Configuration(**served["configuration"]), served["device"]
        config = replace(config, noise=noise_of(seed))
        plan = make(config.pruner, **config.choices).plan
        return config, Source(
            None, address, Cost(get_config(config.policy).model, plan, config.num_steps), seed, device
        )
    names = dict.fromkeys(("policy", "checkpoint", "precision"), "unknown")
    unknown = Configuration("server", {}, {}, **names, num_steps=0, prompt_lengths=())
    return unknown, Source(None, address, seed=None, device=address)


def noise_of(seed: int) -> str:
    """What a configuration says about noise that is drawn from `records.episode_seed`."""
    return f"per episode, seed {seed}"
