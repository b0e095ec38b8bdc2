"""Compare this implementation with stored reference numbers; exit code 0 when every tolerance holds.

python scripts/check_parity.py MODEL.npz [--episode EPISODE.npz] [--json]
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated

import tyro

from safe_pruner_jax.testing import parity


def main(
    model: tyro.conf.Positional[Path],
    /,
    episode: Path | None = None,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> int:
    """Rebuilds the model from the JSON beside MODEL and compares every stored quantity.

    Args:
      model: npz with parameters, inputs and outputs; its sizes are in the .json of the same name.
      episode: npz of a SAFE-Pruner episode played on this model, to be compared instead.
      as_json: print one JSON object instead of a table.
    """
    try:
        rows = parity.check_model(model) if episode is None else parity.check_episode(model, episode)
    except (OSError, ValueError, KeyError) as e:
        print(f"cannot compare: {e}", file=sys.stderr)
        return 2
    failed = [r for r in rows if not r.ok]
    if as_json:
        print(json.dumps({"ok": not failed, "rows": [dataclasses.asdict(r) | {"ok": r.ok} for r in rows]}))
        return bool(failed)
    print(f"{'case':18} {'quantity':34} {'max abs':>10} {'rms':>10}  {'limit':>14}")
    for r in rows:
        limit = f"{r.measure:>4} {r.limit:9.1e}"
        print(f"{r.case:18} {r.quantity:34} {r.max_abs:10.2e} {r.rms:10.2e}  {limit} {'' if r.ok else 'FAIL'}")
    print(f"{len(rows) - len(failed)} of {len(rows)} within tolerance")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
