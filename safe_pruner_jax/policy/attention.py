"""`"attention"` of a request: grids of what the policy attends to, computed for this request and for nobody else.

request["attention"] = {"layers": [0, -1], "of": "action"}
reply["attention"]["grids"]["left_wrist_0_rgb"]       float16 [2, 16, 16]
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from safe_pruner_jax.engine.attention import ROWS, attention, layers_of
from safe_pruner_jax.engine.engine import Engine
from safe_pruner_jax.engine.state import Inputs
from safe_pruner_jax.robots.robots import RequestError, brief
from safe_pruner_jax.tokens import PrefixLayout


@dataclass(frozen=True)
class Wanted:
    """What a request asks for: layers from 0, ascending as they came, and whose attention ("action" or "text")."""

    layers: tuple[int, ...]
    of: str


class Attention:
    """The programs, one per kind and layout, compiled when they are first needed.

    Args:
      engine: whose model it is; its pruner plays no part.
    """

    def __init__(self, engine: Engine):
        self._engine = engine
        self._programs = {of: jax.jit(partial(attention, engine.config, of)) for of in ROWS}

    @property
    def available(self) -> dict[str, Any]:
        """What may be asked for: layers per kind, and the grid of a camera."""
        config = self._engine.config
        side = round(config.tokens_per_camera**0.5)
        return {"layers": {of: layers_of(config, of) for of in ROWS}, "grid": [side, side]}

    def read(self, value: Any) -> Wanted | None:
        """The request's `attention`. Raises RequestError."""
        if value is None:
            return None
        expected = f'a map {{"layers": [numbers of layers], "of": {" or ".join(map(repr, ROWS))}}}'
        advice = "leave it away for none"
        if not isinstance(value, dict) or set(value) != {"layers", "of"} or value["of"] not in ROWS:
            got = str(value)[:80] if isinstance(value, dict) else brief(value)
            raise RequestError("attention", expected, got, advice)
        count, layers = layers_of(self._engine.config, value["of"]), np.asarray(value["layers"])
        whole = layers.ndim == 1 and 1 <= layers.size <= count and layers.dtype.kind in "iu"
        if not whole or layers.min() < -count or layers.max() >= count:
            of = value["of"]
            raise RequestError(
                "attention",
                f"1 to {count} layers between {-count} and {count - 1} for {of!r}",
                str(value["layers"])[:80],
                advice,
            )
        return Wanted(tuple(int(l) % count for l in layers), value["of"])

    def __call__(
        self, wanted: Wanted, layout: PrefixLayout, inputs: Inputs, key: jax.Array, noise: jax.Array | None = None
    ) -> dict[str, Any]:
        """The reply's `attention`; blocks until it is on the host. Arguments as in `engine.attention`."""
        seen = self.every_layer(wanted.of, inputs, key, noise)[list(wanted.layers)]
        side = round(layout.tokens_per_camera**0.5)
        grids = seen.reshape(len(seen), len(layout.cameras), side, side).astype(np.float16)
        of_camera = {camera: grids[:, i] for i, camera in enumerate(layout.cameras)}
        return {"of": wanted.of, "layers": list(wanted.layers), "grids": of_camera}

    def every_layer(self, of: str, inputs: Inputs, key: jax.Array, noise: jax.Array | None = None) -> np.ndarray:
        """float32 [layers, n]; arguments as in `engine.attention`."""
        return np.asarray(self._programs[of](self._engine.weights, inputs, key, noise))
