"""`openpi train`: demonstrations in, a checkpoint in openpi's layout out.

openpi train --data demos/*.hdf5 --out runs/mini --settings.steps 20000
"""

import dataclasses
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from safe_pruner_jax.configs import RobotIO, get_config
from safe_pruner_jax.demonstrations import Demo, read_demos, read_packed
from safe_pruner_jax.loading import EMBEDDED, embedded_folder
from safe_pruner_jax.model.checkpoint import fetch, load_params, save_params, stored_shapes
from safe_pruner_jax.model.config import Pi0Config
from safe_pruner_jax.model.params import Params, draw_params
from safe_pruner_jax.observation import Tokenizer, save_norm_stats
from safe_pruner_jax.training.data import make_samples, norm_stats
from safe_pruner_jax.training.loop import Settings, fit

logger = logging.getLogger(__name__)

EMBEDDING, POSITIONS = "PaliGemma/llm/embedder/input_embedding", "PaliGemma/img/pos_embedding"
"""Leaves whose sizes depend on the tokenizer and on the image size."""


@dataclasses.dataclass(frozen=True)
class Train:
    """Train a policy on demonstrations by flow matching.

    Args:
      data: demonstration files: LIBERO's HDF5, or packed archives.
      out: folder of the run; a run that is there goes on.
      config: name of the policy configuration.
      init: checkpoint to start from; None starts from random parameters. Its position embedding is interpolated when
        the image size differs, its embedding of words starts anew when the tokenizer does.
      tokenizer: SentencePiece model; None takes the embedded one with mini_libero, and is required otherwise.
      image_size: side of the frames, a multiple of 14; None takes the configuration's.
      settings: of the optimiser and the loop.
    """

    data: tuple[Path, ...]
    out: Path
    config: str = EMBEDDED
    init: str | None = None
    tokenizer: Path | None = None
    image_size: int | None = None
    settings: Settings = dataclasses.field(default_factory=Settings)


def run_train(args: Train) -> None:
    """Reads, trains, exports `out/checkpoint` and draws `out/curves.png`.

    Raises:
      ValueError, CheckpointError, OSError: with what to do.
    """
    config = get_config(args.config)
    model = config.model.replace(image_size=args.image_size or config.model.image_size)
    config = dataclasses.replace(config, model=model)
    tokenizer = args.tokenizer or (embedded_folder() / "tokenizer.model" if config.name == EMBEDDED else None)
    if tokenizer is None:
        raise ValueError(f"tokenizer: expected a SentencePiece model for {config.name}, got none; give --tokenizer")
    demos = [demo for path in args.data for demo in read(path, model.image_size)]
    stats = norm_stats(demos)
    served = RobotIO(config, stats, Tokenizer(tokenizer, model.max_token_len))  # refuses what could not be served
    samples = make_samples(demos, config, stats, served.tokenizer)
    logger.info("%d demonstrations, %d samples, %d prompts", len(demos), len(samples.prompt), len(samples.tokens))
    del demos
    params = draw_params(model, args.settings.seed)
    if args.init is not None:
        params = start_from(args.init, model, tokenizer, params)
    columns = (
        TextColumn("step {task.completed}"),
        BarColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}"),
    )
    with Progress(*columns) as progress:
        bar = progress.add_task("train", total=args.settings.steps, loss="compiling")

        def show(row: dict) -> None:
            if "loss" in row:
                text = f"loss {row['loss']:.4f}, {row['samples_per_s']:.1f} samples/s"
                progress.update(bar, completed=row["step"], loss=text)

        params, step = fit(model, samples, params, args.settings, args.out, on_log=show)
    checkpoint = args.out / "checkpoint"
    save_params(checkpoint, params, overwrite=True)
    save_norm_stats(checkpoint, config.asset_id, stats)
    shutil.copy(tokenizer, checkpoint / "tokenizer.model")
    curves(args.out)
    logger.info("%d of %d steps; checkpoint in %s", step, args.settings.steps, checkpoint)


def read(path: Path, size: int) -> Iterator[Demo]:
    """Demonstrations of a file, LIBERO's HDF5 or a packed archive, with frames of `size`² pixels."""
    return (read_demos if path.suffix in (".hdf5", ".h5") else read_packed)(path, size=size)


def start_from(address: str, model: Pi0Config, tokenizer: Path, drawn: Params) -> Params:
    """A checkpoint's parameters for a model whose image size and tokenizer may be others.

    SigLIP's position embedding [1, g², D] is interpolated (bicubic). The embedding of another vocabulary is `drawn`'s,
    since its rows stand for other pieces.

    Raises:
      CheckpointError: not a checkpoint of these sizes otherwise.
    """
    folder = fetch(address)
    shapes = stored_shapes(folder)
    rows = shapes.get(EMBEDDING, (model.vocab_size,))[0]
    side = round(shapes.get(POSITIONS, (1, model.tokens_per_camera))[1] ** 0.5)
    theirs = model.replace(vocab_size=rows, image_size=side * model.vision.patch)
    params = flatten_dict(load_params(folder, theirs, dtype="float32"), sep="/")
    if rows != model.vocab_size or other_file(folder / "tokenizer.model", tokenizer):
        logger.info("%s has another vocabulary: the embedding of words starts from random numbers", address)
        params[EMBEDDING] = flatten_dict(drawn, sep="/")[EMBEDDING]
    if side != model.grid:
        table = params[POSITIONS].reshape(1, side, side, -1)
        shape = (1, model.grid, model.grid, table.shape[-1])
        params[POSITIONS] = np.asarray(jax.image.resize(table, shape, "bicubic")).reshape(1, -1, shape[-1])
    return unflatten_dict(params, sep="/")


def other_file(path: Path, other: Path) -> bool:
    """Whether there is a file at `path` with other bytes."""
    return path.is_file() and path.read_bytes() != other.read_bytes()


def curves(out: Path) -> Path:
    """Draws training and validation loss of `out/metrics.jsonl` into `out/curves.png`."""
    from matplotlib.figure import Figure

    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for key, label in (("loss", "training, last steps"), ("validation", "held-out demonstrations, EMA")):
        points = [(row["step"], row[key]) for row in rows if key in row]
        if points:
            axes.plot(*zip(*points, strict=True), label=label)
    axes.set(xlabel="step", ylabel="flow-matching loss", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out / "curves.png", dpi=120)
    return out / "curves.png"
