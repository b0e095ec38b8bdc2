"""Put a trained checkpoint into the package as the embedded policy.

python scripts/embed.py runs/mini/checkpoint
python scripts/embed.py runs/spatial/checkpoint --config mini_libero_spatial     as differences from the other one

All parameters of the package have at most 24 MB, norm statistics and tokenizer are stored as they are. What the policy
can do has to be measured again and told in `policy.embedded.WEIGHTS`.
"""

import shutil
import sys
from pathlib import Path

import tyro
from tyro.conf import Positional

from safe_pruner_jax.model.checkpoint import load_params
from safe_pruner_jax.policy.embedded import EMBEDDED, PARAMS, save_embedded
from safe_pruner_jax.robots.configs import get_config
from safe_pruner_jax.robots.transforms import load_norm_stats, save_norm_stats

LARGEST = 24_000_000
"""Bytes the package may carry."""


def main(checkpoint: Positional[Path], config: str = EMBEDDED, out: Path = Path("safe_pruner_jax/assets")) -> int:
    """Writes `params.npz`, `tokenizer.model` and the norm statistics.

    Args:
      checkpoint: from `openpi train`, of an embedded configuration.
      config: its name; all but mini_libero are stored as 8-bit differences from that one.
      out: folder of the policies' folders.
    """
    policy, out = get_config(config), out / config
    try:
        params = load_params(checkpoint, policy.model, dtype="float32")
        stats = load_norm_stats(checkpoint, policy.asset_id)
        out.mkdir(parents=True, exist_ok=True)
        save_embedded(params, out, differences=config != EMBEDDED)
        save_norm_stats(out, policy.asset_id, stats)
        shutil.copy(checkpoint / "tokenizer.model", out / "tokenizer.model")
    except (ValueError, OSError) as error:
        print(f"embed: {error}", file=sys.stderr)
        return 2
    size = sum(file.stat().st_size for file in out.parent.glob(f"*/{PARAMS}"))
    print(f"{out / PARAMS}: {(out / PARAMS).stat().st_size / 1e6:.1f} MB, {size / 1e6:.1f} MB in all")
    if size > LARGEST:
        print(f"embed: expected at most {LARGEST / 1e6:.0f} MB of parameters, got {size / 1e6:.1f}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
