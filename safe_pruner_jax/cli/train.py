"""`openpi train`: demonstrations in, a checkpoint in openpi's layout out.

openpi train --data demos/*.hdf5 --out runs/mini --settings.steps 20000
openpi train --stage all --see.scenes data/scenes --out runs/sees
"""

import contextlib
import dataclasses
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from safe_pruner_jax.cli.stages import Stages, run_stages
from safe_pruner_jax.lerobot.dataset import Dataset, is_dataset, require_local
from safe_pruner_jax.lerobot.repack import Track, tracks
from safe_pruner_jax.libero.demonstrations import Demo, read_demos, read_packed
from safe_pruner_jax.model.checkpoint import save_params
from safe_pruner_jax.policy.embedded import EMBEDDED, WEIGHTS, embedded_folder, embedded_name
from safe_pruner_jax.robots.configs import get_config
from safe_pruner_jax.robots.transform import PolicyConfig, RobotIO
from safe_pruner_jax.robots.transforms import Tokenizer, save_norm_stats
from safe_pruner_jax.training.data import make_samples, norm_stats, openpi_stats
from safe_pruner_jax.training.hosts import first, join
from safe_pruner_jax.training.imitation import imitate
from safe_pruner_jax.training.loop import Settings
from safe_pruner_jax.training.start import drawn, start_from

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Train:
    """Train a policy: by flow matching on demonstrations, or in stages on labelled scenes.

    Args:
      stage: "flow" trains on demonstrations as openpi does; "align", "refer", "act", "correct" are the stages of a
        policy that sees, each after the one before, and "all" is all four.
      data: demonstrations: LIBERO's HDF5, packed archives, or folders of LeRobot datasets (v2.1, v3).
      see: of the stages.
      out: folder of the run; a run that is there goes on.
      config: name of the policy configuration.
      init: checkpoint to start from, "embedded" (mini_libero) or mini_libero_spatial; None starts from random
        parameters. Its position embedding is interpolated when the image size differs, its embedding of words starts
        anew when the tokenizer does.
      tokenizer: SentencePiece model; None takes the embedded policy's of this configuration, and is required otherwise.
      image_size: side of the frames, a multiple of 14; None takes the configuration's.
      settings: of the optimiser and the loop.
      coordinator: HOST:PORT of the first of several hosts, which train as one; the same command on each of them.
      hosts: how many; None asks SLURM, Open MPI or the cloud.
      host: which one this is, from 0; None as hosts.
    """

    out: Path
    data: tuple[Path, ...] = ()
    stage: Literal["flow", "align", "refer", "act", "correct", "all"] = "flow"
    see: Stages = dataclasses.field(default_factory=Stages)
    config: str = EMBEDDED
    init: str | None = None
    tokenizer: Path | None = None
    image_size: int | None = None
    settings: Settings = dataclasses.field(default_factory=Settings)
    coordinator: str | None = None
    hosts: int | None = None
    host: int | None = None


def run_train(args: Train) -> None:
    """Reads, trains, exports `out/checkpoint` and draws `out/curves.png`.

    Raises:
      ValueError, CheckpointError, OSError: with what to do.
    """
    if args.coordinator is not None:
        if args.stage != "flow":
            raise ValueError(f"coordinator: expected --stage flow with several hosts, got {args.stage}")
        join(args.coordinator, args.hosts, args.host)
    config = get_config(args.config)
    model = config.model.replace(image_size=args.image_size or config.model.image_size)
    config = dataclasses.replace(config, model=model)
    packaged = embedded_name(config.name)
    tokenizer = args.tokenizer or (embedded_folder(packaged) / "tokenizer.model" if packaged else None)
    if tokenizer is None:
        raise ValueError(f"tokenizer: expected a SentencePiece model for {config.name}, got none; give --tokenizer")
    if args.stage != "flow":
        start = embedded_name(args.init)
        if args.init is not None and start is None:
            expected = f"embedded, {', '.join(WEIGHTS)} or nothing with --stage {args.stage}"
            raise ValueError(f"init: expected {expected}, got {args.init}")
        run_stages(args.stage, args.see, config, tokenizer, args.settings, args.out, start=start)
        return
    demos = [demo for path in args.data for demo in read(path, config, args.out)]
    recorded = any(is_dataset(path) for path in args.data)
    stats = openpi_stats(demos, config) if recorded and demos else norm_stats(demos)
    served = RobotIO(config, stats, Tokenizer(tokenizer, model.max_token_len))  # refuses what could not be served
    samples = make_samples(demos, config, stats, served.tokenizer)
    logger.info("%d demonstrations, %d samples, %d prompts", len(demos), len(samples.prompt), len(samples.tokens))
    del demos
    params = drawn(model, served.tokenizer, args.settings.seed)
    if args.init is not None:
        params = start_from(args.init, model, tokenizer, params)
    with _progress(args.settings.steps) as show:
        params, step = imitate(model, samples, params, args.settings, args.out, on_log=show)
    if not first():
        return
    checkpoint = args.out / "checkpoint"
    save_params(checkpoint, params, overwrite=True)
    save_norm_stats(checkpoint, config.asset_id, stats)
    shutil.copy(tokenizer, checkpoint / "tokenizer.model")
    curves(args.out)
    logger.info("%d of %d steps; checkpoint in %s", step, args.settings.steps, checkpoint)


@contextlib.contextmanager
def _progress(steps: int) -> Iterator[Callable[[dict], None]]:
    """A function that shows a row of the log, on the first host."""
    texts = (TextColumn("step {task.completed}"), BarColumn(), TimeRemainingColumn(), TextColumn("{task.fields[loss]}"))
    with Progress(*texts, disable=not first()) as progress:
        bar = progress.add_task("train", total=steps, loss="compiling")

        def show(row: dict) -> None:
            if "loss" in row:
                text = f"loss {row['loss']:.4f}, {row['samples_per_s']:.1f} samples/s"
                progress.update(bar, completed=row["step"], loss=text)

        yield show


def read(path: Path, config: PolicyConfig, scratch: Path | None = None) -> Iterator[Demo | Track]:
    """Demonstrations of a file, LIBERO's HDF5 or a packed archive, or of a LeRobot dataset, frames of the model's size.

    Args:
      path: of it.
      config: of the policy.
      scratch: folder for the frames of a dataset (`lerobot.repack.tracks`); those of files are in memory.

    Raises:
      ValueError: there is no such file, or a dataset that does not fit the configuration.
    """
    size = config.model.image_size
    if is_dataset(path):
        return tracks(Dataset(path), config, scratch=scratch)
    require_local(path)
    if not path.is_file():
        expected = "expected files or LeRobot datasets that exist"
        raise ValueError(f"data: {expected}, got {path}; make some with scripts/collect_demos.py")
    return (read_demos if path.suffix in (".hdf5", ".h5") else read_packed)(path, size=size)


def curves(out: Path) -> Path:
    """Draws training and validation loss of `out/metrics.jsonl` into `out/curves.png`."""
    from matplotlib.figure import Figure

    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for key, label in (("loss", "training, last steps"), ("validation", "held-out demonstrations, EMA")):
        value = (lambda row: row["validation"]["loss"]) if key == "validation" else (lambda row: row["loss"])
        points = [(row["step"], value(row)) for row in rows if key in row]
        if points:
            axes.plot(*zip(*points, strict=True), label=label)
    axes.set(xlabel="step", ylabel="flow-matching loss", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out / "curves.png", dpi=120)
    return out / "curves.png"
