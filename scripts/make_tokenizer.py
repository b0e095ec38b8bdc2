"""Make the tokenizer of a small LIBERO policy (needs the LIBERO simulator for its sentences).

python scripts/make_tokenizer.py [--config mini_libero] [--out safe_pruner_jax/assets/mini_libero]
python scripts/make_tokenizer.py --config mini_libero_state --out runs/tokenizer     one token per number of the state
"""

import sys
from pathlib import Path

import sentencepiece
import tyro

from safe_pruner_jax.libero.env import SUITES, load_task, num_tasks
from safe_pruner_jax.robots.configs import get_config
from safe_pruner_jax.robots.transforms import NUMBERS


def main(config: str = "mini_libero", out: Path = Path("safe_pruner_jax/assets/mini_libero")) -> int:
    """Writes `tokenizer.model`; a policy trained with another one has to be trained again.

    Args:
      config: policy; its model gives the number of pieces, and whether the prompt holds the state.
      out: folder to write to.
    """
    model = get_config(config).model
    sentences = sorted({load_task(suite, i).language for suite in SUITES for i in range(num_tasks(suite))})
    numbers, prompts = [], ["Task: , State: 0 1 2 3 4 5 6 7 8 9;\nAction: "]
    if model.discrete_state_input:
        numbers, prompts = NUMBERS, [f"Task: {sentence}, State:;\nAction: " for sentence in sentences]
    out.mkdir(parents=True, exist_ok=True)
    with (out / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([*sentences, *prompts]),
            model_writer=file,
            model_type="bpe",
            vocab_size=model.vocab_size,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            byte_fallback=True,  # any prompt has tokens, also one in another script
            user_defined_symbols=["\n", *numbers],
            pad_id=0,
            eos_id=1,
            bos_id=2,
            unk_id=3,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    print(f"{len(sentences)} sentences -> {out}")
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
