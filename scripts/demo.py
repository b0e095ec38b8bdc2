"""A LIBERO task in two shuffled scenes through `openpi serve`, with and without pruning: success, figures, a video.

python scripts/demo.py [--task 0] [--seed 0] [--suite libero_object_shuffled] [--steps 100]

The same object stands in two places, and a policy that plays from memory would fail in one. Two servers are started
side by side and both are warm before the first episode begins; after that one of them is idle while the other is
timed. The client is openpi's own, unmodified. Pruned and not, an episode starts from the same state with the same
noise, and the video shows the two beside each other.
"""

import contextlib
import ctypes
import dataclasses
import http.client
import importlib.util
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import imageio.v2 as imageio
import numpy as np
import tyro
from rich.console import Console
from rich.progress import Progress

from safe_pruner_jax.bench import machine
from safe_pruner_jax.engine import flops
from safe_pruner_jax.evaluation.records import episode_seed
from safe_pruner_jax.evaluation.rollout import rollout
from safe_pruner_jax.figures.kept import Shown, kept_patches_figure, video_frame
from safe_pruner_jax.libero.env import LiberoEnv, load_task
from safe_pruner_jax.libero.shuffled import open_env
from safe_pruner_jax.libero.simulator import LiberoUnavailable, provenance
from safe_pruner_jax.policy.embedded import EMBEDDED, EMBEDDED_WEIGHTS, embedded_folder
from safe_pruner_jax.policy.loading import calibrated
from safe_pruner_jax.pruners import Plan, full, safe
from safe_pruner_jax.robots.configs import get_config
from safe_pruner_jax.robots.transforms import Tokenizer
from safe_pruner_jax.tokens import PrefixLayout, budget

HOST = "127.0.0.1"
REPLAN = get_config(EMBEDDED).replan  # actions per call
PROMPT_LENGTH = 32  # holds the prompts of the four usual suites; one length starts faster than all
CALIBRATED = calibrated()
CLIENT = "run .venv/bin/python -m pip install --no-deps -r requirements/openpi-client.txt"
CAMERAS = {"observation/image": "agentview", "observation/wrist_image": "wrist"}  # in slot order
console = Console(highlight=False, soft_wrap=True)
signals: list[int] = []


def interrupt(number: int, _frame: object) -> None:
    """Handler of SIGINT and SIGTERM. What it raises may be caught by a library that loads, or dropped by Python."""
    signals.append(number)
    raise KeyboardInterrupt


def interrupted() -> None:
    """Raises what a signal raised where it was lost."""
    if signals:
        raise KeyboardInterrupt


class DemoError(RuntimeError):
    """The demo cannot go on; the message is for a person."""


@dataclasses.dataclass(frozen=True)
class Demo:
    """Two episodes with SAFE-Pruner, the same episodes without.

    Args:
      suite: a shuffled one, libero_object_shuffled, or any that `openpi evaluate` plays.
      task: task of the suite.
      seed: the first of two scenes that follow one another: initial states of the suite.
      steps: robot actions to execute at most (20 per second of simulated time); None: the suite's limit.
      keep: share of the visual tokens that is kept in a pruned step.
      queries: whose attention is the shallow saliency.
      fuse: λ, the share of the forecast in the score.
      threshold: γ, κ below it makes a keyframe. These three default to the embedded policy's own choices.
        Its others apply as well.
      out: folder for what the demo writes.
    """

    suite: str = "libero_object_shuffled"
    task: int = 0
    seed: int = 0
    steps: int | None = None
    keep: float = 0.2
    queries: Literal["action", "text", "last", "all"] = CALIBRATED["queries"]
    fuse: float = CALIBRATED["fuse"]
    threshold: float = CALIBRATED["threshold"]
    out: Path = Path(__file__).parents[1] / "out" / "demo"

    @property
    def scenes(self) -> tuple[int, int]:
        """Initial states that are played."""
        return self.seed, self.seed + 1

    def choices(self) -> dict[str, Any]:
        """What the pruner is told."""
        return {name: getattr(self, name) for name in ("keep", "queries", "fuse", "threshold")}


class Server:
    """`openpi serve policy:embedded` as a child process, which never outlives this one; `log` takes its output."""

    def __init__(self, pruner: str, options: list[str], log: Path):
        with socket.socket() as free:
            free.bind((HOST, 0))
            self.port = free.getsockname()[1]
        self.pruner, self.log = pruner, log
        self.arguments = ["serve", "policy:embedded", f"--pruner={pruner}", *options]
        self.arguments += ["--port", str(self.port), "--prompt-lengths", str(PROMPT_LENGTH)]
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "safe_pruner_jax", *self.arguments],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ},  # two servers on one accelerator
                # PR_SET_PDEATHSIG: it ends also when the demo itself is killed
                preexec_fn=(lambda: ctypes.CDLL(None).prctl(1, signal.SIGKILL)) if sys.platform == "linux" else None,
            )

    def accepts(self) -> bool:
        """Whether clients can connect: once every program is compiled. Raises DemoError if the server has ended."""
        if (code := self._process.poll()) is not None:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-20:])
            raise DemoError(f"the server ({self.pruner}) ended with exit code {code}; {self.log} ends with\n{tail}")
        connection = http.client.HTTPConnection(HOST, self.port, timeout=2)
        with contextlib.closing(connection), contextlib.suppress(OSError):
            connection.request("GET", "/readyz")
            return connection.getresponse().status == http.HTTPStatus.OK
        return False

    def stop(self) -> None:
        """Asks it to end, and ends it if it does not; may be called again."""
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):  # it may still be compiling
            self._process.wait(5)
        self._process.kill()
        self._process.wait()


def wait_for(servers: list[Server]) -> None:
    """Returns once all accept clients; shows the last line of a log meanwhile."""
    with console.status("compiling") as status:
        waiting = servers
        while waiting := [s for s in waiting if not s.accepts()]:
            interrupted()
            line = waiting[0].log.read_text(errors="replace").strip().rpartition("\n")[2]
            status.update(f"pruner {waiting[0].pruner}: {line[:100] or 'starting'}")
            time.sleep(0.5)


# --- one episode -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Step:
    """One control step: what was asked (pictures only), what came back, and the whole round trip."""

    scene: int
    step: int
    pruner: str
    images: dict[str, np.ndarray]
    pruning: dict[str, Any]
    timing: dict[str, float]
    round_trip_ms: float

    @property
    def keyframe(self) -> bool:
        """Whether every token ran; always so without a pruner."""
        return self.pruning.get("keyframe", True)

    def label(self) -> str:
        """For a picture of it."""
        kind = "keyframe" if self.keyframe else f"κ = {self.pruning['kappa']:.3f}"
        return f"scene {self.scene}, step {self.step}, {kind}"

    def record(self) -> str:
        """One line of JSON."""
        index = self.pruning.get("index")
        pruning = {**self.pruning, "index": None if index is None else np.asarray(index).tolist()}
        step = {"pruner": self.pruner, "scene": self.scene, "step": self.step, "round_trip_ms": self.round_trip_ms}
        return json.dumps(step | pruning | self.timing)

    def row(self) -> str:
        """One line of the table under `HEADER`."""
        p, t = self.pruning, self.timing
        mark = "[bold yellow]keyframe[/]" if p.get("keyframe") else " " * 8
        cells = [f"{p.get('alive', '–'):>6}", f"{p.get('kept', '–'):>5}", mark]
        cells += ["     –" if p.get("kappa") is None else f"{p['kappa']:6.4f}"]
        cells += [f"{t[k]:8.1f}" if k in t else "       –" for k in ("shallow_ms", "rest_ms", "infer_ms")]
        return f"{self.step:>4}  " + "  ".join(cells)


HEADER = "step   alive   kept  keyframe       κ   shallow      rest  total ms"


@dataclasses.dataclass(frozen=True)
class Run:
    """One episode as it was served: its control steps, whether the task was solved, and after how many actions."""

    pruner: str
    scene: int
    steps: list[Step]
    success: bool
    actions: int

    def verdict(self) -> str:
        """The outcome in words."""
        return f"SUCCESS after {self.actions} actions" if self.success else f"no success in {self.actions} actions"


def play(server: Server, env: LiberoEnv, args: Demo, scene: int, write: Callable[[Step], None]) -> Run:
    """One episode over the websocket; shows and writes every control step as it comes."""
    from openpi_client.websocket_client_policy import WebsocketClientPolicy

    with warnings.catch_warnings(action="ignore"):  # it connects in a way that websockets deprecates
        client, steps = WebsocketClientPolicy(HOST, server.port), []
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task(f"pruner {server.pruner}, robot actions", total=args.steps or env.max_steps)

        def policy(request: dict[str, Any]) -> dict[str, Any]:
            interrupted()
            begin = {} if steps else {"reset": True, "seed": episode_seed(args.suite, args.task, scene)}
            start, reply = time.perf_counter(), client.infer(request | begin)
            elapsed = (time.perf_counter() - start) * 1000
            images = {name: request[key] for key, name in CAMERAS.items()}
            answer = {"pruning": reply.get("pruning", {}), "timing": reply["policy_timing"]}
            steps.append(Step(scene, env.steps, server.pruner, images, **answer, round_trip_ms=elapsed))
            write(steps[-1])
            console.print(steps[-1].row())
            return reply

        console.print(f"\n[bold]scene {scene}, --pruner={server.pruner}[/]\n[dim]{HEADER}[/]")
        advance = lambda env: progress.update(bar, completed=env.steps)
        episode = rollout(env, policy, init_state=scene, replan=REPLAN, max_steps=args.steps, on_step=advance)
    if episode.outcome == "error":
        raise DemoError(f"the episode ended early: {episode.error}; see {server.log}")
    run = Run(server.pruner, scene, steps, episode.outcome == "success", episode.steps)
    console.print(f"[bold]{run.verdict()}[/] ({len(steps)} calls, {episode.seconds:.1f} s)")
    return run


# --- what is left behind -----------------------------------------------------------------------------------


def write_video(path: Path, pairs: list[tuple[Run, Run]], layout: PrefixLayout) -> None:
    """Scene after scene, both episodes beside each other at the speed they were played: a call per `REPLAN` actions.

    Left the pruned one, right the other; the one that ends first waits in its last picture, and both stay a second.
    """
    with imageio.get_writer(path, fps=20 / REPLAN, codec="libx264", quality=8, macro_block_size=16) as video:
        for pair in pairs:
            for call in range(max(len(run.steps) for run in pair) + 20 // REPLAN):
                left, right = (_frame(run, call, layout) for run in pair)
                video.append_data(np.concatenate([left, np.zeros_like(left[:, :16]), right], axis=1))


def _frame(run: Run, call: int, layout: PrefixLayout) -> np.ndarray:
    step = run.steps[min(call, len(run.steps) - 1)]
    p = {"kept": layout.visual, "alive": layout.visual, "index": np.arange(layout.visual), "kappa": None} | step.pruning
    badge = "KEYFRAME" if run.pruner != "none" and step.keyframe else ""
    if call >= len(run.steps):
        badge = "SUCCESS" if run.success else "NO SUCCESS"
    kappa = "" if p["kappa"] is None else f"κ {p['kappa']:.3f}   "
    caption = f"{run.pruner}   step {step.step}   {kappa}{p['kept']} of {p['alive']} tokens"
    return video_frame(step.images, p["index"], layout.tokens_per_camera, caption, badge=badge, side=320)


def write_picture(path: Path, runs: list[Run], tokens_per_camera: int, title: str) -> None:
    """Of every scene the first keyframe and a pruned step halfway."""
    chosen = []
    for run in runs:
        pruned = [s for s in run.steps if not s.keyframe]
        chosen += [next(s for s in run.steps if s.keyframe), *pruned[len(pruned) // 2 : len(pruned) // 2 + 1]]
    shown = [Shown(s.images, s.pruning["index"], s.label()) for s in chosen]
    text = f"{textwrap.fill(title, 52)}\n{textwrap.fill(f'embedded policy: {EMBEDDED_WEIGHTS}', 60)}"
    kept_patches_figure(shown, tokens_per_camera, text).savefig(path)


def layout_of(prompt: str) -> PrefixLayout:
    """The static layout in which the servers run this instruction."""
    model = get_config(EMBEDDED).model
    tokens = Tokenizer(embedded_folder() / "tokenizer.model", model.max_token_len).encode(prompt)
    text = PROMPT_LENGTH if len(tokens) <= PROMPT_LENGTH else model.max_token_len
    return PrefixLayout(model.cameras[: len(CAMERAS)], model.tokens_per_camera, text)


def summarise(args: Demo, plan: Plan, layout: PrefixLayout, pairs: list[tuple[Run, Run]]) -> None:
    """Outcomes, medians, tokens and costs of all episodes, and what a reader needs to judge them."""
    pruned_run, plain_run = ([step for pair in pairs for step in pair[side].steps] for side in (0, 1))
    model, ms, paper, per_layer = get_config(EMBEDDED).model, {}, {}, {}
    kinds = {
        "safe, keyframe": ([s for s in pruned_run if s.keyframe], plan, False),
        "safe, pruned": ([s for s in pruned_run if not s.keyframe], plan, True),
        "none": (plain_run, full().plan, False),
    }
    console.print("\n[bold]one control step[/]\n[dim]                calls   ms median (min – max)   paper   exact[/]")
    for name, (steps, p, cut) in kinds.items():
        tokens = flops.tokens_per_layer(p, layout, model.depth, pruned=cut)
        per_layer[name] = " + ".join(f"{tokens.count(n)} × {n}" for n in dict.fromkeys(tokens))
        paper[name] = flops.paper_flops(tokens, model.prefix.width, model.prefix.mlp_dim) / 1e9
        exact = flops.exact_flops(model, p, layout, pruned=cut).total / 1e9
        times = [s.timing["infer_ms"] for s in steps] or [float("nan")]
        ms[name], spread = statistics.median(times), f"({min(times):.0f} – {max(times):.0f})"
        console.print(f"{name:15} {len(steps):5} {ms[name]:11.1f} {spread:15} {paper[name]:7.3f} {exact:7.3f}")
    calls, keyframes = len(pruned_run), len(kinds["safe, keyframe"][0])
    mean = lambda run: statistics.fmean(s.timing["infer_ms"] for s in run)
    share = (keyframes * paper["safe, keyframe"] + (calls - keyframes) * paper["safe, pruned"]) / calls / paper["none"]
    verdicts = "\n".join(f"scene {run.scene:<3} {run.pruner:5} {run.verdict()}" for pair in pairs for run in pair)
    here, versions = machine.describe(), {"jax": metadata.version("jax"), **provenance()}
    console.print(f"""\
[bold]{verdicts}[/]
pruned / none   {ms["safe, pruned"] / ms["none"]:.2f} of the time (medians)
safe / none     {mean(pruned_run) / mean(plain_run):.2f} of the time, {share:.2f} of the paper's FLOPs; \
{keyframes} of {calls} calls were keyframes
visual tokens   {statistics.fmean(s.pruning["kept"] for s in pruned_run):.0f} of {layout.visual} kept on average; \
{budget(plan.cut.keep, layout.visual)} of {layout.visual} in a pruned step
prefix tokens   layers × tokens: pruned {per_layer["safe, pruned"]}, otherwise {per_layer["none"]}
paper, exact    10⁹ multiply-adds of the language model's prefix, and of all that runs
machine         {here["cpu"]}, {here["cores"]} cores; {here["device"]}; {model.dtype}; Python {here["python"]}
versions        {", ".join(f"{name} {version}" for name, version in versions.items())}
runs            one episode each: {args.suite} task {args.task}, scenes {args.scenes[0]} and {args.scenes[1]}, \
{REPLAN} actions per call; {len(layout.cameras)} cameras, {layout.text} prompt slots, 10 denoise steps
note            a model this small spends its time elsewhere than π0.5: the ratios are its own""")


def run(args: Demo) -> None:
    """Servers, simulator, four episodes, files."""
    if {"not installed", "none"} & set(provenance().values()):
        load_task(args.suite, args.task)  # says what is missing, before a server is started
    plan = safe(**args.choices()).plan
    args.out.mkdir(parents=True, exist_ok=True)
    console.print(
        f"[bold]The embedded policy: {EMBEDDED_WEIGHTS}.[/]\n"
        "π0.5's architecture (small), openpi's client, the LIBERO simulator; the same two scenes for both servers,\n"
        "which differ in nothing but the pruner. Few episodes: an illustration, not a success rate.\n"
    )
    options = [f"--pruner.{name}={value}" for name, value in args.choices().items()]
    with contextlib.ExitStack() as stack:
        servers = []
        for pruner, chosen in (("safe", options), ("none", [])):
            servers.append(Server(pruner, chosen, args.out / f"server_{pruner}.log"))
            stack.callback(servers[-1].stop)
            console.print(f"$ openpi {' '.join(servers[-1].arguments)}\n  [dim]log: {servers[-1].log}[/]")
        started = time.perf_counter()
        with console.status("loading the simulator"):
            task = load_task(args.suite, args.task)
            env = stack.enter_context(open_env(task))
            if args.scenes[1] >= env.num_init_states:
                raise ValueError(f"--seed: expected 0 to {env.num_init_states - 2}, got {args.seed}")
        wait_for(servers)
        console.print(f"simulator and servers ready after {time.perf_counter() - started:.0f} s; “{task.language}”")
        with (args.out / "steps.jsonl").open("w", encoding="utf-8") as file:
            write = lambda step: print(step.record(), file=file, flush=True)
            pruned, plain = servers
            pairs = [(play(pruned, env, args, s, write), play(plain, env, args, s, write)) for s in args.scenes]
    layout = layout_of(task.language)
    write_video(args.out / "episode.mp4", pairs, layout)
    write_picture(args.out / "overlay.png", [run for run, _ in pairs], layout.tokens_per_camera, task.language)
    summarise(args, plan, layout, pairs)
    for name in ("episode.mp4", "overlay.png", "steps.jsonl"):
        console.print(f"written         {args.out / name}")


def main(args: Demo) -> int:
    """Exit code: 0 done, 1 the demo failed, 2 not installed or wrong arguments, 128 + a signal."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    news = lambda dropped: not isinstance(dropped.exc_value, KeyboardInterrupt)
    sys.unraisablehook = lambda dropped: sys.__unraisablehook__(dropped) if news(dropped) else None
    try:
        if importlib.util.find_spec("openpi_client") is None:
            raise ValueError(f"openpi's client is not installed: {CLIENT}")
        run(args)
    except (LiberoUnavailable, ValueError, DemoError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1 if isinstance(error, (DemoError, OSError)) else 2
    except KeyboardInterrupt:
        print("demo: interrupted, servers stopped", file=sys.stderr)
        return 128 + signals[-1]
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Demo)))
