"""A DALI checkpoint for another graph of the same reader: one made on a CPU goes on on a GPU, and the other way.

DALI takes a checkpoint only where every operator has the name that it had, and the operators that move images are named
after the devices. What decides which samples come, and what is drawn for them, is in operators that both have: the
reader and the random ones. Their states are put in place of a fresh checkpoint's, by name.

The format (DALI's `dali.proto`) is Protocol Buffers: field 1, repeated, is an operator: its name in field 1, its state
in field 2; the other fields are the pipeline's own.
"""

from __future__ import annotations

from collections.abc import Iterator

_OPERATOR, _NAME, _STATE = 1, 1, 2
_VARINT, _LENGTH = 0, 2


def transplant(saved: bytes, fresh: bytes) -> bytes:
    """`saved`'s states in a checkpoint with the operators of `fresh`.

    Raises:
        ValueError: an operator that has a state in `saved` is not in `fresh`, or one of them is no checkpoint.
    """
    states = dict(_operators(saved))
    made, kept = b"", set()
    for number, raw, content in _fields(fresh):
        if number == _OPERATOR:
            name = _name(content)
            made += states.get(name, raw)
            kept.add(name)
    if lost := [name for name, raw in states.items() if name not in kept and _has_state(raw)]:
        raise ValueError(f"nothing here takes the state of {', '.join(lost)}")
    return made + b"".join(raw for number, raw, _ in _fields(saved) if number != _OPERATOR)


def _operators(checkpoint: bytes) -> Iterator[tuple[str, bytes]]:
    for number, raw, content in _fields(checkpoint):
        if number == _OPERATOR:
            yield _name(content), raw


def _name(operator: bytes) -> str:
    return next(content for number, _, content in _fields(operator) if number == _NAME).decode()


def _has_state(raw: bytes) -> bool:
    _, _, operator = next(_fields(raw))
    return any(content for number, _, content in _fields(operator) if number == _STATE)


def _fields(message: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """Number, raw bytes, and content of each field.

    Raises:
        ValueError: not a message of numbers and strings.
    """
    place = 0
    while place < len(message):
        begin = place
        tag, place = _varint(message, place)
        if tag & 7 == _VARINT:
            _, place = _varint(message, place)
            content = b""
        elif tag & 7 == _LENGTH:
            length, place = _varint(message, place)
            content = message[place : place + length]
            place += length
        else:
            raise ValueError("not a checkpoint of DALI's")
        if place > len(message):
            raise ValueError("a checkpoint of DALI's that is cut short")
        yield tag >> 3, message[begin:place], content


def _varint(message: bytes, place: int) -> tuple[int, int]:
    """A number of 7 bits a byte, lowest first, and where it ends."""
    value = shift = 0
    while place < len(message):
        byte = message[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
        shift += 7
    raise ValueError("a checkpoint of DALI's that is cut short")
