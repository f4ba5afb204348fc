"""Kernels and transfers on a GPU against the device's own memory and link, and what they are worth to a model.

gpu_transfers.py, gpu_ipc.py and gpu_model.py say what is inside the clock. All is in this process, as it is in an
engine's, but for the pages that are saved by IPC. Sizes are cut to what the device and the host have room for; what was
left out is said on stderr.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec

import torch

from lmpipe.bench import gpu_ipc, gpu_model, gpu_transfers
from lmpipe.bench.gpu_device import Device
from lmpipe.bench.harness import Setting, main
from lmpipe.bench.report import Figure
from lmpipe.launch.host import memory_bytes
from lmpipe.layout import CHUNK_TOKENS

TOKENS, QUICK_TOKENS = 32 << 10, 2 * CHUNK_TOKENS
PROMPTS, QUICK_PROMPTS = (4 << 10, 32 << 10, 128 << 10), (2 * CHUNK_TOKENS,)
HOST_SHARE = 0.5
"""Of the host's free memory that may be pinned."""


def run(setting: Setting) -> list[Figure]:
    """Transfers, then the model.

    Raises:
        SystemExit: torch sees no GPU.
    """
    if not torch.cuda.is_available():
        raise SystemExit(f"gpu needs a GPU that torch sees, and torch {torch.__version__} sees none")
    device = Device(torch.device("cuda", torch.cuda.current_device()))
    setting.say(device.name)
    tokens = setting.size(TOKENS, QUICK_TOKENS)
    figures = gpu_transfers.run(setting, device, tokens)
    device.forget()
    figures += by_ipc(setting, device, tokens)
    device.forget()
    shape = gpu_model.TINY if setting.quick else gpu_model.LLAMA_8B
    wanted = QUICK_PROMPTS if setting.quick else PROMPTS
    sizes = gpu_model.sizes_that_fit(shape, wanted, device.free_bytes(), HOST_SHARE * memory_bytes("MemAvailable"))
    for tokens in wanted[len(sizes) :]:
        setting.say(f"{tokens} tokens left out: too little memory")
    return [*figures, *gpu_model.run(setting, device, shape, sizes)]


def by_ipc(setting: Setting, device: Device, tokens: int) -> list[Figure]:
    """Saves as gather does them, where CuPy is."""
    if find_spec("cupy") is None:
        setting.say("saves by IPC left out: CuPy is not here (pip install 'lmpipe[gpu]')")
        return []
    from lmpipe.cuda.cupy_runtime import open_device  # noqa: PLC0415  CuPy is optional

    layout = gpu_transfers.layout_of(setting)
    own = device.bytes(layout.chunk_bytes(tokens))
    with gpu_ipc.exported(layout, tokens) as source:
        return gpu_ipc.run(setting, open_device(source.device), source, layout, tokens, own.data_ptr())


if __name__ == "__main__":
    sys.exit(main(run))
