"""Rebuild the tokenizer and norm statistics of the embedded policy (needs the LIBERO simulator for its sentences).

python scripts/make_embedded_assets.py [--out safe_pruner_jax/assets/mini_libero]
"""

import sys
from pathlib import Path

import numpy as np
import sentencepiece
import tyro

from safe_pruner_jax.configs import get_config
from safe_pruner_jax.evaluation.libero import SUITES, load_task, num_tasks
from safe_pruner_jax.observation import NormStats, save_norm_stats

# position (m), axis-angle (rad), fingers (m): bounds of what LIBERO's tables and the Panda's fingers allow
STATE_LOW = [-0.5, -0.5, 0.0, 1.5, -3.6, -1.9, 0.0, -0.045]
STATE_HIGH = [0.3, 0.5, 1.5, 3.7, 3.6, 1.3, 0.045, 0.0]


def main(out: Path = Path("safe_pruner_jax/assets/mini_libero")) -> int:
    """Writes `tokenizer.model` and `assets/<asset id>/norm_stats.json`.

    Args:
      out: folder to write to.
    """
    config = get_config("mini_libero")
    sentences = sorted({load_task(suite, i).language for suite in SUITES for i in range(num_tasks(suite))})
    out.mkdir(parents=True, exist_ok=True)
    with (out / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([*sentences, "Task: , State: 0 1 2 3 4 5 6 7 8 9;\nAction: "]),
            model_writer=file,
            model_type="bpe",
            vocab_size=config.model.vocab_size,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            byte_fallback=True,  # any prompt has tokens, also one in another script
            user_defined_symbols=["\n"],
            pad_id=0,
            eos_id=1,
            bos_id=2,
            unk_id=3,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    low, high = np.array(STATE_LOW), np.array(STATE_HIGH)
    actions = np.ones(7)
    stats = {
        "state": NormStats((low + high) / 2, (high - low) / 4, low, high),
        "actions": NormStats(actions * 0, actions / 2, -actions, actions),
    }
    save_norm_stats(out, config.asset_id, stats)
    print(f"{len(sentences)} sentences -> {out}")
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
