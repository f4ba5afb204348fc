"""Damage to bytes and to text, drawn from a seeded generator: the same generator, the same damage."""

from __future__ import annotations

import random
import re

NUMBERS = (0, 1, 2, 7, 8, 127, 128, 255, 256, 4095, 4096, 65535, 65536)
NUMBERS += (2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 1)
"""Where counts, sizes and offsets change their ways."""
_DIGITS = re.compile(r"-?\d+(?:\.\d+)?")
_WORD = re.compile(r"[A-Za-z_][\w.-]*")
_MARKS = "{}[]:,\"'\\-#&*!|>%@`\n\t \0\u2028\ud7ff0e1.~"


def damaged_bytes(data: bytes, draw: random.Random, others: list[bytes]) -> bytes:
    """One to four pieces of damage; `others` is what parts are taken from."""
    found = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        _damage(found, draw, others)
    return bytes(found)


def _damage(data: bytearray, draw: random.Random, others: list[bytes]) -> None:
    size = len(data)
    at = draw.randrange(size) if size else 0
    kind = draw.randrange(10)
    if kind <= 2 and size:
        data[at] ^= 1 << draw.randrange(8)
    elif kind == 3 and size:
        data[at] = draw.choice((0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)))
    elif kind <= 5:
        width = draw.choice((1, 2, 4, 8))
        at -= at % width
        data[at : at + width] = (draw.choice(NUMBERS) & (1 << 8 * width) - 1).to_bytes(width, "little")
    elif kind == 6:
        del data[at : at + draw.choice((1, 2, 8, 72, 4096, size))]
    elif kind == 7:
        data[at:at] = data[at : at + draw.choice((1, 8, 72, 4096))]
    elif kind == 8:
        data[at:at] = draw.randbytes(draw.choice((1, 3, 16)))
    else:
        other = draw.choice(others)
        data[at:] = other[draw.randrange(len(other) + 1) :] if draw.random() < 0.5 else other[at:]


def damaged_text(text: str, draw: random.Random, others: list[str]) -> str:
    """The same for text of fields and values, most of it of a kind that a reader has to understand to refuse."""
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        text = _damage_text(text, draw, others)
    return text


def _damage_text(text: str, draw: random.Random, others: list[str]) -> str:
    kind = draw.randrange(9)
    at = draw.randrange(len(text) + 1)
    if kind <= 1 and (found := list(_DIGITS.finditer(text))):
        spot = draw.choice(found)
        new = str(draw.choice((*NUMBERS, -1, 1.5, "1e400", "0x10", "1" * 400, "null", '"x"', "[]")))
        return text[: spot.start()] + new + text[spot.end() :]
    if kind <= 3 and (found := list(_WORD.finditer(text))):
        spot = draw.choice(found)
        word = draw.choice(_WORD.findall(draw.choice(others)) or ["x"])
        return text[: spot.start()] + draw.choice((word, word, "", "\u00e9" * 40, "null", "true")) + text[spot.end() :]
    if kind == 4:
        return text[:at] + draw.choice(_MARKS) * draw.choice((1, 1, 2, 300, 3000)) + text[at:]
    if kind == 5:
        return text[:at] + text[at + draw.choice((1, 3, 20, 200)) :]
    if kind == 6:
        return text[:at]
    lines = text.split("\n")
    line = draw.randrange(len(lines))
    if kind == 7:
        lines[line : line + 1] = draw.choice(([], [lines[line]] * 2, [" " + lines[line]], [lines[line].lstrip()]))
    else:
        lines.insert(line, draw.choice(draw.choice(others).split("\n")))
    return "\n".join(lines)
