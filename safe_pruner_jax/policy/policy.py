"""From raw requests to replies: `Policy` is shared and stateless, `Session` is one robot's episode.

    policy = load_policy("pi05_libero", "gs://…", pruner=safe(keep=0.2))
    session = policy.session()
    reply = session.infer(request)        # openpi's request and reply, plus reply["pruning"]

A control step has two halves: `Policy.read` turns a request into the network's input on the host, `Policy.advance` runs
one device step for robots of one layout. What a robot remembers between its steps is an `Episode`; it starts afresh on
`"reset": True`, on a changed prompt and on a changed set of cameras. `Session` is one robot alone; `fleet` has many.
"""

import dataclasses
import logging
import math
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from safe_pruner_jax.engine.engine import ControlState, Engine, Inputs, batch_size
from safe_pruner_jax.model.config import Pi0Config
from safe_pruner_jax.model.guidance import MAX_GUIDANCE, Guide
from safe_pruner_jax.model.pi0 import Weights
from safe_pruner_jax.policy.overlap import Overlap, rebase, remaining, soft_mask
from safe_pruner_jax.policy.reply import NonFinite, Outcome, pruned, timing
from safe_pruner_jax.pruners import Pruner
from safe_pruner_jax.robots.robots import RequestError, brief
from safe_pruner_jax.robots.transforms import Example
from safe_pruner_jax.tokens import PROMPT_LENGTHS, PrefixLayout, smallest_layout

logger = logging.getLogger(__name__)


class Transform(Protocol):
    """The border between one robot's client and the network, see `robots.transform.RobotIO`."""

    def prepare(self, request: dict) -> tuple[Example, Any]:
        """Request → network input of one robot, and what `finish` needs later."""

    def finish(self, actions: np.ndarray, context: Any) -> dict:
        """Network actions [A, action_dim] → reply."""

    def example(self, rng: np.random.Generator) -> dict:
        """A request as this robot sends it, with invented values."""


def layout_of(example: Example, config: Pi0Config, prompt_lengths: Sequence[int] = PROMPT_LENGTHS) -> PrefixLayout:
    """The smallest static layout that holds an example without dead cameras."""
    return smallest_layout(
        example.image_mask,
        len(example.tokens),
        cameras=config.cameras,
        tokens_per_camera=config.tokens_per_camera,
        max_token_len=config.max_token_len,
        prompt_lengths=tuple(prompt_lengths),
    )


def all_slots(config: Pi0Config) -> PrefixLayout:
    """openpi's own layout: every camera and every prompt slot, dead or not."""
    return PrefixLayout(config.cameras, config.tokens_per_camera, config.max_token_len)


def pack(examples: Sequence[Example], layout: PrefixLayout) -> Inputs:
    """Examples of several robots, padded to one layout, as NumPy arrays with leading axis B."""
    B, T = len(examples), layout.text
    tokens, mask = np.zeros((B, T), np.int32), np.zeros((B, T), bool)
    for row, e in enumerate(examples):
        tokens[row, : len(e.tokens)] = e.tokens
        mask[row, : len(e.tokens)] = True
    return Inputs(
        images=np.stack([[e.images[c] for c in layout.cameras] for e in examples]),
        camera_mask=np.array([[e.image_mask.get(c, False) for c in layout.cameras] for e in examples]),
        tokens=tokens,
        token_mask=mask,
        state=np.stack([e.state for e in examples]),
    )


@dataclass
class Episode:
    """What one robot remembers between its control steps.

    Args:
      seed: of the noise.
      control: state on the device, leading axis 1; None before the first step.
      prompt, cameras: of the last step; others start afresh.
      chunk: [A, action_dim] float32, the network's actions of the last step.
      sent: [A, robot's width], the same as the robot was told them.
    """

    seed: int
    control: ControlState | None = None
    prompt: Any = None
    cameras: tuple[str, ...] = ()
    chunk: np.ndarray | None = None
    sent: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Asked:
    """A request, ready for the network.

    Args:
      example: the network's input.
      context: what `Transform.finish` needs.
      layout: static shape it runs in.
      prompt: as it came.
      reset: a new episode is asked for.
      noise: [A, action_dim] float32 to start the flow from; None draws it.
      overlap: how the new chunk lies on the last one, which it shall continue; None: it need not.
      seed: of the noise of the episode that begins here; None: the policy's.
    """

    example: Example
    context: Any
    layout: PrefixLayout
    prompt: Any
    reset: bool
    noise: np.ndarray | None
    overlap: Overlap | None = None
    seed: int | None = None

    @property
    def group(self) -> Hashable:
        """Requests of one group can share a device step."""
        return self.layout, self.noise is None, self.overlap is None


class Policy:
    """An engine behind one robot's transforms; safe to share between sessions.

    Args:
      engine: model and pruner.
      transform: the robot's border.
      prompt_lengths: static prompt lengths. A prompt that is longer than all of them runs at the model's
        `max_token_len`, which is then compiled when it is first needed.
      seed: seed of the noise; every session starts from it, as openpi's server does.
      describe: add the `pruning` dictionary to replies; False gives exactly openpi's reply.
      metadata: what the server tells a client on connection.
    """

    def __init__(
        self,
        engine: Engine,
        transform: Transform,
        *,
        prompt_lengths: Sequence[int] = PROMPT_LENGTHS,
        seed: int = 0,
        describe: bool = True,
        metadata: dict | None = None,
    ):
        self.engine, self.transform = engine, transform
        self.prompt_lengths = tuple(prompt_lengths)
        self.seed, self.describe = seed, describe
        self.metadata = dict(metadata or {})

    def with_pruner(self, pruner: Pruner, weights: Weights | None = None) -> "Policy":
        """The same policy with another pruner, and other weights where they are given."""
        engine = Engine(self.engine.weights if weights is None else weights, self.engine.config, pruner)
        return Policy(engine, self.transform, seed=self.seed, prompt_lengths=self.prompt_lengths)

    def session(self) -> "Session":
        """A fresh episode of one robot."""
        return Session(self)

    def warmup(self, sizes: Sequence[int] = (1,), *, real_time: bool = False) -> None:
        """Compiles and runs every program of `prompt_lengths` for robots with their usual cameras.

        Args:
          sizes: robots per device step, ascending.
          real_time: also the programs of requests with `rtc`.
        """
        config = self.engine.config
        request = self.transform.example(np.random.default_rng(0))
        example, _ = self.transform.prepare(request | {"prompt": "warm up"})
        cameras = layout_of(example, config).cameras
        for text in sorted({min(t, config.max_token_len) for t in self.prompt_lengths}):
            start = time.perf_counter()
            layout = PrefixLayout(cameras, config.tokens_per_camera, text)
            short = dataclasses.replace(example, tokens=example.tokens[:text])
            for rows in sizes:
                alone = self.engine.init((self.seed,), len(cameras))
                control = alone if rows == 1 else _stack((alone,) * rows)
                inputs = jax.device_put(pack([short] * rows, layout))
                self.engine.warmup(control, inputs)
                if real_time:
                    self.engine.warmup(control, inputs, jax.device_put(self._guide([None] * rows)))
                jax.block_until_ready(_row(control, jax.device_put(np.int32(0))))
            seconds = time.perf_counter() - start
            logger.info("compiled for %d cameras, prompt length %d in %.1f s", len(cameras), text, seconds)

    def read(self, request: dict, noise: np.ndarray | None = None) -> Asked:
        """The host's half of a control step: pure, and safe to call from several threads.

        Args:
          request: openpi's request dictionary of this robot; `"reset": True` starts a new episode, `"seed": n` is where
            its noise comes from, `"rtc": {"executed": n, "delay": d}` makes its actions continue the last ones (`rtc`).
          noise: [A, action_dim] float32 to start the flow from; None draws it.

        Raises:
          RequestError: a bad request.
        """
        example, context = self.transform.prepare(request)
        layout = layout_of(example, self.engine.config, self.prompt_lengths)
        noise = None if noise is None else np.asarray(noise, np.float32)
        reset, overlap = bool(request.get("reset", False)), _overlap(request.get("rtc"))
        seed = _seed(request.get("seed"))
        return Asked(example, context, layout, request.get("prompt"), reset, noise, overlap, seed)

    def advance(self, episodes: Sequence[Episode], asked: Sequence[Asked]) -> list[Outcome]:
        """One device step of robots whose requests are of one group, padded to a compiled size by repeating them.

        A pruned row whose score, κ or actions are not finite is computed again on the full path, from an empty memory
        and with the same noise.

        Args:
          episodes: one per robot, changed in place.
          asked: their requests, from `read`.

        Returns:
          One outcome per robot. Where also the full path gives actions that are not finite, its error is `NonFinite`
          and the episode starts afresh.
        """
        engine, layout = self.engine, asked[0].layout
        afresh = [_afresh(episode, a) for episode, a in zip(episodes, asked, strict=True)]
        for episode, new, a in zip(episodes, afresh, asked, strict=True):
            if new and a.seed is not None:
                episode.seed = a.seed
        controls = [
            engine.init((episode.seed,), len(layout.cameras)) if new else episode.control
            for episode, new in zip(episodes, afresh, strict=True)
        ]
        rows = np.resize(np.arange(len(asked)), batch_size(len(asked)))
        before = controls[0] if len(rows) == 1 else _stack(tuple(controls[row] for row in rows))
        inputs = pack([asked[row].example for row in rows], layout)
        guide, targets = None, [None] * len(asked)
        if asked[0].overlap is not None:
            targets = [None if new else self._target(*one) for new, *one in zip(afresh, episodes, asked, strict=True)]
            guide = jax.device_put(self._guide([targets[row] for row in rows]))

        start = time.perf_counter()
        noise = None if asked[0].noise is None else jax.device_put(np.stack([asked[row].noise for row in rows]))
        actions, control, info = engine.step(before, jax.device_put(inputs), noise, guide=guide)
        wanted = (actions, info.selection.score, info.selection.kappa, control.running)
        actions, scores, kappas, running = jax.device_get(wanted)
        end = time.perf_counter()

        outcomes = []
        for row, (episode, a) in enumerate(zip(episodes, asked, strict=True)):
            own = control if len(rows) == 1 else _row(control, jax.device_put(np.int32(row)))
            keyframe, acts, kappa, left = bool(info.keyframe[row]), actions[row], float(kappas[row]), running[row]
            alive = np.repeat(inputs.camera_mask[row], engine.config.tokens_per_camera)
            sound = np.isfinite(scores[row][alive]).all() and not math.isinf(kappa)
            fallback = not sound
            if not keyframe and not (sound and np.isfinite(acts).all()):
                logger.warning("a pruned step was not finite: computed again on the full path")
                acts, own = self._again(controls[row], episode.seed, a, targets[row])
                keyframe = fallback = True
                left = alive
                end = time.perf_counter()
            pruning = pruned(keyframe, kappa, left, alive) | {"views": list(layout.cameras), "text": layout.text}
            if fallback:
                pruning |= {"kappa": None, "fallback": True}
            if not np.isfinite(acts).all():
                episode.control = None
                outcomes.append(Outcome(None, NonFinite(), pruning, afresh[row]))
                continue
            episode.control, episode.prompt, episode.cameras = own, a.prompt, layout.cameras
            reply = self.transform.finish(acts, a.context)
            episode.chunk, episode.sent = acts, np.asarray(reply["actions"])
            reply["policy_timing"] = timing(start, info.decided_at, end)
            if a.overlap is not None:
                reply["rtc"] = _describe_overlap(a.overlap, 0 if targets[row] is None else len(acts))
            if self.describe:
                reply["pruning"] = pruning
            outcomes.append(Outcome(reply, None, pruning, afresh[row]))
        return outcomes

    def _target(self, episode: Episode, asked: Asked) -> tuple[np.ndarray, np.ndarray]:
        """What a chunk shall agree with, [A, action_dim], and how much, [A]."""
        finish = lambda actions: np.asarray(self.transform.finish(actions, asked.context)["actions"])
        chunk = rebase(episode.chunk, episode.sent, finish)
        return remaining(chunk, asked.overlap), soft_mask(len(chunk), asked.overlap)

    def _guide(self, targets: Sequence[tuple[np.ndarray, np.ndarray] | None]) -> Guide:
        """Targets of a batch, None where there is none, as NumPy arrays with leading axis B."""
        config, B = self.engine.config, len(targets)
        target = np.zeros((B, config.action_horizon, config.action_dim), np.float32)
        weight = np.zeros((B, config.action_horizon), np.float32)
        for row, one in enumerate(targets):
            if one is not None:
                target[row], weight[row] = one
        # with few denoise steps β would carry the flow beyond its target
        limit = min(MAX_GUIDANCE, self.engine.weights.schedule.times.shape[0])
        return Guide(target, weight, np.full(B, limit, np.float32))

    def _again(
        self, control: ControlState, seed: int, asked: Asked, target: tuple[np.ndarray, np.ndarray] | None
    ) -> tuple[np.ndarray, ControlState]:
        """One robot's step on the full path, from an empty memory: actions on the host, the state after it."""
        empty = self.engine.init((seed,), len(asked.layout.cameras)).replace(key=control.key)
        noise = None if asked.noise is None else jax.device_put(asked.noise[None])
        inputs = jax.device_put(pack([asked.example], asked.layout))
        guide = None if asked.overlap is None else jax.device_put(self._guide([target]))
        actions, control, _ = self.engine.step(empty, inputs, noise, full=True, guide=guide)
        return jax.device_get(actions)[0], control


class Session:
    """One robot, one episode after the other. Not for use by two threads at once.

    Args:
      policy: the shared policy.
    """

    def __init__(self, policy: Policy):
        self.policy = policy
        self._episode = Episode(policy.seed)

    def reset(self) -> None:
        """Forgets the episode: the next step is a keyframe and the noise starts from the policy's seed."""
        self._episode.control = None

    def infer(self, request: dict, *, noise: np.ndarray | None = None) -> dict:
        """One control step.

        Args:
          request: openpi's request dictionary of this robot; `"reset": True` starts a new episode.
          noise: [A, action_dim] float32 to start the flow from; None draws it.

        Returns:
          "actions" float64 [A, robot's action width]; "policy_timing" in milliseconds, measured until the actions
          are on the host: `infer_ms` (device work and transfers), and where the pruner decides `shallow_ms` (until
          its decision is known) and `rest_ms`; "pruning" with `kept` and `alive` visual tokens, `keyframe`,
          `kappa` (None where undefined), `index`, the visual slots left after the last cut, ascending, the cameras
          (`views`) and prompt slots (`text`) of this step, and `fallback` (True) if it had to be computed on the full
          path because something was not finite; with an `rtc` request "rtc": `overlap` steps of the last chunk that
          this one continues (0: there was none) and `frozen`, how many of them are executed meanwhile.

        Raises:
          RequestError: a bad request; the session is as it was before.
          NonFinite: the model returned non-finite actions also on the full path; the session is reset.
        """
        (outcome,) = self.policy.advance([self._episode], [self.policy.read(request, noise)])
        if outcome.error is not None:
            raise outcome.error
        return outcome.reply


def _overlap(asked: Any) -> Overlap | None:
    """The request's `rtc`."""
    if asked is None:
        return None
    advice = 'send {"executed": steps since the last observation, "delay": steps until the reply}'
    expected = "a map with two whole numbers of control steps, executed and delay"
    if not isinstance(asked, dict) or not {"executed", "delay"} <= set(asked):
        raise RequestError("rtc", expected, brief(asked), advice)
    try:
        return Overlap(asked["executed"], asked["delay"])
    except ValueError as error:
        raise RequestError("rtc", expected, str(error), advice) from error


def _seed(asked: Any) -> int | None:
    """The request's `seed`."""
    if asked is None:
        return None
    if isinstance(asked, int | np.integer) and not isinstance(asked, bool) and 0 <= asked < 2**31:
        return int(asked)
    advice = "leave it away for the server's own"
    raise RequestError("seed", "a whole number from 0 to 2³¹ - 1", repr(asked)[:40], advice)


def _describe_overlap(overlap: Overlap, horizon: int) -> dict:
    return {"frozen": overlap.frozen(horizon), "overlap": overlap.left(horizon)}


def _afresh(episode: Episode, asked: Asked) -> bool:
    return (
        episode.control is None
        or asked.reset
        or asked.prompt != episode.prompt
        or asked.layout.cameras != episode.cameras
    )


@jax.jit
def _stack(controls: tuple[ControlState, ...]) -> ControlState:
    """Control states of single robots → of a batch."""
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *controls)


@jax.jit
def _row(control: ControlState, row: jax.Array) -> ControlState:
    """One robot's control state out of a batch, still with its batch axis."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, row, 1), control)
