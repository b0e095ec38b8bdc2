"""openpi's wire format: msgpack with numpy arrays inside, read without trusting the sender.

A message is one msgpack map. An array in it is a map with byte-string keys,

    {b"__ndarray__": True, b"data": raw bytes in C order, b"dtype": "<f4", b"shape": [10, 7]}

and a numpy scalar is `{b"__npgeneric__": True, b"data": 0.5, b"dtype": "<f4"}`. `pack` writes it, `unpack`
reads it. Reading has three stages: `_scan` walks the bytes and refuses whatever exceeds `Limits` before an
object exists, msgpack builds plain containers, `_decode` lays arrays over the received bytes. There is no
pickle anywhere, and everything wrong with a message is a `WireError`.

The whole protocol, for clients in other languages: docs/wire.md.
"""

import math
import re
import reprlib
from dataclasses import dataclass
from typing import Any, cast

import msgpack
import numpy as np

_ARRAY, _SCALAR = b"__ndarray__", b"__npgeneric__"
_MAX_NDIM = 32  # numpy 1.x; numpy 2 allows 64

# Booleans, integers, floats, text and times. Objects (pickle), records and complex numbers stay outside, as
# in openpi; bfloat16 has no portable name (numpy writes it as the record type "<V2").
_DTYPES = re.compile(
    r"[<>|]?(b1|[iu][1248]|f(2|4|8|16)|[SU][0-9]{1,7}|[mM]8(\[[0-9]{0,4}(Y|M|W|D|h|m|s|ms|us|ns|ps|fs|as)\])?)"
    r"|bool|u?int(8|16|32|64)|float(16|32|64)"
)


PROTOCOL = 1
"""Version of what this server adds to openpi's protocol; see docs/wire.md."""


class WireError(ValueError):
    """A message that cannot be read or written; the text says what was expected, what came, what to do."""


@dataclass(frozen=True)
class Limits:
    """What a message may cost its reader.

    Args:
      message_bytes: size of one message, bytes. A LIBERO request has 0.3 MB, three 1080p cameras 19 MB.
      depth: containers inside containers; openpi's messages use 3 (map, map, array or shape).
      items: values in the whole message, map keys and the four fields of each array included. It bounds
        what small values may grow to in memory (an empty list is 1 byte on the wire, 56 in Python).
    """

    message_bytes: int = 64 * 2**20
    depth: int = 16
    items: int = 16_384


LIMITS = Limits()


def pack(obj: dict) -> bytes:
    """One message as bytes, readable by openpi's client.

    Args:
      obj: map of str (or bytes) to None, bool, int, float, str, bytes, numpy arrays and scalars, lists,
        tuples (arriving as lists) and further maps; arrays of any layout and byte order.

    Raises:
      WireError: anything else, named by its place in the message.

    Example:
      >>> unpack(pack({"actions": np.zeros((10, 7), np.float32)}))["actions"].shape
      (10, 7)
    """
    if not isinstance(obj, dict):
        raise WireError(f"a message is a map, got {_kind(obj)}; put the value under a key")
    try:
        return cast(bytes, msgpack.packb(_encode(obj, ())))
    except UnicodeEncodeError as error:
        raise WireError(f"text in a message must be valid Unicode ({error}); send it as bytes") from error


def unpack(data: bytes, limits: Limits = LIMITS) -> dict:
    """The message in `data`. Arrays are read-only views of the received bytes, in native byte order.

    Args:
      data: one whole binary frame.
      limits: what the message may cost, checked before anything is built.

    Raises:
      WireError: not one complete msgpack map, over a limit, or an array that its dtype and shape deny.
    """
    if len(data) > limits.message_bytes:
        raise WireError(f"expected at most {limits.message_bytes} bytes, got {len(data)}; send smaller images")
    _scan(data, limits)
    try:
        plain = msgpack.unpackb(data)
    except (ValueError, TypeError, msgpack.exceptions.UnpackException) as error:
        raise WireError(f"not a valid msgpack message: {error}; map keys are str, text is UTF-8") from error
    if not isinstance(plain, dict) or _ARRAY in plain or _SCALAR in plain:
        raise WireError(f"a message is a map, got {_kind(plain)}; put the value under a key")
    return _decode(plain, (), limits)


# --- bytes → structure -----------------------------------------------------------------------------------

# leading byte → bytes that follow, for values of fixed size
_FIXED = {0xC0: 0, 0xC2: 0, 0xC3: 0, 0xCA: 4, 0xCB: 8}
_FIXED |= {0xCC + i: 2**i for i in range(4)} | {0xD0 + i: 2**i for i in range(4)}
# leading byte → what it opens and the width of its length field
_SIZED = {0xC4 + i: ("bytes", 2**i) for i in range(3)} | {0xD9 + i: ("bytes", 2**i) for i in range(3)}
_SIZED |= {0xDC: ("array", 2), 0xDD: ("array", 4), 0xDE: ("map", 2), 0xDF: ("map", 4)}


def _head(data: bytes, at: int) -> tuple[str, int, int]:
    """What the value at `at` is, its length (bytes, elements or pairs), and where its content begins."""
    lead = data[at]
    if lead <= 0x7F or lead >= 0xE0:  # small integers
        return "bytes", 0, at + 1
    if lead <= 0x9F:
        return ("map" if lead <= 0x8F else "array"), lead & 0x0F, at + 1
    if lead <= 0xBF:  # short text
        return "bytes", lead & 0x1F, at + 1
    if lead in _FIXED:
        return "bytes", _FIXED[lead], at + 1
    if lead in _SIZED:
        kind, width = _SIZED[lead]
        return kind, int.from_bytes(data[at + 1 : at + 1 + width], "big"), at + 1 + width
    raise WireError(
        f"expected msgpack without extension types, got byte 0x{lead:02x} at offset {at}; "
        "send times as numbers or text, arrays as {b'__ndarray__': ...}"
    )


def _scan(data: bytes, limits: Limits) -> None:
    """Raises WireError unless `data` is exactly one msgpack value within the limits.

    The format: https://github.com/msgpack/msgpack/blob/master/spec.md
    """
    at, items = 0, 0
    waiting = [1]  # values still to come in each open container
    while waiting:
        if waiting[-1] == 0:
            waiting.pop()
            continue
        waiting[-1] -= 1
        if at >= len(data):
            raise WireError(f"the message ends early, after {len(data)} bytes; send one complete msgpack map")
        kind, length, at = _head(data, at)
        if kind == "bytes":
            at += length
        else:
            length *= 2 if kind == "map" else 1
            items += length
            waiting.append(length)
            if items > limits.items:
                raise WireError(
                    f"expected at most {limits.items} values, got {items} or more; "
                    "send numbers in bulk as arrays, not lists"
                )
            if len(waiting) - 1 > limits.depth:
                raise WireError(f"expected at most {limits.depth} nested containers; flatten the message")
    if at > len(data):
        raise WireError(f"the message ends early: {at} bytes announced, got {len(data)}; was it cut?")
    if at < len(data):
        raise WireError(f"expected one msgpack value per frame, got {len(data) - at} bytes after it")


# --- structure ⇄ numpy -----------------------------------------------------------------------------------


def _decode(value: Any, where: tuple, limits: Limits) -> Any:
    if isinstance(value, list):
        return [_decode(item, (*where, i), limits) for i, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    if _ARRAY in value:
        return _decode_array(value, where, limits)
    if _SCALAR in value:
        return _decode_scalar(value, where)
    for key in (_ARRAY, _SCALAR):
        if key.decode() in value:
            raise WireError(
                f"{_path(where)}: the key {key.decode()} came as text; "
                "send the keys of an array as msgpack bin (byte strings)"
            )
    return {key: _decode(item, (*where, key), limits) for key, item in value.items()}


def _decode_array(fields: dict, where: tuple, limits: Limits) -> np.ndarray:
    data, shape = fields.get(b"data"), fields.get(b"shape")
    dtype = _dtype(fields.get(b"dtype"), where)
    if not isinstance(data, bytes):
        raise WireError(f"{_path(where)}: expected an array's data as msgpack bin, got {_kind(data)}")
    if not isinstance(shape, list) or len(shape) > _MAX_NDIM or not all(type(n) is int and n >= 0 for n in shape):
        raise WireError(
            f"{_path(where)}: expected shape as a list of up to {_MAX_NDIM} sizes, got {reprlib.repr(shape)}"
        )
    count = math.prod(shape)
    # The second condition is for text of width 0, whose elements cost no bytes.
    if count * dtype.itemsize != len(data) or count > limits.message_bytes:
        raise WireError(
            f"{_path(where)}: shape {reprlib.repr(shape)} of {dtype} needs {count * dtype.itemsize} bytes, "
            f"got {len(data)}; send the whole array in C order"
        )
    try:
        array = np.ndarray(shape, dtype, buffer=data)
    except (ValueError, OverflowError) as error:  # (0, 2**63): empty, and yet too big for numpy
        raise WireError(f"{_path(where)}: numpy refuses shape {reprlib.repr(shape)}: {error}") from error
    if dtype.kind == "b" and array.view(np.uint8).max(initial=0) > 1:
        raise WireError(f"{_path(where)}: expected booleans as bytes 0 and 1, got other bytes")
    if dtype.kind == "U":
        code = np.ndarray(len(data) // 4, dtype.byteorder.replace("|", "=") + "u4", buffer=data)
        if np.any((code > 0x10FFFF) | ((code >= 0xD800) & (code <= 0xDFFF))):
            raise WireError(f"{_path(where)}: expected UTF-32 text, got code points outside Unicode")
    if not dtype.isnative:  # accelerators take native order only
        array = array.astype(dtype.newbyteorder("="))
        array.flags.writeable = False
    return array


def _decode_scalar(fields: dict, where: tuple) -> np.generic:
    data, dtype = fields.get(b"data"), _dtype(fields.get(b"dtype"), where)
    match dtype.kind:
        case "b":
            fits = isinstance(data, bool)
        case "i" | "u":
            fits = type(data) is int and np.iinfo(dtype).min <= data <= np.iinfo(dtype).max
        case "f":
            fits = type(data) in (int, float)
        case "S":
            fits = isinstance(data, bytes)
        case "U":
            fits = isinstance(data, str)
        case _:
            fits = False
    if not fits:
        raise WireError(
            f"{_path(where)}: expected a scalar of dtype {dtype.str}, got {reprlib.repr(data)}; "
            "send a plain msgpack value"
        )
    with np.errstate(over="ignore"):  # 1e10 as float16 is inf
        return dtype.type(data)


def _encode(value: Any, where: tuple) -> Any:
    if len(where) > LIMITS.depth:
        raise WireError(f"expected at most {LIMITS.depth} nested containers; flatten the message")
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        raise WireError(f"{_path(where)}: expected an integer of 64 bits, got {reprlib.repr(value)}")
    # float64, str_ and bytes_ scalars are subclasses of Python's types and travel as those, as with openpi
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return value
    if isinstance(value, (bytearray, memoryview)):
        return bytes(value)
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, (str, bytes)):
                raise WireError(f"{_path(where)}: expected keys of type str, got {reprlib.repr(key)}")
        return {key: _encode(item, (*where, key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encode(item, (*where, i)) for i, item in enumerate(value)]
    if isinstance(value, np.ndarray) and _DTYPES.fullmatch(value.dtype.str):
        return {
            _ARRAY: True,
            b"data": value.tobytes(),
            b"dtype": value.dtype.str,
            b"shape": list(value.shape),
        }
    if isinstance(value, np.generic) and value.dtype.kind in "biuf" and value.dtype.itemsize <= 8:
        return {_SCALAR: True, b"data": value.item(), b"dtype": value.dtype.str}
    raise WireError(
        f"{_path(where)}: cannot send {_kind(value)}; "
        "send numpy arrays of booleans, numbers or text (convert with np.asarray, bfloat16 to float32)"
    )


def _dtype(name: Any, where: tuple) -> np.dtype:
    if isinstance(name, str) and _DTYPES.fullmatch(name):
        try:
            return np.dtype(name)
        except (TypeError, ValueError):  # widths this platform lacks
            pass
    raise WireError(
        f"{_path(where)}: expected the dtype of booleans, numbers or text as numpy writes it, like '<f4' or "
        f"'|u1', got {reprlib.repr(name)}"
    )


def _path(where: tuple) -> str:
    return "message" + "".join(f"[{reprlib.repr(key)}]" for key in where)


def _kind(value: Any) -> str:
    dtype = getattr(value, "dtype", None)
    return type(value).__name__ + (f" of dtype {dtype}" if dtype is not None else "")
