"""Benchmarks: each figure beside what it is measured against, taken in the same run. One file each, and a process each:

    python -m lmpipe.bench.save --quick      progress on stderr, figures as JSON on stdout

`lmpipe bench` runs them, judges and draws. This file knows only their names.
"""

SUMMARIES = {
    "save": "512 MiB of pages into DRAM, private and mapped, against memcpy; the engine thread's part of a 128K save",
    "load": "512 MiB from DRAM into pages, private and mapped, against memcpy",
    "lookup": "full hits of 4K, 32K and 128K tokens among 1M rows, hashing included",
    "hop": "stage to stage and engine to gather, against raw pyzmq",
    "ssd": "writes and cold reads of the SSD tier, against raw O_DIRECT",
    "codecs": "speed and ratio of every codec against memcpy; hits of conversations with each of them in the same DRAM",
    "idle": "private memory and wake-ups of a topology that has nothing to do",
    "recovery": "from SIGKILL of each process to service again, and what is lost",
    "rebuild": "the SSD's index from its files, DRAM's from the arena's headers, by what they hold",
    "ttft": "time to first token of the demo's model: without lmpipe, cold with it, warm from each tier",
    "vllm": "the same in real vLLM engines, against vLLM's own prefix cache; a mixed workload with and without lmpipe",
    "vllm-kill": "vLLM's first token when an lmpipe process is killed in a load or a save, and when hits are back",
    "gpu": "a GPU's kernels and transfers against its memory and link; first token, decode step of an 8B-shaped model",
}
"""What each benchmark measures, by name."""

_VLLM = ("vllm", "`make setup-vllm` makes an environment that has it: .venv-vllm/bin/lmpipe bench vllm")
_TRITON = ("triton", "pip install 'lmpipe[gpu]', beside torch for the GPU")
NEEDS = {"vllm": _VLLM, "vllm-kill": _VLLM, "gpu": _TRITON}
"""Packages that not every environment has, and what to do about it; without them "all" leaves the benchmark out."""

NEEDS_GPU = {"gpu"}
"""Benchmarks that need a GPU; so with them."""
