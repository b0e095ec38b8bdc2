"""Put a trained checkpoint into the package as the embedded policy.

python scripts/embed.py runs/mini/checkpoint [--out safe_pruner_jax/assets/mini_libero]

Parameters are stored as float16 (at most 24 MB), norm statistics and tokenizer as they are. What the policy can do
has to be measured again and told in `policy.loading.EMBEDDED_WEIGHTS`.
"""

import shutil
import sys
from pathlib import Path

import tyro
from tyro.conf import Positional

from safe_pruner_jax.model.checkpoint import load_params
from safe_pruner_jax.policy.loading import EMBEDDED, PARAMS, save_embedded
from safe_pruner_jax.robots.configs import get_config
from safe_pruner_jax.robots.transforms import load_norm_stats, save_norm_stats

LARGEST = 24_000_000
"""Bytes the package may carry."""


def main(checkpoint: Positional[Path], out: Path = Path("safe_pruner_jax/assets") / EMBEDDED) -> int:
    """Writes `params.npz`, `tokenizer.model` and the norm statistics.

    Args:
      checkpoint: from `openpi train`, of the embedded configuration.
      out: folder to write to.
    """
    config = get_config(EMBEDDED)
    try:
        params = load_params(checkpoint, config.model, dtype="float32")
        stats = load_norm_stats(checkpoint, config.asset_id)
        out.mkdir(parents=True, exist_ok=True)
        save_embedded(params, out)
        save_norm_stats(out, config.asset_id, stats)
        shutil.copy(checkpoint / "tokenizer.model", out / "tokenizer.model")
    except (ValueError, OSError) as error:
        print(f"embed: {error}", file=sys.stderr)
        return 2
    size = (out / PARAMS).stat().st_size
    print(f"{out / PARAMS}: {size / 1e6:.1f} MB")
    if size > LARGEST:
        print(f"embed: expected at most {LARGEST / 1e6:.0f} MB of parameters, got {size / 1e6:.1f}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
