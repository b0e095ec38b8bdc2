"""What a policy sees, keeps and does, step after step, as a rerun recording.

    frames = played(policy, requests)                       or live("ws://localhost:8000", key)
    stream = open_recording("run", first := next(frames), save=Path("run.rrd"))
    for frame in (first, *frames):
        show(stream, frame)

Entities are named as lerobot's visualiser names a dataset's features: `observation.images.CAMERA`, `action`, `state`;
below each camera are its layers `kept`, `shallow`, `forecast` and `late`. rerun-sdk is an extra of its own.
"""

import io
import math
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
import websockets.sync.client
from matplotlib import colormaps
from PIL import Image
from websockets.exceptions import ConnectionClosed, InvalidStatus

from safe_pruner_jax.policy.episode import Episode
from safe_pruner_jax.policy.identity import SERVED
from safe_pruner_jax.policy.policy import Policy, pack
from safe_pruner_jax.pruners.plan import Plan
from safe_pruner_jax.serving.server import OBSERVE
from safe_pruner_jax.serving.wire import unpack
from safe_pruner_jax.tokens import budget

EXTRA = "expected the package rerun-sdk, got none; pip install 'safe-pruner-jax[rerun]'"
_GRPC = 9876  # port that the page has its data from
_DIM, _HEAT = 175, 150  # opacity of dropped patches and of heat maps, of 255


@dataclass(frozen=True, eq=False)
class Frame:
    """One control step.

    Args:
      number: of the step in its episode.
      robot: whose it is; "" if there is one.
      images: camera → uint8 [S, S, 3] as the network reads it, in slot order.
      reply: openpi's reply with `pruning`.
      state: proprioception as the robot sent it; None if it sent none.
      prompt: the instruction.
      maps: name → float [n], saliency over the visual slots of the cameras: "shallow", "forecast", "late".
      threshold: γ; None if the method has none.
      layers: visual tokens in every prefix layer; () if unknown.
      time: seconds since 1970; None if unknown.
    """

    number: int
    images: Mapping[str, np.ndarray]
    reply: Mapping[str, Any]
    robot: str = ""
    state: np.ndarray | None = None
    prompt: str = ""
    maps: Mapping[str, np.ndarray] = field(default_factory=dict)
    threshold: float | None = None
    layers: tuple[int, ...] = ()
    time: float | None = None


# --- where frames come from ----------------------------------------------------------------------------------


def played(policy: Policy, requests: Iterable[dict[str, Any]], threshold: float | None = None) -> Iterator[Frame]:
    """A policy's steps on an episode's requests, computed here.

    Args:
      policy: with its pruner.
      requests: openpi's, in order.
      threshold: the pruner's γ, for the picture.
    """
    episode, plan = Episode(policy.seed), policy.engine.plan
    shallow = {"layers": [plan.cut.layer - 1], "of": "text"} if plan.cut and plan.cut.layer else None
    warm = set()
    for number, request in enumerate(requests):
        prepared = policy.prepare(request if shallow is None else request | {"attention": shallow})
        if prepared.layout not in warm:  # compiling is no part of the milliseconds
            warm.add(prepared.layout)
            blank = policy.engine.init((policy.seed,), len(prepared.layout.cameras))
            policy.engine.warmup(blank, jax.device_put(pack([prepared.example], prepared.layout)))
        (result,) = policy.advance([episode], [prepared])
        if result.error is not None:
            raise result.error
        assert result.reply is not None, "a result is a reply or an error"
        reply = {"pruning": result.pruning} | result.reply
        maps = _maps(result.saliency)
        if (attention := reply.pop("attention", None)) is not None:
            maps["shallow"] = np.concatenate([grid[0].ravel() for grid in attention["grids"].values()])
        images = {camera: prepared.example.images[camera] for camera in prepared.layout.cameras}
        layers = tokens_per_layer(plan, policy.engine.config.depth, result.pruning)
        about = {"state": _state(request), "prompt": str(request.get("prompt", "")), "maps": maps}
        yield Frame(number, images, reply, threshold=threshold, layers=layers, **about)


def live(url: str, key: str | None = None) -> Iterator[Frame]:
    """The steps of a server's robots as they happen, see `look_on`."""
    yield from look_on(url, key)[1]


def look_on(url: str, key: str | None = None) -> tuple[dict[str, Any], Iterator[Frame]]:
    """A server's metadata, and its robots' steps as they happen, until it stops; needs `--serving.watch` there.

    Args:
      url: ws://host:port or wss://…; http means ws.
      key: the server's API key.

    Raises:
      ValueError: the server cannot be reached, does not let anybody look on, or wants another key.
    """
    url = url.replace("http", "ws", 1) if url.startswith("http") else url
    headers = {"Authorization": f"Api-Key {key}"} if key else None
    options = {"compression": None, "max_size": None, "additional_headers": headers}
    try:
        socket = websockets.sync.client.connect(url.rstrip("/") + OBSERVE, **options)
    except InvalidStatus as refused:
        why = {401: "it wants an API key: --api-key-file", 404: "start it with --serving.watch"}
        status = refused.response.status_code
        raise ValueError(f"{url}: expected to look on, got HTTP {status}; {why.get(status, 'try later')}") from refused
    except OSError as error:
        raise ValueError(f"{url}: expected a server, got none ({error}); is it running?") from error
    metadata = unpack(bytes(socket.recv()))
    return metadata, _followed(socket, metadata.get(SERVED, {}).get("configuration", {}).get("choices", {}))


def _followed(socket: websockets.sync.client.ClientConnection, choices: Mapping[str, Any]) -> Iterator[Frame]:
    with socket:
        try:
            for message in socket:
                yield _seen(unpack(bytes(message)), choices.get("threshold"))
        except ConnectionClosed:
            return


def _seen(message: dict[str, Any], threshold: float | None) -> Frame:
    about = {"robot": message["robot"], "time": message["time"], "threshold": threshold}
    request = message["request"]
    about |= {"state": _state(request), "prompt": str(request.get("prompt", ""))}
    return Frame(message["number"] - 1, message["images"], message["reply"], maps=_maps(message["saliency"]), **about)


def _maps(saliency: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """`Result.saliency` as maps: the late saliency is the mean of its layers."""
    arrays = {name: np.asarray(value, np.float32) for name, value in saliency.items()}
    maps = {
        {"score": "forecast"}.get(name, name): a.reshape(-1, a.shape[-1]).mean(0)
        for name, a in arrays.items()
        if a.size
    }
    return {name: array for name, array in maps.items() if np.isfinite(array).all() and array.any()}


def _state(request: Mapping[str, Any]) -> np.ndarray | None:
    state = request.get("observation/state", request.get("state"))
    return None if state is None else np.asarray(state, np.float64).ravel()


def tokens_per_layer(plan: Plan, depth: int, pruning: Mapping[str, Any]) -> tuple[int, ...]:
    """Visual tokens in every prefix layer of a step; reused tokens count as dropped."""
    alive, cuts = pruning["alive"], () if pruning["keyframe"] else plan.cuts
    running = lambda layer: min([alive, *(budget(cut.keep, alive) for cut in cuts if cut.layer <= layer)])
    return tuple(running(layer) for layer in range(depth))


# --- rerun ---------------------------------------------------------------------------------------------------


def rerun() -> Any:
    """The package. Raises ValueError without it."""
    try:
        import rerun
    except ImportError as error:
        raise ValueError(f"rerun: {EXTRA}") from error
    return rerun


def open_recording(name: str, first: Frame, *, save: Path | None = None, web: int | None = None) -> Any:
    """A stream for `show`: to a file, to a viewer in the browser, or to a viewer on this screen.

    Args:
      name: what the recording is called.
      first: the first step; the viewer is laid out for its robot and cameras.
      save: an .rrd file.
      web: port of a page with the viewer; it lives as long as this process.

    Returns:
      `rerun.RecordingStream`.
    """
    rr = rerun()
    layout, root = _blueprint(first), _root(rr, first)
    stream = rr.RecordingStream("safe_pruner_jax")
    stream.send_recording_name(name)
    if save is not None:
        save.parent.mkdir(parents=True, exist_ok=True)
        stream.save(str(save), default_blueprint=layout)
    elif web is not None:
        address = stream.serve_grpc(grpc_port=_GRPC, default_blueprint=layout)
        rr.serve_web_viewer(web_port=web, open_browser=False, connect_to=address)
    else:
        stream.spawn(default_blueprint=layout)
    stream.log("/", rr.AnnotationContext([(0, "dropped", (0, 0, 0, _DIM)), (1, "kept", (0, 0, 0, 0))]), static=True)
    for series, color in (("kappa", (9, 105, 218)), ("threshold", (110, 119, 129)), ("keyframe", (191, 135, 0))):
        stream.log(f"{root}pruning/{series}", rr.SeriesLines(names=series, colors=color), static=True)
    return stream


def page(web: int, host: str = "localhost") -> str:
    """Address of the page with the recording that `open_recording` serves; without its query the viewer is empty."""
    source = urllib.parse.quote(f"rerun+http://{host}:{_GRPC}/proxy", safe="")
    return f"http://{host}:{web}/?url={source}"


def _root(rr: Any, frame: Frame) -> str:
    """What the entities of a robot begin with."""
    return f"{rr.escape_entity_path_part(frame.robot)}/" if frame.robot else ""


def _blueprint(first: Frame) -> Any:
    rr = rerun()
    import rerun.blueprint as rrb

    root, hidden = _root(rr, first), rrb.EntityBehavior(visible=False)
    overrides = lambda origin: {f"{origin}/{name}": hidden for name in ("shallow", "late")}
    origins = {camera: f"{root}observation.images.{camera}" for camera in first.images}
    picture = lambda c, o: rrb.Spatial2DView(origin=o, contents="$origin/**", name=c, overrides=overrides(o))
    views = [picture(camera, origin) for camera, origin in origins.items()]
    series = {"pruning": "κ, γ, keyframes", "tokens": "visual tokens", "milliseconds": "milliseconds"}
    series |= {"action": "action", "state": "state"}
    plots = [rrb.TimeSeriesView(origin=root + origin, name=name) for origin, name in series.items()]
    bars = rrb.BarChartView(origin=f"{root}layers", name="tokens per layer")
    rows = [rrb.Horizontal(*views), rrb.Horizontal(*plots[:3], bars), rrb.Horizontal(*plots[3:])]
    grid = rrb.Vertical(*rows, row_shares=[2, 1, 1])
    return rrb.Blueprint(grid, collapse_panels=True)


def show(stream: Any, frame: Frame) -> None:
    """Logs one step."""
    rr = rerun()
    root = _root(rr, frame)
    stream.set_time("frame_index", sequence=frame.number)
    if frame.time is not None:
        stream.set_time("timestamp", timestamp=frame.time)
    pruning, timing = frame.reply.get("pruning") or {}, frame.reply.get("policy_timing") or {}
    for camera, layers in _layers(frame, pruning).items():
        entity = f"{root}observation.images.{camera}"
        stream.log(entity, rr.Image(frame.images[camera]).compress(jpeg_quality=90))
        for name, layer in layers.items():
            stream.log(f"{entity}/{name}", _layer(rr, layer, len(frame.images[camera])))
    for name, value in {
        "pruning/kappa": pruning.get("kappa"),
        "pruning/threshold": frame.threshold,
        "pruning/keyframe": pruning.get("keyframe"),
        "tokens/kept": pruning.get("kept"),
        "tokens/alive": pruning.get("alive"),
        **{f"milliseconds/{key.removesuffix('_ms')}": value for key, value in timing.items()},
    }.items():
        if value is not None:
            stream.log(root + name, rr.Scalars(float(value)))
    stream.log(f"{root}action", rr.Scalars(np.asarray(frame.reply["actions"], np.float64)[0]))
    if frame.state is not None:
        stream.log(f"{root}state", rr.Scalars(frame.state))
    if frame.layers:
        stream.log(f"{root}layers", rr.BarChart(np.asarray(frame.layers)))
    stream.log(f"{root}prompt", rr.TextDocument(frame.prompt))


def _layers(frame: Frame, pruning: Mapping[str, Any]) -> dict[str, dict[str, np.ndarray]]:
    """Camera → its layers as grids: `kept` bool [g, g], maps float [g, g] relative to their largest value."""
    cameras = list(frame.images)
    if not cameras or not pruning.get("alive"):
        return {camera: {} for camera in cameras}
    slots = pruning["alive"] // len(cameras)
    side, kept = math.isqrt(slots), np.zeros(slots * len(cameras), bool)
    kept[np.asarray(pruning["index"], int)] = True
    whole = {"kept": kept} | {name: values / values.max() for name, values in frame.maps.items()}
    grids = {name: values.reshape(len(cameras), side, side) for name, values in whole.items()}
    return {camera: {name: grid[i] for name, grid in grids.items()} for i, camera in enumerate(cameras)}


def _layer(rr: Any, grid: np.ndarray, size: int) -> Any:
    """A grid over a picture of `size` pixels: patches that are dropped are dim, maps are coloured."""
    cell = np.arange(size) * len(grid) // size
    grid = grid[np.ix_(cell, cell)]
    if grid.dtype == bool:
        return rr.SegmentationImage(grid.astype(np.uint8), opacity=1.0, draw_order=2.0)
    colors = (colormaps["inferno"](grid) * 255).astype(np.uint8)
    colors[..., 3] = (_HEAT * np.sqrt(grid)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(colors).save(buffer, "PNG")
    return rr.EncodedImage(contents=buffer.getvalue(), media_type="image/png", draw_order=3.0)
