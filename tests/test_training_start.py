"""Training: what a run may start from."""

import numpy as np
import pytest
import sentencepiece
from flax.traverse_util import flatten_dict
from tiny_training import DATA, equal, tiny

from safe_pruner_jax.model.checkpoint import save_params
from safe_pruner_jax.model.params import draw_params
from safe_pruner_jax.policy.embedded import embedded_folder, embedded_params
from safe_pruner_jax.robots.configs import get_config
from safe_pruner_jax.robots.transforms import NUMBERS, Tokenizer
from safe_pruner_jax.training import start

pytestmark = pytest.mark.newest


@pytest.fixture(scope="module")
def with_numbers(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["Task: pick up the bowl, State:;\nAction: "]),
            model_writer=file,
            model_type="bpe",
            vocab_size=290,
            hard_vocab_limit=False,
            user_defined_symbols=["\n", *NUMBERS],
            minloglevel=2,
        )
    return Tokenizer(path, 200)


def test_a_start_may_have_another_grid_and_another_vocabulary(tmp_path):
    tokenizer = DATA / "toy_sentencepiece.model"
    stored, model = draw_params(tiny(), 1), tiny(image_size=56, vocab_size=600)
    drawn = draw_params(model, 2)
    save_params(tmp_path / "other", stored)
    got = flatten_dict(start.start_from(str(tmp_path / "other"), model, tokenizer, drawn), sep="/")
    want, new = flatten_dict(stored, sep="/"), flatten_dict(drawn, sep="/")
    assert got.keys() == want.keys() and got[start.POSITIONS].shape == new[start.POSITIONS].shape
    np.testing.assert_array_equal(got[start.EMBEDDING], new[start.EMBEDDING])
    for name in got.keys() - {start.EMBEDDING, start.POSITIONS}:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)


def test_numbers_of_the_state_start_as_neighbours(with_numbers):
    drawn = np.random.default_rng(0).normal(0, 0.02, (with_numbers.vocab_size, 64))
    table = start.smooth_numbers(drawn, with_numbers)
    rows = [with_numbers.row(piece) for piece in NUMBERS]
    assert len(set(rows)) == 257 and None not in rows
    encoded = with_numbers.encode("pick up the bowl", np.array([-2.0, 0.0, 2.0]))
    assert [row for row in encoded if row in rows] == [rows[0], rows[129], rows[256]]  # -1, 128, 255
    others = np.setdiff1d(np.arange(len(drawn)), rows)
    np.testing.assert_array_equal(table[others], drawn[others])
    numbers = table[rows] / np.linalg.norm(table[rows], axis=1, keepdims=True)
    near = lambda apart: np.einsum("nd,nd->n", numbers[apart:], numbers[:-apart]).mean()
    assert near(1) > 0.9 > near(10) > near(100)
    assert table[rows].std() == pytest.approx(0.02, rel=0.1)


def test_a_tokenizer_without_such_numbers_starts_as_it_was_drawn():
    tokenizer = Tokenizer(DATA / "toy_sentencepiece.model", 200)
    drawn = np.random.default_rng(0).normal(size=(tokenizer.vocab_size, 8))
    np.testing.assert_array_equal(start.smooth_numbers(drawn, tokenizer), drawn)


def test_the_embedded_policy_is_a_start():
    model, tokenizer = get_config("mini_libero").model, embedded_folder() / "tokenizer.model"
    got = start.start_from("embedded", model, tokenizer, draw_params(model, 2))
    equal(got, embedded_params())
    with pytest.raises(ValueError, match="the embedded policy has other sizes than this model"):
        start.start_from("embedded", tiny(), tokenizer, draw_params(tiny(), 2))


def test_a_start_keeps_its_words_unless_they_are_other_ones(tmp_path):
    tokenizer, model = DATA / "toy_sentencepiece.model", tiny()
    stored, drawn = draw_params(model, 1), draw_params(model, 2)
    save_params(tmp_path / "same", stored)
    for theirs, words in ((tokenizer.read_bytes(), stored), (b"another", drawn)):
        (tmp_path / "same" / "tokenizer.model").write_bytes(theirs)
        got = flatten_dict(start.start_from(str(tmp_path / "same"), model, tokenizer, drawn), sep="/")
        np.testing.assert_array_equal(got[start.EMBEDDING], flatten_dict(words, sep="/")[start.EMBEDDING])
