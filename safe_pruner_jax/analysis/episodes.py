"""Episodes to analyse: what the policy is asked at every call, and what the gripper is told meanwhile.

    for recording in episodes("demos/butter_demo.hdf5"):            LIBERO's files, human or scripted
    for recording in episodes("suite.zip"):                       packed archives
    for recording in episodes("my_dataset", robot="DROID"):       folders of LeRobot datasets
    for recording in episodes("policy_records"):                  what `openpi serve --record` wrote; or one .episode
    for recording in episodes("scenes/milk_demo_7.npz"):          labelled episodes of scripts/collect_scenes.py
    for recording in episodes("libero:libero_object/0/3"):        suite/task/trial, played live by the scripted expert
    for recording in episodes("example"):                         the recording inside this package

A recording is lazy: nothing is decoded or simulated before its calls are asked for.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from safe_pruner_jax.lerobot.dataset import Dataset, Episode, is_dataset, require_local
from safe_pruner_jax.lerobot.repack import columns, grippers, requests
from safe_pruner_jax.libero.demonstrations import Demo, read_demos, read_packed
from safe_pruner_jax.libero.labels import CLASSES
from safe_pruner_jax.libero.scenes import read
from safe_pruner_jax.robots.robots import LIBERO
from safe_pruner_jax.serving.episodes import SUFFIX, read_episode

EXAMPLE = "example"
"""The source that needs no file: one scripted episode of LIBERO inside the package."""

_LIVE = "libero:"
_STATE = 8  # values of LIBERO's state


class Seen(NamedTuple):
    """What is where in the pictures of a call.

    Args:
      classes: uint8 [cameras, S, S], class of every pixel, see `libero.labels`.
      target: class of the object that is named.
      receptacle: class of what it is put into.
    """

    classes: np.ndarray
    target: int
    receptacle: int


class Call(NamedTuple):
    """One policy call: openpi's request, the gripper command executed at that moment (≤ 0 open, > 0 closed), and what
    is where, if the source knows."""

    request: dict[str, Any]
    gripper: float
    seen: Seen | None = None


@dataclass(frozen=True)
class Recording:
    """One episode: a name that tells it from all others, and `calls()`, which yields `Call` after `Call`."""

    name: str
    calls: Callable[[], Iterator[Call]]


def episodes(
    source: str | Path,
    *,
    replan: int = 5,
    infer: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    robot: str = LIBERO.name,
) -> Iterator[Recording]:
    """The episodes of a source, see the module's docstring.

    Args:
      source: a file of demonstrations, "example", or "libero:SUITE/TASK/TRIAL".
      replan: robot actions between two calls. Demonstrations with a frame of every n-th step are asked at the multiple
        of n that is nearest to it, and at every frame if n is larger.
      infer: drives live episodes, request to reply with "actions"; None: the scripted expert does.
      robot: whose requests a LeRobot dataset becomes; all other sources are LIBERO's.

    Raises:
      ValueError: replan < 1, a live source that is not suite/task/trial, a dataset of another robot or on the hub, or
        a source of LIBERO's robot for another.
      OSError: a file that cannot be read.
      LiberoUnavailable: a live source without the simulator.
    """
    if replan < 1:
        raise ValueError(f"replan: expected at least 1 action per call, got {replan}")
    if robot != LIBERO.name and not is_dataset(source):
        raise ValueError(f"data: expected a LeRobot dataset for {robot}, got {source}, which is of LIBERO's robot")
    if str(source).startswith(_LIVE):
        yield _live(str(source), replan, infer)
        return
    path = Path(str(resources.files("safe_pruner_jax") / "assets" / "recordings" / "cream_cheese.zip"))
    path = path if str(source) == EXAMPLE else Path(source)
    if is_dataset(path):
        data = Dataset(path)
        named = columns(data, robot)
        for entry in data.episodes():
            yield Recording(f"{path.name}#{entry.index}", lambda entry=entry: _repacked(entry, named, replan, robot))
        return
    require_local(path)
    if records := _records(path):
        for file in records:
            yield Recording(file.stem, lambda file=file: _served(file))
        return
    if not path.is_file():
        what = "a folder without meta/info.json" if path.is_dir() else "nothing there"
        forms = "a file of demonstrations, a LeRobot dataset, libero:SUITE/TASK/TRIAL or example"
        raise ValueError(f"data: expected {forms}, got {path}, {what}")
    if path.suffix == ".npz":
        yield Recording(f"{path.parent.name}/{path.stem}", lambda: _labelled(path))
        return
    decode = read_demos if path.suffix in (".hdf5", ".h5") else read_packed
    for number, demo in enumerate(decode(path)):
        yield Recording(f"{path.parent.name}/{path.stem}#{number}", lambda demo=demo: _recorded(demo, replan))


def stride(every: int, replan: int) -> int:
    """Frames from one call to the next: `every` steps lie between two frames, about `replan` between two calls.

    >>> stride(1, 5), stride(3, 5), stride(10, 5)
    (5, 2, 1)
    """
    return max(1, round(replan / every))


def _recorded(demo: Demo, replan: int) -> Iterator[Call]:
    frames = len(next(iter(demo.images.values())))
    for frame in range(0, frames, stride(demo.every, replan)):
        step = frame * demo.every
        request = {key: images[frame] for key, images in demo.images.items()}
        request |= {"observation/state": demo.state[step], "prompt": demo.prompt}
        yield Call(request, float(demo.actions[step, 6]))


def _records(path: Path) -> list[Path]:
    """Recorded episodes: the file, those of a folder in the order in which they were begun, or none."""
    if path.is_dir():
        return sorted(path.glob(f"*{SUFFIX}"))
    return [path] if path.suffix == SUFFIX else []


def _served(path: Path) -> Iterator[Call]:
    """Every request of a recorded episode is a call; the gripper is the last number of the reply's first action."""
    for step in read_episode(path).steps:
        yield Call(step["request"], float(np.asarray(step["reply"]["actions"])[0, -1]))


def _labelled(path: Path) -> Iterator[Call]:
    """Every frame of a labelled episode is a call, whatever lies between two of them."""
    frames, about = read(path)
    if about["what"] == "scenes":
        raise ValueError(f"{path}: expected an episode, got single scenes; give files with _demo_ or _correct_")
    receptacle = len(CLASSES) + about["kinds"].index(about["receptacle"])
    for t, target in enumerate(frames["target"]):
        outside, wrist = frames["image"][t]
        words = about["instructions"][target]
        request = {"observation/image": outside, "observation/wrist_image": wrist, "prompt": words}
        request |= {"observation/state": np.zeros(_STATE, np.float32)}  # labelled frames have none
        seen = Seen(frames["segmentation"][t], len(CLASSES) + int(frames["named"][t, target]), receptacle)
        yield Call(request, float(frames["actions"][t, 0, 6]), seen)


def _repacked(episode: Episode, named: dict[str, str], replan: int, robot: str) -> Iterator[Call]:
    gripper = grippers(episode, named, robot)
    for t, request in enumerate(requests(episode, named)):
        if t % replan == 0:
            yield Call(request, float(gripper[t]))


def _live(source: str, replan: int, infer: Callable | None) -> Recording:
    try:
        suite, task, trial = source.removeprefix(_LIVE).split("/")
        place = suite, int(task), int(trial)
    except ValueError:
        form = "libero:SUITE/TASK/TRIAL, for example libero:libero_object/0/0"
        raise ValueError(f"data: expected {form}, got {source}") from None
    driver = "expert" if infer is None else "policy"
    return Recording(f"{source} by the {driver}", lambda: _played(place, replan, infer))


def _played(place: tuple[str, int, int], replan: int, infer: Callable | None) -> Iterator[Call]:
    from safe_pruner_jax.libero.expert import Expert
    from safe_pruner_jax.libero.shuffled import open_env
    from safe_pruner_jax.libero.suites import load_task

    suite, task, trial = place
    with open_env(load_task(suite, task)) as env:
        request = env.reset(trial)
        if infer is None:
            expert = Expert(env)
            yield from play(env, request, lambda _: (expert.act() for _ in range(replan)))
        else:
            yield from play(env, request, lambda request: infer(request)["actions"][:replan])


def play(env: Any, request: dict[str, Any], chunk: Callable[[dict[str, Any]], Iterable[np.ndarray]]) -> Iterator[Call]:
    """An episode as it is played, call after call.

    Args:
      env: a `LiberoEnv` whose episode has just begun.
      request: its first observation.
      chunk: request to the actions executed until the next call, [7] each; computed one by one if it is lazy.
    """
    while True:
        for number, action in enumerate(chunk(request)):
            if number == 0:
                yield Call(request, float(action[6]))
            if env.step(np.asarray(action)).done:
                return
        request = env.observe()
