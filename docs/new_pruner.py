"""A pruner of your own: copy this file, change `step`, run it.

    python docs/new_pruner.py            plays three steps on a small random model and says what was kept

The method below keeps what the prompt looks at, and gives tokens that were kept in the step before a head start. It
has the three parts of every pruner:

    plan   where tokens are dropped, how many stay, which attention is wanted        static, compiled
    init   what is remembered between steps, as arrays of fixed shape
    step   evidence → what stays, and what to remember

To ship it, announce the factory in your own pyproject.toml; `--pruner=sticky --pruner.bonus 0.5` then works:

    [project.entry-points."safe_pruner_jax.pruners"]
    sticky = "my_package.pruner:sticky"
"""

import jax
import jax.numpy as jnp
import numpy as np

from safe_pruner_jax.engine.engine import Engine, Inputs
from safe_pruner_jax.model import pi0
from safe_pruner_jax.model.config import GemmaConfig, Pi0Config, SiglipConfig
from safe_pruner_jax.model.params import draw_params
from safe_pruner_jax.pruners.base import (
    NO_HISTORY,
    Capture,
    Cut,
    Evidence,
    Plan,
    Pruner,
    Selection,
    check_layer,
    finite,
)
from safe_pruner_jax.tokens import top_k


def sticky(*, keep: float = 0.25, cut: int = 2, bonus: float = 0.5) -> Pruner:
    """Attention of the prompt, times 1 + bonus for tokens that were kept in the step before.

    Args:
      keep: share of the alive visual tokens in (0, 1], or a number of tokens.
      cut: layer index before which tokens are dropped, 1 ≤ cut < L.
      bonus: head start of tokens that were kept before, at least 0.
    """
    if not bonus >= 0:
        raise ValueError(f"bonus: expected a number >= 0, got {bonus!r}")
    plan = Plan(Cut(check_layer(cut), keep), capture=(Capture(cut - 1, "text"),))

    def init(e: Evidence) -> jax.Array:
        # called with shapes only; everything here is for one robot
        return jnp.zeros(e.alive.shape[0], bool)

    def step(kept: jax.Array, e: Evidence) -> tuple[jax.Array, Selection]:
        (attention,) = e.saliency  # one array per Capture of the plan, [n] float32, 0 for dead tokens
        first = e.since_full == NO_HISTORY  # also after a reset: nothing earlier may be used
        score = attention * jnp.where(kept & ~first, 1 + bonus, 1.0)
        index, alive = top_k(score, e.alive, keep)
        keyframe = first | ~finite(score, e.visual)  # a keyframe runs everything
        now = jnp.zeros_like(kept).at[index].max(alive)
        return now, Selection(index, alive, keyframe, score, jnp.array(jnp.nan))

    return Pruner("sticky", plan, init, step)


def main() -> None:
    """Three steps of one robot."""
    config = Pi0Config(
        True,
        prefix=GemmaConfig(32, 4, 64, 4, 1, 8),
        expert=GemmaConfig(16, 4, 32, 4, 1, 8),
        vision=SiglipConfig(16, 1, 32, 2),
        vocab_size=32,
        action_horizon=4,
        max_token_len=8,
        image_size=112,
        dtype="float32",
    )
    weights = jax.jit(lambda p: pi0.prepare(p, config))(draw_params(config))
    engine = Engine(weights, config, sticky(keep=0.25))
    control, rng = engine.init(seeds=(0,), cameras=2), np.random.default_rng(0)
    for t in range(3):
        inputs = Inputs(
            images=rng.integers(0, 256, (1, 2, 112, 112, 3), np.uint8),
            camera_mask=np.ones((1, 2), bool),
            tokens=np.arange(8, dtype=np.int32)[None],
            token_mask=np.ones((1, 8), bool),
            state=np.zeros((1, config.action_dim), np.float32),
        )
        actions, control, info = engine.step(control, jax.device_put(inputs))
        index = np.asarray(info.selection.index[0])
        what = "a keyframe, all 128 tokens" if info.keyframe[0] else f"{len(index)} of 128 tokens, {index[:5]} …"
        print(f"step {t}: {what}; first action {actions[0, 0, :3]}")


if __name__ == "__main__":
    main()
