"""Numbers of an engine as fp32 and back, by their bits: the same on every GPU and in Triton's interpreter.

A word is a number's bits as an unsigned integer. `DTYPE` is a name of `lmpipe.codecs.header.DTYPES`.
"""

from __future__ import annotations

import triton
import triton.language as tl

WORDS = {"bfloat16": tl.uint16, "float16": tl.uint16, "float32": tl.uint32}
"""Type of a word by dtype."""


@triton.jit
def finite(word: tl.tensor, DTYPE: tl.constexpr):
    """Whether words are neither NaN nor infinite."""
    if DTYPE == "bfloat16":
        mask = 0x7F80
    elif DTYPE == "float16":
        mask = 0x7C00
    else:
        mask = 0x7F800000
    return (word & mask) != mask


@triton.jit
def to_float(word: tl.tensor, DTYPE: tl.constexpr):
    """Words as fp32, exactly."""
    if DTYPE == "bfloat16":
        number = (word.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif DTYPE == "float16":
        number = word.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        number = word.to(tl.float32, bitcast=True)
    return number


@triton.jit
def to_word(number: tl.tensor, DTYPE: tl.constexpr):
    """fp32 as words, rounded to nearest even and kept finite."""
    if DTYPE == "bfloat16":
        bits = tl.clamp(number, -3.3895313892515355e38, 3.3895313892515355e38).to(tl.uint32, bitcast=True)
        word = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16)
    elif DTYPE == "float16":
        word = tl.clamp(number, -65504.0, 65504.0).to(tl.float16).to(tl.uint16, bitcast=True)
    else:
        word = tl.clamp(number, -3.4028234663852886e38, 3.4028234663852886e38).to(tl.uint32, bitcast=True)
    return word


@triton.jit
def nearest_integer(number: tl.tensor):
    """fp32 of 0 to 2^22 rounded to nearest even, as int32: a sum with 2^23 has no bits left behind the point."""
    return (number + 8388608.0).to(tl.int32, bitcast=True) - 0x4B000000
