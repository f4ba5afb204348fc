"""Codecs on a GPU: Triton kernels that read an engine's pages and write encoded chunks, and back.

One file per codec, encode and decode side by side; the bytes are those of `lmpipe.codecs`. Everything runs on torch's
current stream, and nothing waits for it. Knows no slot, no tier and no engine; only an engine's process, or the gather
of a GPU, imports this package.
"""
