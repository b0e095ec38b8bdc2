"""A driver of a toy evaluation, to be killed: toy_driver.py ADDRESS RECORDS."""

import sys

import toy_cluster as toy
from toy_records import CONFIGURATION

from safe_pruner_jax.cluster.connect import connected
from safe_pruner_jax.cluster.crew import Nodes
from safe_pruner_jax.evaluation.evaluate import episodes, play
from safe_pruner_jax.evaluation.records import RecordFile
from safe_pruner_jax.evaluation.sources import Source

if __name__ == "__main__":
    with connected(sys.argv[1]), RecordFile(sys.argv[2], CONFIGURATION) as file:
        crew = Nodes(toy.load, toy.IDENTITY, toy.SIMULATOR, look=toy.look, make_env=toy.Env, policies=1)
        play(episodes("libero_object", (0, 1), 6), file, Source(device="toy"), workers=3, crew=crew)
