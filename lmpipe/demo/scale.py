"""How large the demonstration is: the model, what is asked of it, and what memory that takes. Knows no torch.

A GPU is given the largest model that has room beside its KV, in bf16; the CPU a small one in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lmpipe.demo.tokens import VOCABULARY
from lmpipe.demo.workload import FULL, LONG, MIDDLE, QUICK, WorkloadSize
from lmpipe.errors import LmpipeError

GIB = 1 << 30
ITEM_BYTES = {"float32": 4, "bfloat16": 2}
RING_BYTES = GIB // 2
"""Of each of three rings on a GPU's node: two encoded chunks at least."""
SPARE = 1.5
"""Times the workload's KV: what a tier has room for."""


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Dimensions of the model; the one of `full` takes over two seconds for 4K tokens on two cores.

    `residual` scales what each layer adds: the deeper the model and the shorter its numbers, the more rounding grows
    from layer to layer.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    feed_forward: int
    dtype: str = "float32"
    residual: float = 1.0

    @property
    def weights(self) -> int:
        """How many, but for norms."""
        attention = 2 * self.hidden * (self.hidden + self.hidden // self.heads * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.feed_forward) + 2 * VOCABULARY * self.hidden

    @property
    def token_bytes(self) -> int:
        """KV of one token."""
        return 2 * self.layers * self.kv_heads * (self.hidden // self.heads) * ITEM_BYTES[self.dtype]

    def device_bytes(self, tokens: int) -> int:
        """Roughly: weights, a prompt's KV three times (loaded, grown by a token, being saved), and room to compute."""
        computing = 16 * self.hidden + 4 * self.feed_forward
        item = ITEM_BYTES[self.dtype]
        return GIB + self.weights * item + tokens * (3 * self.token_bytes + computing * item)


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes that are free: on the device, in shared memory, on the disk."""

    device: int
    shared: int
    disk: int

    def holds(self, other: Room) -> bool:
        """Whether there is enough of each."""
        return self.device >= other.device and self.shared >= other.shared and self.disk >= other.disk

    def __str__(self) -> str:
        sizes = ((self.device, "on the GPU"), (self.shared, "in /dev/shm"), (self.disk, "on the disk"))
        return ", ".join(f"{nbytes / GIB:.1f} GiB {where}" for nbytes, where in sizes)


@dataclass(frozen=True, slots=True)
class Scale:
    """One size of the demonstration.

    `tie`: rounding in a short format decides between logits that are this near, and matrices of another shape are
    rounded otherwise (decision 7). 0: every token has to be the same.
    """

    name: str
    model: ModelSize
    workload: WorkloadSize
    device: str = "cpu"
    tie: float = 0.0

    def agrees(self, lag: float | None) -> bool:
        """Whether tokens are as expected. `lag`: how far the first other one was ahead; None: there is none."""
        return lag is None or lag < self.tie

    @property
    def tier_bytes(self) -> int:
        """That each tier needs, in whole GiB."""
        return -int(-SPARE * self.workload.tokens * self.model.token_bytes // GIB) * GIB

    @property
    def needs(self) -> Room:
        """On a GPU's machine. The arena twice: an engine goes on mapping that of a node that was killed."""
        device = self.model.device_bytes(self.workload.longest)
        return Room(device, 2 * self.tier_bytes + 3 * RING_BYTES + GIB, 2 * self.tier_bytes)


ON_CPU = (Scale("full", ModelSize(512, 8, 8, 2, 1408), FULL), Scale("quick", ModelSize(256, 4, 8, 2, 704), QUICK))
ON_GPU = (
    Scale("8b", ModelSize(4096, 32, 32, 8, 14336, "bfloat16", 0.25), LONG, "cuda", 0.25),
    Scale("3b", ModelSize(3072, 28, 24, 8, 8192, "bfloat16", 0.25), LONG, "cuda", 0.25),
    Scale("1b", ModelSize(2048, 16, 32, 8, 8192, "bfloat16", 0.25), LONG, "cuda", 0.25),
    Scale("gpu-quick", ModelSize(2048, 16, 32, 8, 8192, "bfloat16", 0.25), MIDDLE, "cuda", 0.25),
)
"""Largest first, with Llama 3's dimensions; the last one is what `--quick` asks for."""
SCALES = {scale.name: scale for scale in (*ON_CPU, *ON_GPU)}


def choose(device: str, room: Callable[[], Room | None], *, quick: bool) -> Scale:
    """The largest scale that has room.

    Args:
        device: "cpu", "cuda" (also AMD's), or "auto": a GPU where torch sees one with room for the smallest scale.
        room: asks what is free; None where torch sees no GPU.
        quick: the smallest.

    Raises:
        LmpipeError: "cuda", and there is no GPU, or too little room.
    """
    if device != "cpu":
        free = room()
        candidates: Sequence[Scale] = ON_GPU[-1:] if quick else ON_GPU[:-1]
        fitting = [scale for scale in candidates if free is not None and free.holds(scale.needs)]
        if fitting:
            return fitting[0]
        if device == "cuda":
            needs = candidates[-1].needs
            problem = "torch sees no GPU" if free is None else f"it needs {needs}; there are {free}"
            raise LmpipeError(f"the demo cannot run on a GPU: {problem} (--device cpu runs it on the CPU)")
    return ON_CPU[quick]
