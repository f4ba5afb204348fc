"""Hashing, shared words, holds and page copies, in C++. Owns the extension module; knows nothing of the pipeline."""

try:
    from lmpipe.native._native import (  # pyright: ignore[reportMissingModuleSource]
        MAX_HEAD_DIM,
        Copier,
        Headers,
        HoldTable,
        PagePool,
        Region,
        Words,
        blake3_many,
        chain_keys,
        features,
        fence,
        fp8_decode,
        fp8_encode,
        populate,
        rotated_decode,
        rotated_encode,
        split_decode,
        split_encode,
        xxh3_128,
        xxh3_128_pieces,
    )
except ImportError as error:
    raise ImportError(
        f"lmpipe's C++ extension cannot be loaded: {error}. In a checkout, with a C++20 compiler (GCC 11, clang 14 or"
        " later) installed, `make native` builds it; elsewhere `pip install --force-reinstall lmpipe` does.",
        name=error.name,
        path=error.path,
    ) from error

__all__ = [
    "MAX_HEAD_DIM",
    "Copier",
    "Headers",
    "HoldTable",
    "PagePool",
    "Region",
    "Words",
    "blake3_many",
    "chain_keys",
    "features",
    "fence",
    "fp8_decode",
    "fp8_encode",
    "populate",
    "rotated_decode",
    "rotated_encode",
    "split_decode",
    "split_encode",
    "xxh3_128",
    "xxh3_128_pieces",
]
