"""The line between a simulator and its policy, without Ray."""

import threading
from multiprocessing import AuthenticationError

import numpy as np
import pytest

from safe_pruner_jax.cluster.line import Place, call, listen

pytestmark = pytest.mark.newest


def test_questions_are_answered_line_by_line():
    both = threading.Barrier(2, timeout=60)  # lines do not wait for one another

    def answer(question):
        both.wait()
        return {"twice": 2 * question["number"]}

    place = listen("127.0.0.1", answer)
    with call(place) as one, call(place) as two:
        for numbers in (np.arange(3), np.zeros((224, 224, 3), np.uint8)):
            one.send({"number": numbers})
            two.send({"number": numbers + 1})
            np.testing.assert_array_equal(one.recv()["twice"], 2 * numbers)
            np.testing.assert_array_equal(two.recv()["twice"], 2 * (numbers + 1))


def test_a_stranger_is_not_heard():
    heard = []
    place = listen("127.0.0.1", lambda question: heard.append(question) or len(heard))
    with pytest.raises(AuthenticationError):
        call(Place(place.host, place.port, b"another key"))
    with call(place) as line:
        line.send("hello")
        assert line.recv() == 1
    assert heard == ["hello"]
    assert str(place.key) not in repr(place)


def test_a_policy_that_is_gone_is_noticed():
    with pytest.raises(OSError):
        call(Place("127.0.0.1", 1, b""))

    def die(question):
        raise OSError

    with call(listen("127.0.0.1", die)) as line, pytest.raises((EOFError, OSError)):
        line.send("hello")
        line.recv()
