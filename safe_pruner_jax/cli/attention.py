"""`openpi analyze attention`: is there something to forecast? Attention by layer and region, κ and matching by call.

openpi analyze attention --data data/scenes/*_demo_1*.npz --out out/analysis policy:embedded
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from safe_pruner_jax.analysis import attention, regions
from safe_pruner_jax.analysis.rows import Rows, read_rows
from safe_pruner_jax.cli.recordings import Load, OnRequests, Watched, leave, logger, replan_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attention(OnRequests):
    """How many tokens attention is spread over and where they are, layer by layer; κ with and without matching.

    Regions and right matches need labelled episodes (.npz of scripts/collect_scenes.py), a prior two episodes or more.

    Args:
      cut: layer index before which tokens are dropped: its shallow saliency is compared.
      every: calls between keyframes within a subtask; every subtask starts with one.
      beside: attention.jsonl of other policies, each as NAME=FILE: all are drawn in one figure, attention_beside.png.
      name: of this policy in that figure.
    """

    cut: int = 3
    every: int = 10
    beside: tuple[str, ...] = ()
    name: str = "this policy"


def run_attention(args: Attention, load: Load, conditions: Mapping[str, Any]) -> None:
    """Watches every episode for its layers, then again beside the mean of the others."""
    others = {name: read_rows(file) for name, file in map(_named, args.beside)}
    source = {**conditions, "replan": replan_of(args), "driver": args.driver, "cut": args.cut}
    watched = Watched(args, load)
    with Rows(args.out / "attention.jsonl", source) as file:
        for name in watched.names():
            if name not in file.finished:
                trace = watched.trace(name)
                logger.info("%s: %d calls", name, len(trace))
                file.add(name, attention.measure(trace, cut=args.cut) + (regions.masses(trace) if trace.seen else []))
        layers = [row for row in file.rows() if row["part"] in watched.names()]
    settings = {"every": args.every, "episodes": watched.names()}
    with Rows(args.out / "carried.jsonl", source | settings) as file:
        for name in watched.names() if len(watched.names()) > 1 else ():
            if name not in file.finished:
                prior = attention.prior(layers, without=name)
                file.add(name, regions.carried(watched.trace(name), prior, cut=args.cut, every=args.every))
        calls = file.rows()
    leave(args.out, "attention", attention.table(layers, calls), attention.figure(layers, calls))
    if others:
        attention.beside({args.name: layers, **others}).savefig(args.out / "attention_beside.png")
        print(f"all policies in one figure: {args.out / 'attention_beside.png'}")


def _named(text: str) -> tuple[str, str]:
    name, equals, file = text.partition("=")
    if not (name and equals and file):
        raise ValueError(f"beside: expected NAME=FILE, for example old=out/old/attention.jsonl, got {text!r}")
    return name, file


COMMANDS: dict[str, tuple[type, Callable[..., None]]] = {"attention": (Attention, run_attention)}
"""Name of the analysis → its arguments and what runs them, as in `analyze`."""
