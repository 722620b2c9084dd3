"""Damage ONNX models at random: the fields of their messages, or the bytes of their files."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import onnx

_INTS = (0, 1, -1, 2, 3, 7, 127, 255, 2**31 - 1, 2**31, 2**40, 2**60, 2**62, 2**63 - 1, -(2**31), -(2**63))
_FLOATS = (0.0, -1.0, 1e-30, 1e30, float("nan"), float("inf"), float("-inf"))
_TEXTS = (
    *(
        "",
        "x",
        "Loop",
        "If",
        "Reshape",
        "ConstantOfShape",
        "Relu",
        "Add",
        "Shape",
        "com.microsoft",
        "ai.onnx.ml",
        "local",
    ),
    *("../x", "/etc/passwd", "a" * 5000, "\0", "\n", "ä/ö.ü", ".", "..", "a.b.", "__class__", "self", "forward", "n"),
)


def mutated(model: onnx.ModelProto, rng: random.Random, changes: int | None = None) -> onnx.ModelProto:
    """Return a copy with one to three fields changed, left out, doubled or exchanged."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    for _ in range(changes or rng.choice((1, 1, 1, 2, 3))):
        _change(result, rng)
    return result


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Return bytes with some flipped, left out, put in or cut off."""
    content = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(content) + 1)
        match rng.randrange(5):
            case 0 if at < len(content):
                content[at] ^= 1 << rng.randrange(8)
            case 1 if at < len(content):
                content[at] = rng.choice((0, 1, 127, 128, 255))
            case 2:
                content[at:at] = bytes(rng.randrange(256) for _ in range(rng.choice((1, 2, 8))))
            case 3:
                del content[at : at + rng.choice((1, 2, 16, 200))]
            case _ if rng.random() < 0.3:
                del content[at:]
    return bytes(content)


def _messages(message: Any) -> Iterator[Any]:
    yield message
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for each in value if field.is_repeated else (value,):
                yield from _messages(each)


def _change(model: onnx.ModelProto, rng: random.Random) -> None:
    messages = list(_messages(model))
    message = rng.choice(messages)
    fields = [field for field, _ in message.ListFields()]
    if not fields or rng.random() < 0.15:
        fields = list(message.DESCRIPTOR.fields)
    field = rng.choice(fields)
    repeated = field.is_repeated
    if field.type == field.TYPE_MESSAGE:
        _change_message(message, field, repeated, messages, rng)
    elif repeated:
        values = getattr(message, field.name)
        at = rng.randrange(len(values) + 1)
        if at == len(values) or rng.random() < 0.2:
            values.append(_scalar(field, None, messages, rng))
        elif rng.random() < 0.25:
            del values[at]
        else:
            values[at] = _scalar(field, values[at], messages, rng)
    elif rng.random() < 0.15:
        message.ClearField(field.name)
    else:
        setattr(message, field.name, _scalar(field, getattr(message, field.name), messages, rng))


def _change_message(message: Any, field: Any, repeated: bool, messages: list[Any], rng: random.Random) -> None:
    alike = [m for m in messages if m.DESCRIPTOR is field.message_type and m.ByteSize() < 20_000]
    if not repeated:
        if rng.random() < 0.4 or not alike:
            message.ClearField(field.name)
        else:
            _put(getattr(message, field.name), rng.choice(alike))
        return
    values = getattr(message, field.name)
    match rng.randrange(4) if values else 3:
        case 0:
            del values[rng.randrange(len(values))]
        case 1:
            values.append(rng.choice(values))
        case 2:
            one, other = rng.choice(values), rng.choice(values)
            copy = type(one).FromString(one.SerializeToString())
            _put(one, other)
            _put(other, copy)
        case _ if alike:
            values.append(rng.choice(alike))


def _put(place: Any, message: Any) -> None:
    copy = type(place).FromString(message.SerializeToString())  # one may hold the other
    place.CopyFrom(copy)


def _scalar(field: Any, old: Any, messages: list[Any], rng: random.Random) -> Any:
    if field.type == field.TYPE_ENUM:
        return rng.choice([value.number for value in field.enum_type.values])
    if field.type == field.TYPE_STRING:
        names = [n for m in messages if isinstance(m, onnx.NodeProto) for n in (*m.input, *m.output, m.op_type, m.name)]
        return rng.choice(names if names and rng.random() < 0.6 else _TEXTS)
    if field.type == field.TYPE_BYTES:
        data = old or b"abc"
        return rng.choice((b"", data[:-1], data + b"\0", data[: len(data) // 2], bytes(len(data)), b"\xff" * len(data)))
    if field.type in (field.TYPE_FLOAT, field.TYPE_DOUBLE):
        return rng.choice(_FLOATS)
    value = rng.choice(_INTS) if old is None or rng.random() < 0.6 else old + rng.choice((-1, 1, 2, 8))
    low, high = (-(2**31), 2**31 - 1) if field.type == field.TYPE_INT32 else (-(2**63), 2**63 - 1)
    if field.type in (field.TYPE_UINT64, field.TYPE_UINT32):
        low, high = 0, 2**64 - 1
    return min(max(value, low), high)
