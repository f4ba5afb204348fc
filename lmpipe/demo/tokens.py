"""The demo's tokens are bytes, after padding, beginning and end: id = byte + 3. Knows no model.

A trained tokenizer would be a download, and would tell nothing more about a KV cache.
"""

from __future__ import annotations

PAD, BEGIN, END = 0, 1, 2
FIRST_BYTE = 3
VOCABULARY = FIRST_BYTE + 256


def tokens_of(text: str) -> list[int]:
    """A text as token ids, with the mark of the beginning."""
    return [BEGIN, *(byte + FIRST_BYTE for byte in text.encode())]
