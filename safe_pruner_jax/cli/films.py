"""What `openpi export` writes: episodes as pictures, columns of numbers, and what a policy decided at each row."""

import contextlib
import logging
import math
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from safe_pruner_jax.analysis.episodes import EXAMPLE, stride
from safe_pruner_jax.analysis.view import Frame, look_on
from safe_pruner_jax.evaluation.records import Record
from safe_pruner_jax.evaluation.rollout import rollout
from safe_pruner_jax.lerobot.dataset import require_local
from safe_pruner_jax.lerobot.repack import COLUMNS
from safe_pruner_jax.libero.demonstrations import Demo, read_demos, read_packed
from safe_pruner_jax.libero.env import LiberoEnv, load_task
from safe_pruner_jax.model.config import CAMERAS
from safe_pruner_jax.policy.embedded import embedded_folder
from safe_pruner_jax.policy.identity import SERVED
from safe_pruner_jax.robots.configs import get_config
from safe_pruner_jax.robots.transform import PolicyConfig
from safe_pruner_jax.serving.episodes import SUFFIX, read_episode

Infer = Callable[[dict[str, Any]], dict[str, Any]]
"""Request to reply, one robot."""

logger = logging.getLogger(__name__)

IMAGES = "observation.images."
LIVE = "libero:"


class Film(NamedTuple):
    """One episode of T rows.

    Args:
      task: what the robot was told.
      images: feature → T frames uint8 [H, W, 3].
      columns: feature → [T, …].
    """

    task: str
    images: dict[str, Iterable[np.ndarray]]
    columns: dict[str, np.ndarray]


def films(source: str, config: PolicyConfig, replan: int, robot: Callable[[], Infer] | None) -> Iterator[Film]:
    """The episodes of a source.

    Args:
      source: a file of demonstrations or "example"; a `.episode` file, or a folder of them or of `step_*.npy`;
        libero:SUITE/TASK/TRIAL.
      config: of the policy; recordings that name their own follow that.
      replan: robot actions between two calls.
      robot: makes a policy's session; demonstrations are shown to it, live episodes played by it. None: nobody looks.

    Raises:
      ValueError: a source of another kind or on the hub, a live one without a policy, a damaged recording.
      OSError: a file that cannot be read.
    """
    path = Path(str(embedded_folder().parent / "recordings" / "cream_cheese.zip") if source == EXAMPLE else source)
    if source.startswith(LIVE):
        if robot is None:
            raise ValueError(f"data: expected a policy that plays {source}, got none; add --watch")
        yield _played(source, config, replan, robot())
    elif path.is_dir():
        yield from _recordings(path, config)
    elif path.suffix == SUFFIX:
        yield _recorded(path)
    else:
        require_local(path)
        if not path.is_file():
            forms = "demonstrations, recordings, records of an evaluation, libero:SUITE/TASK/TRIAL or ws://HOST:PORT"
            raise ValueError(f"data: expected {forms}, got {source}, which does not exist")
        for demo in (read_demos if path.suffix in (".hdf5", ".h5") else read_packed)(path):
            yield _demonstrated(demo, config, replan, None if robot is None else robot())


def decisions(replies: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """What replies tell of pruning, latency and attention: feature → [calls, …]; nothing that one of them lacks.

    Returns:
      "pruning.keyframe" bool, "pruning.kappa" float32 (NaN without a comparison), "pruning.tokens" int64,
      "pruning.kept.CAMERA" bool [calls, g, g], "pruning.attention.CAMERA" float32 [calls, layers, g, g],
      "policy.latency_ms" float32.
    """
    columns: dict[str, np.ndarray] = {}
    times = [(reply.get("policy_timing") or reply.get("server_timing") or {}).get("infer_ms") for reply in replies]
    if None not in times:
        columns["policy.latency_ms"] = np.asarray(times, np.float32)
    prunings = [reply.get("pruning") for reply in replies]
    if all(prunings):
        columns["pruning.keyframe"] = np.array([pruning["keyframe"] for pruning in prunings])
        kappa = [np.nan if pruning["kappa"] is None else pruning["kappa"] for pruning in prunings]
        columns["pruning.kappa"] = np.asarray(kappa, np.float32)
        columns["pruning.tokens"] = np.array([pruning["kept"] for pruning in prunings], np.int64)
        columns |= _kept(prunings)
    grids = [reply["attention"]["grids"] for reply in replies if reply.get("attention")]
    if grids and len(grids) == len(replies):
        for camera in grids[0]:
            layers = np.stack([np.asarray(grid[camera], np.float32) for grid in grids])
            columns[f"pruning.attention.{camera}"] = layers
    return columns


def _kept(prunings: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Boolean masks of the patches that are left after the last cut, for the cameras of the first reply."""
    rows = []
    for pruning in prunings:
        views = pruning["views"]
        side, mask = math.isqrt(pruning["alive"] // len(views)), np.zeros(pruning["alive"], bool)
        mask[np.asarray(pruning["index"])] = True
        rows.append(dict(zip(views, mask.reshape(len(views), side, side), strict=True)))
    blank = np.zeros_like(next(iter(rows[0].values())))
    return {f"pruning.kept.{camera}": np.stack([row.get(camera, blank) for row in rows]) for camera in rows[0]}


def _demonstrated(demo: Demo, config: PolicyConfig, replan: int, look: Infer | None) -> Film:
    """A row per action; a frame, and what the policy made of the last call, are held until the next."""
    rows = np.arange(len(demo))
    keys = dict(zip(("observation/image", "observation/wrist_image"), CAMERAS, strict=False))
    held = lambda frames: (frames[t // demo.every] for t in rows)
    columns = {"observation.state": demo.state, "action": demo.actions}
    if look is not None:
        called = list(range(0, len(demo), stride(demo.every, replan) * demo.every))
        replies = []
        for t in called:
            request = {key: demo.images[key][t // demo.every] for key in keys}
            replies.append(look(request | {"observation/state": demo.state[t], "prompt": demo.prompt}))
        last = np.searchsorted(called, rows, side="right") - 1
        columns |= {key: values[last] for key, values in decisions(replies).items()}
        columns["policy.call"] = np.isin(rows, called)
    return Film(demo.prompt, {IMAGES + keys[key]: held(demo.images[key]) for key in keys}, columns)


def _of_calls(steps: Sequence[tuple[dict[str, Any], dict[str, Any]]], config: PolicyConfig) -> Film:
    """A row per call, with the first action of its chunk, and the chunk."""
    robot, images = config.robot, {}
    values: dict[str, list[np.ndarray]] = {}
    entries = {entry: names[-1] for entry, names in COLUMNS[robot.name].items() if "image" not in entry}
    prompt = None
    for request, _ in steps:
        raw = robot.input(request)
        prompt = raw.get("prompt", prompt)
        for camera in (camera for camera, real in raw["image_mask"].items() if real):
            images.setdefault(IMAGES + camera, []).append(raw["image"][camera])
        for entry, name in entries.items():
            values.setdefault(name, []).append(np.asarray(request[entry], np.float32))
    chunks = np.stack([np.asarray(reply["actions"], np.float32) for _, reply in steps])
    columns = {name: np.stack(rows) for name, rows in values.items()} | {"action": chunks[:, 0], "action_chunk": chunks}
    task = prompt or config.default_prompt or ""
    return Film(task, images, columns | decisions([reply for _, reply in steps]))


def _recorded(path: Path) -> Film:
    episode = read_episode(path)
    if not episode.steps:
        raise ValueError(f"{path}: expected at least one step, got none; nothing was answered before it ended")
    config = get_config(episode.header["config"])
    return _of_calls([(step["request"], step["reply"]) for step in episode.steps], config)


def _recordings(folder: Path, config: PolicyConfig) -> Iterator[Film]:
    """Every `.episode` of a folder, or its `step_*.npy` in order, cut where the prompt changes."""
    if files := sorted(folder.glob(f"*{SUFFIX}")):
        yield from (_recorded(file) for file in files)
        return
    numbered = sorted(folder.glob("step_*.npy"), key=lambda file: int(file.stem.removeprefix("step_")))
    if not numbered:
        raise ValueError(f"data: expected *{SUFFIX} or step_*.npy in {folder}, got neither; give what --record wrote")
    steps: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for file in numbered:
        request, reply = _flat(file)
        if steps and request.get("prompt") != steps[-1][0].get("prompt"):
            yield _of_calls(steps, config)
            steps = []
        steps.append((request, reply))
    yield _of_calls(steps, config)


def _flat(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Request and reply of one of openpi's records, a pickle: open only what you recorded yourself."""
    try:
        flat = np.load(file, allow_pickle=True).item()
        request, reply = (_nested(flat, side) for side in ("inputs/", "outputs/"))
        _ = reply["actions"]
    except (pickle.UnpicklingError, EOFError, AttributeError, KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{file}: expected a record of openpi's server, got another file ({error})") from error
    return request, reply


def _nested(flat: Mapping[str, Any], side: str) -> dict[str, Any]:
    """One side of openpi's record, with the entries that robots send flat as they send them."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        if not key.startswith(side):
            continue
        group, *names = key.removeprefix(side).split("/")
        if not names or group not in ("images", "pruning", "policy_timing", "attention"):
            nested[key.removeprefix(side)] = value
            continue
        place = nested
        for name in (group, *names[:-1]):
            place = place.setdefault(name, {})
        place[names[-1]] = value
    return nested


def observed(url: str, key: str | None, config: PolicyConfig) -> Iterator[Film]:
    """Episodes of a running server's robots, as they end; when the server stops or at Ctrl-C, those that go on, too.

    Args:
      url: ws://host:port of a server with `--serving.watch`.
      key: its API key.
      config: of a server that does not tell its own.

    Yields:
      A row per call that was seen; an observer misses calls when robots are faster, "policy.step" tells which.

    Raises:
      ValueError: the server cannot be reached or lets nobody look on.
    """
    metadata, frames = look_on(url, key)
    if name := metadata.get(SERVED, {}).get("configuration", {}).get("policy"):
        config = get_config(name)
    running: dict[str, list[Frame]] = {}
    with contextlib.suppress(KeyboardInterrupt):
        for frame in frames:
            if frame.number == 0 and frame.robot in running:
                yield _seen(running.pop(frame.robot), config)
            running.setdefault(frame.robot, []).append(frame)
    yield from (_seen(steps, config) for steps in running.values())


def _seen(steps: Sequence[Frame], config: PolicyConfig) -> Film:
    """Steps of one robot, a row per call."""
    images = {IMAGES + camera: [step.images[camera] for step in steps] for camera in steps[0].images}
    chunks = np.stack([np.asarray(step.reply["actions"], np.float32) for step in steps])
    columns = {"action": chunks[:, 0], "action_chunk": chunks, "policy.step": np.array([s.number for s in steps])}
    states = [step.state for step in steps if step.state is not None]
    if len(states) == len(steps):
        columns["observation.state"] = np.stack(states).astype(np.float32)
    replies = [step.reply for step in steps]
    return Film(steps[0].prompt or config.default_prompt or "", images, columns | decisions(replies))


def evaluated(
    records: Iterable[Record], config: PolicyConfig, replan: int, robot: Callable[[], Infer]
) -> Iterator[Film]:
    """The episodes of an evaluation, played again from the same initial states; a row per call.

    A policy that draws noise (temperature above 0) draws other noise; an episode that ends otherwise is logged.
    """
    for record in records:
        source = f"{LIVE}{record.suite}/{record.task}/{record.trial}"
        film = _played(source, config, replan, robot())
        outcome = "success" if film.columns["next.success"].any() else "failure"
        if outcome != record.outcome:
            logger.warning("%s: a %s here, a %s in the evaluation", source, outcome, record.outcome)
        yield film


def _played(source: str, config: PolicyConfig, replan: int, infer: Infer) -> Film:
    """An episode of the policy in LIBERO, a row per call."""
    try:
        suite, task, trial = source.removeprefix(LIVE).split("/")
        place = load_task(suite, int(task))
        number = int(trial)
    except ValueError as error:
        form = "libero:SUITE/TASK/TRIAL, for example libero:libero_object/0/0"
        raise ValueError(f"data: expected {form}, got {source} ({error})") from error
    steps: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def ask(request: dict[str, Any]) -> dict[str, Any]:
        steps.append((request, infer(request)))
        return steps[-1][1]

    with LiberoEnv(place) as env:
        episode = rollout(env, ask, init_state=number, replan=replan)
    if not steps or episode.outcome == "error":
        raise ValueError(f"{source}: expected an episode, got {episode.error}")
    film, last = _of_calls(steps, config), np.arange(len(steps)) == len(steps) - 1
    film.columns["next.done"] = last
    film.columns["next.success"] = last & (episode.outcome == "success")
    return film
