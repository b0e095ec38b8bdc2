"""The wire format against openpi's own client, against random trees, and against hostile bytes."""

import contextlib
import math
import pathlib
import re
import struct

import msgpack
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from openpi_client import msgpack_numpy

from safe_pruner_jax.serving.wire import Limits, WireError, pack, unpack

DTYPES = ["|b1", "|i1", "<i2", "<i4", "<i8", "|u1", "<u2", "<u4", "<u8", "<f2", "<f4", "<f8", "<f16"]
DTYPES += [">i2", ">u4", ">i8", ">f4", ">f8", "|S5", "<U3", ">U3", "<M8[ns]", "<m8[s]"]
SHAPES = [(), (0,), (3,), (0, 5), (2, 3, 4)]


def sample(dtype, shape):
    return np.arange(65, 65 + math.prod(shape)).reshape(shape).astype(dtype)


def same(a, b):
    """Equality of messages in which NaN equals NaN, lists equal tuples and byte order does not count."""
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return isinstance(b, list | tuple) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, np.ndarray):
        native = a.dtype.newbyteorder("=")
        return (
            isinstance(b, np.ndarray)
            and b.dtype.newbyteorder("=") == native
            and a.shape == b.shape
            and a.astype(native).tobytes() == b.astype(native).tobytes()
        )
    if isinstance(a, np.generic) and not isinstance(a, float | str | bytes):
        return type(a) is type(b) and a.tobytes() == b.tobytes()
    return a == b or (a != a and b != b)


# --- with openpi's client --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_arrays_travel_both_ways(dtype, shape):
    message = {"x": sample(dtype, shape)}
    assert same(message, msgpack_numpy.unpackb(pack(message)))
    ours = unpack(msgpack_numpy.packb(message))
    assert same(message, ours)
    assert ours["x"].dtype.isnative and not ours["x"].flags.writeable


@pytest.mark.parametrize("dtype", DTYPES[:12])
def test_scalars_travel_both_ways(dtype):
    message = {"x": np.dtype(dtype).type(1)}
    assert same(message, msgpack_numpy.unpackb(pack(message)))
    assert same(message, unpack(msgpack_numpy.packb(message)))
    assert pack(message) == msgpack_numpy.packb(message)


def test_a_libero_request_is_the_same_bytes():
    request = {
        "observation/image": np.random.default_rng(0).integers(0, 256, (224, 224, 3), np.uint8),
        "observation/wrist_image": np.zeros((224, 224, 3), np.uint8)[::-1],
        "observation/state": np.linspace(-1, 1, 8),
        "prompt": "put the bowl on the plate",
        "reset": True,
    }
    assert pack(request) == msgpack_numpy.packb(request)
    assert same(request, unpack(msgpack_numpy.packb(request)))


def test_arrays_lie_over_the_message():
    assert not unpack(pack({"x": np.zeros(4, np.float32)}))["x"].flags.owndata


def test_layout_does_not_matter():
    x = np.arange(24.0).reshape(4, 6)
    for view in (x.T, x[::2, ::-1], np.asfortranarray(x), np.broadcast_to(x[:1], (5, 6))):
        assert same({"x": np.ascontiguousarray(view)}, unpack(pack({"x": view})))


def test_dtype_names_of_other_languages():
    for name in ("float32", "uint8", "bool", "f4", "u1"):
        dtype = np.dtype(name)
        fields = {b"__ndarray__": True, b"data": bytes(dtype.itemsize), b"dtype": name, b"shape": [1]}
        assert unpack(msgpack.packb({"x": fields}))["x"].dtype == dtype


def test_the_bytes_in_the_documentation():
    text = (pathlib.Path(__file__).parent.parent / "docs" / "wire.md").read_text()
    lines = text.split("byte by byte:")[1].split("\n\n")[1].splitlines()
    documented = bytes.fromhex("".join(re.match(r" +((?:[0-9a-f]{2} )+)", line)[1] for line in lines))
    assert documented == pack({"state": np.array([1, 2], "<f4")})


# --- what pack refuses -----------------------------------------------------------------------------------

LOOP = {}
LOOP["again"] = LOOP


@pytest.mark.parametrize(
    "message, says",
    [
        ([1], "a message is a map, got list"),
        (np.zeros(3), "a message is a map, got ndarray"),
        ({"a": {"b": np.array([None])}}, r"message\['a'\]\['b'\]: cannot send ndarray of dtype object"),
        ({"a": [np.zeros(2, "i4,f4")]}, r"message\['a'\]\[0\]: cannot send"),
        ({"a": np.zeros(2, complex)}, "complex128"),
        ({"a": np.zeros(2, "V2")}, "bfloat16 to float32"),
        ({"a": np.complex64(1)}, "cannot send complex64"),
        ({"a": np.datetime64(1, "s")}, "cannot send datetime64"),
        ({"a": np.longdouble(1)}, "cannot send"),
        ({"a": {1, 2}}, "cannot send set"),
        ({"a": object()}, "cannot send object"),
        ({1: "a"}, "keys of type str, got 1"),
        ({"a": 2**64}, "64 bits"),
        ({"a": -(2**63) - 1}, "64 bits"),
        ({"a": "\ud800"}, "valid Unicode"),
        (LOOP, "nested containers"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_pack_names_what_it_cannot_send(message, says):
    with pytest.raises(WireError, match=says):
        pack(message)


# --- what unpack refuses ---------------------------------------------------------------------------------


def array(data=b"\0" * 8, dtype="<f4", shape=(2,), **more):
    return {"x": {b"__ndarray__": True, b"data": data, b"dtype": dtype, b"shape": shape, **more}}


def scalar(data, dtype):
    return {"x": {b"__npgeneric__": True, b"data": data, b"dtype": dtype}}


def nested(depth, leaf=0):
    return {"a": nested(depth - 1, leaf)} if depth else leaf


@pytest.mark.parametrize(
    "message, says",
    [
        ([1, 2], "a message is a map, got list"),
        ("text", "a message is a map, got str"),
        (array()["x"], "a message is a map"),
        (array(shape=(3,)), r"message\['x'\]: shape \[3\] of float32 needs 12 bytes, got 8"),
        (array(data=b""), "got 0"),
        (array(shape=(2**62, 2**62, 0)), "needs 0 bytes, got 8"),
        (array(data=b"", shape=(2**62, 2**62, 0)), "numpy refuses"),
        (array(data=b"", shape=(2**40,), dtype="<U0"), "shape"),
        (array(shape=(-1, -2)), "list of up to 32 sizes"),
        (array(shape=(2.0,)), "list of up to 32 sizes"),
        (array(shape=(True, 2)), "list of up to 32 sizes"),
        (array(shape=2), "list of up to 32 sizes"),
        (array(shape=[1] * 33), "list of up to 32 sizes"),
        (array(data="text"), "data as msgpack bin, got str"),
        (array(data=None), "got NoneType"),
        (array(dtype="|O", shape=(1,)), "like '<f4'"),
        (array(dtype="|V8", shape=(1,)), "like '<f4'"),
        (array(dtype="<c8", shape=(1,)), "like '<f4'"),
        (array(dtype="f4,f4", shape=(1,)), "like '<f4'"),
        (array(dtype="(2,)f4", shape=(1,)), "like '<f4'"),
        (array(dtype="<M8[25Q]", shape=(1,)), "like '<f4'"),
        (array(dtype="<U99999999", shape=(0,), data=b""), "like '<f4'"),
        (array(dtype=["<f4"]), "like '<f4'"),
        (array(dtype=None), "got None"),
        (array(dtype="|b1", shape=(8,), data=b"\0\1\2\0\0\0\0\0"), "bytes 0 and 1"),
        (array(dtype="<U2", shape=(1,), data=struct.pack("<II", 65, 0x110000)), "outside Unicode"),
        (array(dtype=">U2", shape=(1,), data=struct.pack(">II", 65, 0xD800)), "outside Unicode"),
        ({"x": {"__ndarray__": True, "data": b"", "dtype": "<f4", "shape": [0]}}, "as msgpack bin"),
        ({"x": {"__npgeneric__": True}}, "as msgpack bin"),
        (scalar(1.5, "<i4"), "scalar of dtype <i4, got 1.5"),
        (scalar(300, "|u1"), "got 300"),
        (scalar(-1, "<u8"), "got -1"),
        (scalar(1, "|b1"), "got 1"),
        (scalar(True, "<f4"), "got True"),
        (scalar("x", "<f4"), "got 'x'"),
        (scalar(b"x", "<U1"), "got b'x'"),
        (scalar(5, "<M8[s]"), "got 5"),
        (scalar(5, "|O"), "like '<f4'"),
        ({1: 2}, "map keys are str"),
        (nested(17), "at most 16 nested"),
        ({"x": [0] * 20_000}, "as arrays, not lists"),
        ({"x": [[]] * 10_000, "y": [[]] * 10_000}, "as arrays, not lists"),
        ({"t": msgpack.Timestamp(1)}, "without extension types"),
        ({"t": msgpack.ExtType(5, b"abc")}, "without extension types"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unpack_says_what_is_wrong(message, says):
    with pytest.raises(WireError, match=says):
        unpack(msgpack.packb(message))


@pytest.mark.parametrize(
    "data, says",
    [
        (b"", "ends early"),
        (b"\x80\x80", "1 bytes after it"),
        (b"\x81\xa1a", "ends early"),
        (b"\x81\xa1a\xc4\x05abc", "was it cut"),
        (b"\x81\xa1a\xc6\xff\xff\xff\xff", "announced"),
        (b"\xdf\xff\xff\xff\xff", "at most 16384 values"),
        (b"\xdd\xff\xff", "at most|ends early|cut"),
        (b"\x81\xa1a\xc1", "0xc1"),
        (b"\x81\xa1\xff\x00", "text is UTF-8"),
        (b"\x81\x90\x00", "map keys are str"),
        (b"\x91" * 10**6, "at most 16 nested"),
        (b"GET / HTTP/1.1\r\n", "after it"),
    ],
)
def test_garbage(data, says):
    with pytest.raises(WireError, match=says):
        unpack(data)


def test_limits_are_exact():
    assert unpack(msgpack.packb(nested(16))) == nested(16)
    message = pack({"x": [0] * 8})  # two values for the pair, eight in the list
    assert unpack(message, Limits(len(message), 2, 10)) == {"x": [0] * 8}
    for limits in (Limits(len(message) - 1, 2, 10), Limits(len(message), 1, 10), Limits(len(message), 2, 9)):
        with pytest.raises(WireError, match="expected at most"):
            unpack(message, limits)


def test_nothing_is_unpickled():
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    data = np.array([Bomb()], object).dumps()
    for dtype in ("|O", "O", "object", "|O8", f"|V{len(data)}"):
        with pytest.raises(WireError):
            unpack(msgpack.packb(array(data=data, dtype=dtype, shape=(1,))))


# --- random trees and random damage ----------------------------------------------------------------------

keys = st.text(max_size=8).filter(lambda key: not key.startswith("__"))
dtypes = st.one_of(
    hnp.boolean_dtypes(),
    hnp.integer_dtypes(endianness="?"),
    hnp.unsigned_integer_dtypes(endianness="?"),
    hnp.floating_dtypes(endianness="?", sizes=(16, 32, 64)),
    hnp.byte_string_dtypes(max_len=4),
    hnp.unicode_string_dtypes(max_len=4),
)
leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(),
    st.text(max_size=16),
    st.binary(max_size=16),
    hnp.arrays(dtypes, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=3)),
    st.sampled_from("?bhilBHILefd").flatmap(lambda c: hnp.from_dtype(np.dtype(c)).map(np.dtype(c).type)),
)
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(keys, inner, max_size=4)),
    max_leaves=8,
)
messages = st.dictionaries(keys, trees, max_size=4)


@settings(max_examples=100, deadline=None)
@given(messages)
def test_any_tree_comes_back(message):
    assert same(message, unpack(pack(message)))
    assert same(message, msgpack_numpy.unpackb(pack(message)))
    assert same(message, unpack(msgpack_numpy.packb(message)))


VALID = pack(
    {
        "observation/image": np.arange(12, dtype=np.uint8).reshape(2, 2, 3),
        "state": np.arange(2.0),
        "flags": [np.array([True, False]), np.float32(0.5), np.int8(3), {"name": np.array(["ab"])}],
        "prompt": "lift",
    }
)


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), max_size=6),
    st.integers(0, len(VALID)),
    st.binary(max_size=3),
)
@example([], len(VALID), b"")
def test_damaged_messages_raise_wire_error_alone(changes, cut, tail):
    damaged = bytearray(VALID)
    for at, byte in changes:
        damaged[at] = byte
    for data in (bytes(damaged), bytes(damaged[:cut]) + tail, tail + bytes(damaged)):
        try:
            assert isinstance(unpack(data), dict)
        except WireError as error:
            assert 10 < len(str(error)) < 1000


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=64))
def test_random_bytes_raise_wire_error_alone(data):
    with contextlib.suppress(WireError):
        assert isinstance(unpack(data), dict)
