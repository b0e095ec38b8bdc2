"""One of several processes that train the tiny model as one: `train_hosts.py FOLDER STOP COORDINATOR HOSTS HOST`.

Batches end at step STOP, where the run can be gone on with.
The averaged parameters are FOLDER/w.npz; only the first host writes. A process that is alone calls `train`.
"""

import dataclasses
import itertools
import sys
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from tiny_training import DATA, SETTINGS, demo, tiny

from safe_pruner_jax.model.checkpoint import load_params, save_params
from safe_pruner_jax.model.params import draw_params
from safe_pruner_jax.robots.configs import get_config
from safe_pruner_jax.robots.transforms import Tokenizer
from safe_pruner_jax.training import data, hosts, imitation, loop


@dataclasses.dataclass(frozen=True)
class Until(imitation.Demonstrations):
    """Demonstrations that end."""

    stop: int = 0

    def batches(self, seed, start):
        return itertools.islice(super().batches(seed, start), self.stop - start)


def train(folder: Path, stop: int) -> int:
    """The step at which training ended."""
    config = dataclasses.replace(get_config("mini_libero"), model=tiny())
    demos = [demo(9, 0), demo(6, 1)]
    made = data.make_samples(demos, config, data.norm_stats(demos), Tokenizer(DATA / "toy_sentencepiece.model", 200))
    settings = dataclasses.replace(SETTINGS, log_every=1, augment=False, fsdp=True, max_seconds=3600)
    source = Until(made, settings, len(jax.devices()), stop)
    params, step = loop.fit(imitation.flow_objective(tiny(), settings), source, draw_params(tiny()), settings, folder)
    if hosts.first():
        save_params(folder / "checkpoint", params, overwrite=True)
        np.savez(folder / "w.npz", **flatten_dict(params, sep="/"))
        saved = flatten_dict(load_params(folder / "checkpoint", tiny()), sep="/")
        assert all(np.array_equal(saved[name], leaf) for name, leaf in flatten_dict(params, sep="/").items())
    return step


if __name__ == "__main__":
    hosts.join(sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
    print(train(Path(sys.argv[1]), int(sys.argv[2])))
