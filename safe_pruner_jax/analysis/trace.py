"""Everything a policy attends to along an episode, from one full pass per call; and any pruner, replayed on it.

    watch = Watch(policy)
    trace = watch(recording.calls())                        full passes: nothing is pruned, nothing is decided
    trace.expert                                            [calls, s, L, n] saliency, action tokens as queries
    selections = replay(safe(keep=0.2), trace)              what the pruner would have kept, call after call

The noise is that of a session with the same seed, so a replay sees what the engine would have seen.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np

from safe_pruner_jax.analysis.episodes import Call, Seen
from safe_pruner_jax.arrays import Array, Layers
from safe_pruner_jax.engine.programs import draw_noise, embed
from safe_pruner_jax.engine.state import Inputs, visual_slots
from safe_pruner_jax.libero.demonstrations import subtasks
from safe_pruner_jax.model import pi0
from safe_pruner_jax.model.config import Pi0Config
from safe_pruner_jax.policy.policy import Policy, layout_of, pack
from safe_pruner_jax.pruners import Capture, Evidence, Pruner, Selection
from safe_pruner_jax.pruners.base import NO_HISTORY
from safe_pruner_jax.tokens import PrefixLayout, saliency

CUTS = 3
"""A trace has the hidden rows before layers 1 to 3."""

REPLAYED = ("full", "safe", "fastv", "divprune", "random")
"""Pruners that decide once, on what a trace holds: visual tokens, saliency, and the late saliency of full passes."""


@dataclass(frozen=True, eq=False)
class Trace:
    """One episode of C calls as the unpruned policy saw it; NumPy arrays.

    Args:
      layout: cameras and slots of the first call; prompts that hold the state may be padded otherwise later.
      images: per call, camera → uint8 [S, S, 3] as the network reads it.
      subtask: [C] int32, see `libero.demonstrations.subtasks`.
      visual: [C, n, d] float32 visual tokens Z as they enter the language model.
      alive: [C, n] bool.
      expert: [C, s, L, n] float32 saliency (Eq. 1-2) of every expert layer at every denoise step, action queries.
        Denoise step 0 of a layer before a cut is what a pruner there calls its "action" saliency.
      text, last, everyone: [C, L-1, n] float32 saliency of the prefix layers with the prompt's rows, its last one, or
        all rows as queries; the last layer computes no queries.
      probabilities: the same four, "expert", "text", "last" and "all", as the model's own probabilities over all keys.
      hidden: [C, H, n, d] float32 visual rows before the layers 1 … H.
      actions: [C, A, action_dim] float32, normalised.
      keys: [C] PRNG keys of the steps, as `Evidence.key`.
      inputs: per call, what the network read, with leading axis 1; () in a trace that nobody will act on.
      noise: [C, A, action_dim] float32 that the actions were made from.
      seen: per call, what is where in the pictures; () where the source does not know.
    """

    layout: PrefixLayout
    images: Sequence[dict[str, np.ndarray]]
    subtask: np.ndarray
    visual: np.ndarray
    alive: np.ndarray
    expert: np.ndarray
    text: np.ndarray
    last: np.ndarray
    everyone: np.ndarray
    probabilities: Mapping[str, np.ndarray]
    hidden: np.ndarray
    actions: np.ndarray
    keys: Array
    inputs: Sequence[Inputs] = ()
    noise: np.ndarray | None = None
    seen: Sequence[Seen] = ()

    def __len__(self) -> int:
        return len(self.visual)

    @property
    def depth(self) -> int:
        """Layers L."""
        return self.expert.shape[2]

    @property
    def camera(self) -> np.ndarray:
        """[n] int32, camera of each visual slot."""
        return np.repeat(np.arange(len(self.layout.cameras), dtype=np.int32), self.layout.tokens_per_camera)

    def late(self, steps: str = "half", over: str = "visual") -> np.ndarray:
        """[C, L, n] saliency of every expert layer, averaged over "half" (the second), "all" or the "last" step."""
        seen, count = self.expert if over == "visual" else self.probabilities["expert"], self.expert.shape[1]
        return seen[:, {"half": count // 2, "all": 0, "last": count - 1}[steps] :].mean(1)

    def captured(self, capture: Capture) -> np.ndarray:
        """[C, n] saliency that a pruner's `Capture` of rows "action", "text", "last" or "all" asks for.

        Raises:
          ValueError: no such layer; before layer 0 there is no attention.
        """
        if capture.layer is None or not 0 <= capture.layer < self.depth:
            got = f"{capture.layer}; before a cut at layer 0 there is no attention to look at"
            raise ValueError(f"capture: expected a layer index from 0 to {self.depth - 1}, got {got}")
        if capture.rows == "action":
            return (self.expert if capture.over == "visual" else self.probabilities["expert"])[:, 0, capture.layer]
        visual = {"text": self.text, "last": self.last, "all": self.everyone}
        seen = visual if capture.over == "visual" else self.probabilities
        return seen[capture.rows][:, capture.layer]


def look(config: Pi0Config, weights: pi0.Weights, inputs: Inputs, key: Array) -> tuple[dict[str, Array], Array]:
    """One full step of one robot that returns every saliency.

    Args:
      config, weights: the model.
      inputs: of one robot, leading axis 1.
      key: PRNG key of the episode; it is split as the engine splits it.

    Returns:
      The arrays of `Trace` for one call (without its axis C), and the next call's key.
    """
    following, noise_key = jax.random.split(key)
    noise = draw_noise(config, noise_key)[None]
    embedded = embed(weights, config, inputs)
    n, queried = visual_slots(config, inputs), range(config.depth - 1)
    alive = embedded.mask[:, :n]
    run, segments, logits, hidden = embedded, (), {}, []
    for piece in cut_at(config.depth):
        x, more, seen = pi0.prefix_layers(weights, config, run, piece, tuple(queried))
        run, segments, logits = run.replace(x=x), segments + more, logits | seen
        hidden.append(x[0, :n].astype(jnp.float32))
    prefix = pi0.Prefix(segments, embedded.count)
    rows = inputs.token_mask[0]
    final = jnp.arange(rows.shape[0]) == rows.sum() - 1
    layers: Layers = tuple(range(config.depth))

    def reduce(rows: Array, over: str, start: int = n) -> Array:
        return jnp.stack([saliency(logits[l][0, :, start:], rows, alive[0], over=over) for l in queried])

    def denoise(x_t: Array, at: pi0.Schedule) -> tuple[Array, tuple[Array, Array]]:
        v, seen, _ = pi0.velocity(weights, config, prefix, inputs.state, x_t, at, logits_of=layers)
        now = lambda over: jnp.stack([pi0.action_saliency(config, seen[l], alive, over)[0] for l in layers])
        return x_t - v / weights.schedule.times.shape[0], (now("visual"), now("all"))

    actions, (expert, own_expert) = jax.lax.scan(denoise, noise, weights.schedule)
    everyone = embedded.mask[0]
    seen = {
        "visual": embedded.x[0, :n].astype(jnp.float32),
        "alive": alive[0],
        "expert": expert,
        "text": reduce(rows, "visual"),
        "last": reduce(final, "visual"),
        "everyone": reduce(everyone, "visual", 0),
        "probabilities": {
            "expert": own_expert,
            "text": reduce(rows, "all"),
            "last": reduce(final, "all"),
            "all": reduce(everyone, "all", 0),
        },
        "hidden": jnp.stack(hidden[:-1]),
        "actions": actions[0],
        "noise": noise[0],
        "keys": jax.random.fold_in(noise_key, 1),
    }
    return seen, following


_look = jax.jit(look, static_argnums=0)
"""Compiled once for all policies of the same sizes."""


def cut_at(depth: int) -> list[range]:
    """The layers in pieces that end where tokens may be dropped: before layers 1, 2 and 3, as far as there are any."""
    edges = [0, *range(1, min(CUTS, depth - 1) + 1), depth]
    return [range(a, b) for a, b in pairwise(edges)]


class Watch:
    """A policy's model, compiled to tell everything it attends to; the policy's own pruner plays no part.

    Args:
      policy: weights, transforms and seed.
    """

    def __init__(self, policy: Policy):
        self.policy = policy
        self._look = partial(_look, policy.engine.config)

    def __call__(self, calls: Iterable[Call]) -> Trace:
        """The trace of one episode.

        Raises:
          ValueError: no calls, or other cameras on the way.
          RequestError: a request that the robot's transforms refuse.
        """
        policy, config = self.policy, self.policy.engine.config
        seen, all_inputs, images, grippers, labels = [], [], [], [], []
        layout, key = None, jax.random.key(self.policy.seed)
        for call in calls:
            example, _ = policy.transform.prepare(call.request)
            layout_now = layout_of(example, config, policy.prompt_lengths)
            layout = layout or layout_now
            if layout_now.cameras != layout.cameras:
                expected = f"episode: expected {layout.cameras} throughout"
                raise ValueError(f"{expected}, got {layout_now.cameras}; split it there")
            inputs = pack([example], layout_now)
            arrays, key = self._look(policy.engine.weights, jax.device_put(inputs), key)
            keys = arrays.pop("keys")
            seen.append((jax.device_get(arrays), keys))
            all_inputs.append(inputs)
            images.append({camera: np.asarray(example.images[camera]) for camera in layout.cameras})
            grippers.append(call.gripper)
            labels += [] if call.seen is None else [call.seen]
        if not seen:
            raise ValueError("episode: expected at least one call, got none")
        stacked = jax.tree.map(lambda *a: np.stack(a), *(arrays for arrays, _ in seen))
        keys = jnp.stack([keys for _, keys in seen])
        host = {"layout": layout, "images": images, "subtask": subtasks(grippers), "inputs": all_inputs, "seen": labels}
        return Trace(**host, keys=keys, **stacked)


def replay(pruner: Pruner, trace: Trace) -> list[Selection]:
    """What a pruner decides at every call of a trace, with the feedback that the engine would give it.

    Before the cut nothing depends on what was dropped, and requests are recorded, so decisions are those of a session.

    Returns:
      One `Selection` of NumPy arrays per call; at keyframes `index` is the top-K that was not used.

    Raises:
      ValueError: a pruner that needs more than a trace holds, or a plan that does not fit the model.
    """
    if pruner.name not in REPLAYED:
        raise ValueError(f"replay: expected one of {', '.join(REPLAYED)}, got {pruner.name}, which needs more evidence")
    plan = pruner.plan.for_depth(trace.depth)
    captured = [trace.captured(c) for c in plan.capture]
    late = trace.late(plan.late_steps, plan.late_over)[:, [int(l) for l in plan.late_layers]]
    past = [trace.captured(c) for c in plan.remember]
    rows_at = lambda t, cut: trace.hidden[t, cut - 1] if cut else trace.visual[t]

    def evidence(t: int, since: int, reference: int) -> Evidence:
        recorded = {
            "since_full": np.int32(since),
            "visual": trace.visual[t],
            "alive": trace.alive[t],
            "running": trace.alive[t],
            "camera": trace.camera,
            "saliency": tuple(s[t] for s in captured),
            "late": late[reference] if since != NO_HISTORY else np.zeros_like(late[0]),
            "key": trace.keys[t],
            "hidden": rows_at(t, plan.cut.layer) if plan.cut and plan.cut.layer <= CUTS else None,
            "past": tuple(s[t - 1] if since != NO_HISTORY else np.zeros_like(s[0]) for s in past),
        }
        return Evidence(**{field.name: recorded.get(field.name) for field in fields(Evidence)})

    step, selections, since, reference = jax.jit(pruner.step), [], NO_HISTORY, 0
    state = pruner.init(evidence(0, NO_HISTORY, 0))
    for t in range(len(trace)):
        if t and not np.array_equal(trace.alive[t], trace.alive[t - 1]):
            since = NO_HISTORY
        state, selection = step(state, evidence(t, since, reference))
        selections.append(jax.device_get(selection))
        if plan.cut is None or selections[-1].keyframe:
            since, reference = 1, t
        elif since != NO_HISTORY:
            since += 1
    return selections
