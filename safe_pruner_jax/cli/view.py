"""`openpi view SOURCE`: what a policy sees, keeps and does, in rerun."""

import contextlib
import dataclasses
import itertools
import signal
from collections.abc import Iterator
from pathlib import Path

from tyro.conf import Positional

from safe_pruner_jax.analysis import view
from safe_pruner_jax.analysis.episodes import EXAMPLE, episodes
from safe_pruner_jax.cli.recordings import replan_of, robot_of
from safe_pruner_jax.policy.spec import Method, Model
from safe_pruner_jax.pruners.checks import require
from safe_pruner_jax.serving.access import read_key
from safe_pruner_jax.serving.episodes import SUFFIX, read_episode
from safe_pruner_jax.serving.replay import load


@dataclasses.dataclass(frozen=True, kw_only=True)
class View(Model):
    """Show a policy's steps in rerun: cameras, heat maps, kept patches, κ and γ, tokens, milliseconds, actions.

    Args:
      source: ws://host:port of a server started with --serving.watch; an episode of `openpi serve --record`, computed
        again by the policy that it names; or what the policy of the other arguments is asked: demonstrations (HDF5 or
        packed), a LeRobot dataset, libero:SUITE/TASK/TRIAL played live by the policy, "example".
      save: write an .rrd file instead of opening a viewer.
      web: port of a page with the viewer, for machines without a screen.
      limit: steps, at most.
      replan: robot actions between two policy calls of an episode; by default the policy's own.
      dir: checkpoint folder of a recorded episode, if it has moved.
      api_key_file: file with the server's key; default: $OPENPI_API_KEY.
    """

    source: Positional[str] = EXAMPLE
    save: Path | None = None
    web: int | None = None
    limit: int | None = None
    replan: int | None = None
    dir: str | None = None
    api_key_file: str | None = None


def run_view(args: View, method: Method) -> None:
    """Logs every step; with a page it stays until it is interrupted."""
    view.rerun()  # before anything is loaded
    require(args.limit is None or args.limit >= 1, "limit", "at least 1 step", args.limit)
    frames = itertools.islice(_frames(args, method), args.limit)
    with contextlib.suppress(KeyboardInterrupt):
        first = next(frames, None)
        if first is None:
            raise ValueError(f"{args.source}: expected at least one step, got none")
        stream = view.open_recording(args.source, first, save=args.save, web=args.web)
        count = 0
        for frame in itertools.chain([first], frames):
            view.show(stream, frame)
            count += 1
        stream.flush()
        print(f"{args.source}: {count} steps" + (f" in {args.save}; rerun {args.save} opens it" if args.save else ""))
        if args.web is not None and args.save is None:
            print(f"{view.page(args.web)} shows them until this is interrupted")
            signal.pause()


def _frames(args: View, method: Method) -> Iterator[view.Frame]:
    if args.source.partition("://")[0] in ("ws", "wss", "http", "https"):
        yield from view.live(args.source, read_key(args.api_key_file))
        return
    if args.source.endswith(SUFFIX):
        episode = read_episode(args.source)
        policy = load(Path(args.source), episode, args.dir, args.tokenizer)
        threshold = episode.header["choices"].get("threshold")
        yield from view.played(policy, (step["request"] for step in episode.steps), threshold)
        return
    method = args.fit("LIBERO", method, executed=replan_of(args))
    policy = args.load("LIBERO", method.make())
    session = policy.session()
    recording = next(episodes(args.source, replan=replan_of(args), infer=session.infer, robot=robot_of(args)))
    yield from view.played(policy, (call.request for call in recording.calls()), method.choices.get("threshold"))
