"""From raw requests to replies: `Policy` is shared and stateless, `Session` is one robot's episode.

    policy = load_policy("pi05_libero", "gs://…", pruner=safe(keep=0.2))
    session = policy.session()
    reply = session.infer(request)        # openpi's request and reply, plus reply["pruning"]

A control step has two halves: `Policy.prepare` turns a request into the network's input on the host, `Policy.advance`
runs one device step for robots of one layout. What a robot remembers between its steps is an `Episode`; it starts
afresh on `"reset": True`, on a changed prompt and on a changed set of cameras. `Session` is one robot alone; `fleet`
has many.
"""

import dataclasses
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np

from safe_pruner_jax.engine.attention import ROWS
from safe_pruner_jax.engine.engine import ControlState, Engine, Inputs, batch_size
from safe_pruner_jax.model.config import Pi0Config
from safe_pruner_jax.model.guidance import MAX_GUIDANCE, Guide
from safe_pruner_jax.model.pi0 import Weights
from safe_pruner_jax.policy.attention import Attention
from safe_pruner_jax.policy.episode import (
    Episode,
    Prepared,
    Transform,
    read_overlap,
    read_seed,
    row_of,
    stack,
    starts_afresh,
)
from safe_pruner_jax.policy.overlap import Overlap, rebase, remaining, soft_mask
from safe_pruner_jax.policy.reply import NonFinite, Result, pruned, timing
from safe_pruner_jax.pruners import Pruner
from safe_pruner_jax.robots.transforms import Example
from safe_pruner_jax.tokens import PROMPT_LENGTHS, PrefixLayout, smallest_layout

logger = logging.getLogger(__name__)


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


@dataclass(frozen=True, eq=False)
class _Batch:
    """Robots of one group, assembled for a device step.

    Args:
      fresh: per robot, whether an episode begins.
      controls: per robot, the state before the step.
      rows: robot of every row; the last ones repeat to fill a compiled size.
      inputs: of every row, on the host.
      targets: per robot, what its chunk continues; None: nothing.
      guide: the targets of every row on the device; None without real-time chunking.
    """

    fresh: Sequence[bool]
    controls: Sequence[ControlState]
    rows: Sequence[int]
    inputs: Inputs
    targets: Sequence[tuple[np.ndarray, np.ndarray] | None]
    guide: Guide | None


class _Finished(NamedTuple):
    """One robot's part of a device step, on the host but for `control`; `fallback`: something was not finite."""

    keyframe: bool
    actions: np.ndarray
    score: np.ndarray
    kappa: float
    running: np.ndarray
    control: ControlState
    fallback: bool


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
        self.attention = Attention(engine)

    def with_pruner(self, pruner: Pruner, weights: Weights | None = None) -> "Policy":
        """The same policy with another pruner, and other weights where they are given."""
        engine = Engine(self.engine.weights if weights is None else weights, self.engine.config, pruner)
        return Policy(engine, self.transform, seed=self.seed, prompt_lengths=self.prompt_lengths)

    def session(self) -> "Session":
        """A fresh episode of one robot."""
        return Session(self)

    def check(self) -> None:
        """Raises ValueError if no robot with the usual cameras can have this pruner: `keep` above its tokens, say."""
        self.engine.init((self.seed,), len(self._usual()[1]))

    def _usual(self) -> tuple[Example, tuple[str, ...]]:
        """An example of this robot's, and its alive cameras."""
        request = self.transform.example(np.random.default_rng(0))
        example, _ = self.transform.prepare(request | {"prompt": "warm up"})
        return example, layout_of(example, self.engine.config).cameras

    def warmup(self, sizes: Sequence[int] = (1,), *, real_time: bool = False, attention: bool = False) -> None:
        """Compiles and runs every program of `prompt_lengths` for robots with their usual cameras.

        Args:
          sizes: robots per device step, ascending.
          real_time: also the programs of requests with `rtc`.
          attention: also those of requests with `attention`.
        """
        config, (example, cameras) = self.engine.config, self._usual()
        for text in sorted({min(t, config.max_token_len) for t in self.prompt_lengths}):
            start = time.perf_counter()
            layout = PrefixLayout(cameras, config.tokens_per_camera, text)
            short = dataclasses.replace(example, tokens=example.tokens[:text])
            alone = self.engine.init((self.seed,), len(cameras))
            for of in ROWS if attention else ():
                self.attention.every_layer(of, jax.device_put(pack([short], layout)), alone.key[0])
            for rows in sizes:
                control = alone if rows == 1 else stack((alone,) * rows)
                inputs = jax.device_put(pack([short] * rows, layout))
                self.engine.warmup(control, inputs)
                if real_time:
                    self.engine.warmup(control, inputs, jax.device_put(self._guide([None] * rows)))
                jax.block_until_ready(row_of(control, jax.device_put(np.int32(0))))
            seconds = time.perf_counter() - start
            logger.info("compiled for %d cameras, prompt length %d in %.1f s", len(cameras), text, seconds)

    def prepare(self, request: dict, noise: np.ndarray | None = None) -> Prepared:
        """The host's half of a control step: pure, and safe to call from several threads.

        Args:
          request: openpi's request dictionary of this robot; `"reset": True` starts a new episode, `"seed": n` is where
            its noise comes from, `"rtc": {"executed": n, "delay": d}` makes its actions continue the last ones
            (`policy.overlap`), `"attention": {"layers": […], "of": "action"}` gets grids (`policy.attention`).
          noise: [A, action_dim] float32 to start the flow from; None draws it.

        Raises:
          RequestError: a bad request.
        """
        example, context = self.transform.prepare(request)
        return Prepared(
            example=example,
            context=context,
            layout=layout_of(example, self.engine.config, self.prompt_lengths),
            prompt=request.get("prompt"),
            reset=bool(request.get("reset", False)),
            noise=None if noise is None else np.asarray(noise, np.float32),
            overlap=read_overlap(request.get("rtc")),
            seed=read_seed(request.get("seed")),
            attention=self.attention.read(request.get("attention")),
        )

    def advance(self, episodes: Sequence[Episode], prepared: Sequence[Prepared]) -> list[Result]:
        """One device step of robots whose requests are of one group, padded to a compiled size by repeating them.

        A pruned row whose score, κ or actions are not finite is computed again on the full path, from an empty memory
        and with the same noise.

        Args:
          episodes: one per robot, changed in place.
          prepared: their requests, from `prepare`.

        Returns:
          One result per robot. Where also the full path gives actions that are not finite, its error is `NonFinite`
          and the episode starts afresh.
        """
        batch = self._assemble(episodes, prepared)
        before = batch.controls[0] if len(batch.rows) == 1 else stack(tuple(batch.controls[r] for r in batch.rows))

        start = time.perf_counter()
        noise = None
        if prepared[0].noise is not None:
            noise = jax.device_put(np.stack([np.asarray(prepared[row].noise) for row in batch.rows]))
        actions, control, info = self.engine.step(before, jax.device_put(batch.inputs), noise, guide=batch.guide)
        step = jax.device_get((actions, info.selection.score, info.selection.kappa, control.running))
        end = time.perf_counter()

        results = []
        for row, (episode, request) in enumerate(zip(episodes, prepared, strict=True)):
            state = control if len(batch.rows) == 1 else row_of(control, jax.device_put(np.int32(row)))
            finished, sound = self._read(step, row, batch, keyframe=bool(info.keyframe[row]), control=state)
            if not sound:
                finished = self._again(finished, batch, row, episode.seed, request)
                end = time.perf_counter()
            times = timing(start, info.decided_at, end)
            results.append(self._conclude(episode, request, finished, batch, row, times=times))
            if request.attention is not None and (reply := results[-1].reply) is not None:
                reply["attention"] = self._look(request, batch.controls[row])
        return results

    def _look(self, request: Prepared, before: ControlState) -> dict:
        """`attention` of a reply; `before` is the control state that the step began with."""
        assert request.attention is not None, "nobody asked"
        inputs = jax.device_put(pack([request.example], request.layout))
        noise = None if request.noise is None else jax.device_put(request.noise[None])
        return self.attention(request.attention, request.layout, inputs, before.key[0], noise)

    def _assemble(self, episodes: Sequence[Episode], prepared: Sequence[Prepared]) -> _Batch:
        """The batch of a device step; an episode that begins takes the seed of its request."""
        layout = prepared[0].layout
        fresh = [starts_afresh(episode, p) for episode, p in zip(episodes, prepared, strict=True)]
        for episode, new, p in zip(episodes, fresh, prepared, strict=True):
            if new and p.seed is not None:
                episode.seed = p.seed
        controls = [
            self.engine.init((episode.seed,), len(layout.cameras)) if new else episode.control
            for episode, new in zip(episodes, fresh, strict=True)
        ]
        rows = np.resize(np.arange(len(prepared)), batch_size(len(prepared))).tolist()
        inputs = pack([prepared[row].example for row in rows], layout)
        guide = None
        targets: list[tuple[np.ndarray, np.ndarray] | None] = [None] * len(prepared)
        if prepared[0].overlap is not None:
            parts = zip(fresh, episodes, prepared, strict=True)
            targets = [None if new else self._target(episode, p) for new, episode, p in parts]
            guide = jax.device_put(self._guide([targets[row] for row in rows]))
        return _Batch(fresh, controls, rows, inputs, targets, guide)

    def _alive(self, batch: _Batch, row: int) -> np.ndarray:
        """[n] bool, one robot's visual tokens before any cut."""
        return np.repeat(batch.inputs.camera_mask[row], self.engine.config.tokens_per_camera)

    def _read(
        self, step: tuple[np.ndarray, ...], row: int, batch: _Batch, *, keyframe: bool, control: ControlState
    ) -> tuple[_Finished, bool]:
        """One robot's row of a step (actions, scores, κ, running), and whether it may be used as it is."""
        actions, score, kappa, running = (array[row] for array in step)
        decided = np.isfinite(score[self._alive(batch, row)]).all() and not math.isinf(float(kappa))
        sound = keyframe or bool(decided and np.isfinite(actions).all())
        return _Finished(keyframe, actions, score, float(kappa), running, control, fallback=not decided), sound

    def _conclude(
        self, episode: Episode, request: Prepared, finished: _Finished, batch: _Batch, row: int, *, times: dict
    ) -> Result:
        """The reply to one robot; its episode remembers what the next step needs."""
        pruning = self._pruning(finished, batch, row, request.layout)
        if not np.isfinite(finished.actions).all():
            episode.control = None
            return Result(None, NonFinite(), pruning, batch.fresh[row])
        reply = self.transform.finish(finished.actions, request.context)
        episode.control, episode.prompt, episode.cameras = finished.control, request.prompt, request.layout.cameras
        episode.chunk, episode.sent = finished.actions, np.asarray(reply["actions"])
        reply["policy_timing"] = times
        if request.overlap is not None:
            reply["rtc"] = _describe_overlap(
                request.overlap, 0 if batch.targets[row] is None else len(finished.actions)
            )
        if self.describe:
            reply["pruning"] = pruning
        saliency = {"score": finished.score, "late": finished.control.late}
        return Result(reply, None, pruning, batch.fresh[row], saliency)

    def _pruning(self, finished: _Finished, batch: _Batch, row: int, layout: PrefixLayout) -> dict:
        """`pruning` of a reply."""
        kept = pruned(finished.keyframe, finished.kappa, finished.running, self._alive(batch, row))
        kept |= {"views": list(layout.cameras), "text": layout.text}
        return kept | ({"kappa": None, "fallback": True} if finished.fallback else {})

    def _target(self, episode: Episode, request: Prepared) -> tuple[np.ndarray, np.ndarray]:
        """What a chunk shall agree with, [A, action_dim], and how much, [A]."""

        def finish(actions: np.ndarray) -> np.ndarray:
            return np.asarray(self.transform.finish(actions, request.context)["actions"])

        chunk = rebase(episode.chunk, episode.sent, finish)
        return remaining(chunk, request.overlap), soft_mask(len(chunk), request.overlap)

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

    def _again(self, finished: _Finished, batch: _Batch, row: int, seed: int, request: Prepared) -> _Finished:
        """One robot's step on the full path, from an empty memory and with the same noise."""
        logger.warning("a pruned step was not finite: computed again on the full path")
        empty = self.engine.init((seed,), len(request.layout.cameras)).replace(key=batch.controls[row].key)
        noise = None if request.noise is None else jax.device_put(request.noise[None])
        inputs = jax.device_put(pack([request.example], request.layout))
        guide = None if request.overlap is None else jax.device_put(self._guide([batch.targets[row]]))
        actions, control, _ = self.engine.step(empty, inputs, noise, full=True, guide=guide)
        alive = self._alive(batch, row)
        return _Finished(
            True, jax.device_get(actions)[0], finished.score, finished.kappa, alive, control, fallback=True
        )


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
        (result,) = self.policy.advance([self._episode], [self.policy.prepare(request, noise)])
        if result.error is not None:
            raise result.error
        assert result.reply is not None, "a result is a reply or an error"
        return result.reply


def _describe_overlap(overlap: Overlap, horizon: int) -> dict:
    return {"frozen": overlap.frozen(horizon), "overlap": overlap.left(horizon)}
