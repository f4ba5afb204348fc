"""An engine's process that exports pages in its device's memory: the other side of gpu_ipc.py.

    python -m lmpipe.bench.gpu_exporter LAYERS HEADS DIM TOKENS

The first line on stdout is the message with which an engine registers, in hexadecimal; it ends with its stdin.
"""

from __future__ import annotations

import sys

import torch

from lmpipe.bench.gpu_device import Device
from lmpipe.cuda.cupy_runtime import open_device
from lmpipe.cuda.ipc import ExportedPages
from lmpipe.cuda.runtime import Stream
from lmpipe.handles import SessionId
from lmpipe.layout import CHUNK_TOKENS, KVLayout
from lmpipe.messages import Register, encode
from lmpipe.wire import VERSION


def main() -> int:
    """The exit status."""
    layers, heads, dim, tokens = map(int, sys.argv[1:])
    layout = KVLayout.paged(layers, heads, dim, "bfloat16", 16)
    device = Device(torch.device("cuda", 0))
    pages = tokens // layout.page_tokens
    memory = device.numbers(layout.plane_count, pages, layout.page_tokens, heads, dim)
    addresses = [plane.data_ptr() for plane in memory]
    exported = ExportedPages(open_device("0"), addresses, layout.page_bytes, layout.page_bytes, pages)
    device.synchronize()
    exported.mark(Stream(torch.cuda.current_stream().cuda_stream))
    hello = Register(SessionId(1), [VERSION], "producer", "bench", 1, None, CHUNK_TOKENS, 0, 1, "", 0, exported.source)
    print(bytes(encode(hello)[0]).hex(), flush=True)
    sys.stdin.read()
    return 0


if __name__ == "__main__":
    sys.exit(main())
