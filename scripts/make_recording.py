"""Packs the recording inside the package, the source "example" of the analyses and the notebooks.

python scripts/collect_demos.py --suite libero_object --tasks 1 --episodes 2 --every 3 --noise 0.1 --out demos
python scripts/make_recording.py demos/libero_object/pick_up_the_cream_cheese_and_place_it_in_the_basket_demo.hdf5

One episode of the scripted expert with all three subtasks: approach, carry, release. The simulator's state is left out.
"""

import dataclasses
import sys
import tempfile
from pathlib import Path

import tyro
from tyro.conf import Positional

from safe_pruner_jax.libero.demonstrations import pack, read_demos, write_demos

RECORDINGS = Path(__file__).parents[1] / "safe_pruner_jax" / "assets" / "recordings"


def main(path: Positional[Path], seed: int = 1, out: Path = RECORDINGS / "cream_cheese.zip", crf: int = 20) -> int:
    """Packs one episode.

    Args:
      path: LIBERO's HDF5 with the task's demonstrations.
      seed: of the episode.
      out: archive.
      crf: H.264's constant rate factor.
    """
    demo = next((demo for demo in read_demos(path, size=224) if demo.seed == seed), None)
    if demo is None:
        print(f"make_recording: expected an episode with the seed {seed} in {path}, got none", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        one = Path(folder, path.name)
        write_demos(one, [dataclasses.replace(demo, extra={})])
        (packed,) = pack([one], out, crf=crf)
    print(f"{out}: {packed.steps} steps, {out.stat().st_size / 1000:.0f} kB, PSNR {packed.psnr}")
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main, description=__doc__))
