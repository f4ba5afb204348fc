"""An engine on a real card: exports pages that a kernel has just written. Says the message, and the pages' digests."""

from __future__ import annotations

import hashlib
import json
import sys

import torch

from lmpipe.cuda.cupy_runtime import open_device
from lmpipe.cuda.ipc import ExportedPages
from lmpipe.cuda.runtime import Stream
from lmpipe.errors import DeviceError
from lmpipe.handles import SessionId
from lmpipe.messages import Register, encode

PLANES, PAGES, PAGE = 4, 64, 16384
apart = sys.argv[1] == "apart"
memory = torch.zeros((PAGES, PLANES, PAGE) if apart else (PLANES, PAGES, PAGE), dtype=torch.uint8, device="cuda")
planes = [memory[:, i] if apart else memory[i] for i in range(PLANES)]
try:
    exported = ExportedPages(open_device("0"), [plane.data_ptr() for plane in planes], planes[0].stride(0), PAGE, PAGES)
except DeviceError as error:
    print(json.dumps({"refused": str(error)}), flush=True)
    sys.exit(0)
stream = torch.cuda.Stream()
torch.cuda.synchronize()
with torch.cuda.stream(stream):
    torch.cuda._sleep(200_000_000)
    memory.random_(0, 255)
exported.mark(Stream(stream.cuda_stream))
hello = Register(SessionId(1), [2], "producer", "e", 1, None, 256, 0, 1, "", 0, exported.source)
print(json.dumps({"hello": bytes(encode(hello)[0]).hex()}), flush=True)  # while the kernels still run
torch.cuda.synchronize()
digests = [
    [hashlib.sha256(plane[page].cpu().numpy().tobytes()).hexdigest() for page in range(PAGES)] for plane in planes
]
print(json.dumps({"digests": digests}), flush=True)
sys.stdin.read()
