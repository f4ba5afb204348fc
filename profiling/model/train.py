"""Trains the byte-level Llama that codecs are judged on, on the processors of one machine, in a given time.

    train.py --out DIR --minutes 75      train; started again with the same DIR it goes on where it was
    train.py --out DIR --export TO       write the weights as bfloat16, the held-out text and the figures of the card

The schedule follows the clock: warm-up, full speed, then a slope that ends when the time is over, whatever else the
machine had to do. Matrices are trained by Muon, the rest by AdamW. Sequences are short at first and of the full
context at the end. Each thread has its own part of a batch, so that threads wait for each other once
a step.
"""

from __future__ import annotations

import argparse
import gzip
import json
import lzma
import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from text import gather
from torch import Tensor, nn
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

SEED = 4
CONTEXT = 2048
BATCH_BYTES = 4096
LENGTHS = ((0.0, 256), (0.5, 512), (0.85, CONTEXT))
"""Part of the time from which on sequences have this length."""
BLOCK = 256
WARM_UP = 0.03
DECAY = 0.4
PEAK = 4e-3
CHECKPOINT_S = 240.0
SAY_STEPS = 20


def config() -> LlamaConfig:
    """Heads of 128 as in larger Llamas, two queries to each KV head; 3.2 million parameters."""
    return LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=128,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        dtype="float32",
    )


class Training:
    """Model, optimisers and how far they are."""

    def __init__(self, out: Path, threads: int) -> None:
        torch.manual_seed(SEED)
        torch.set_num_threads(1)
        self.threads, self.pool = threads, ThreadPoolExecutor(threads)
        self.path = out / "state.pt"
        self.model = LlamaForCausalLM(config())
        self.model.set_attn_implementation("blocked")
        matrices = [
            weight for name, weight in self.model.named_parameters() if weight.ndim == 2 and "embed" not in name
        ]
        others = [weight for name, weight in self.model.named_parameters() if weight.ndim != 2 or "embed" in name]
        self.optimisers = [
            torch.optim.Muon(matrices, lr=PEAK, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=PEAK, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        self.random = torch.Generator().manual_seed(SEED)
        self.done, self.steps, self.seen_bytes = 0.0, 0, 0
        if self.path.exists():
            self._load()

    def _load(self) -> None:
        state = torch.load(self.path)
        self.model.load_state_dict(state["model"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.random.set_state(state["random"])
        self.done, self.steps, self.seen_bytes = state["done"], state["steps"], state["seen_bytes"]

    def save(self) -> None:
        """Write a checkpoint; the one before stays whole until this one is."""
        state = {
            "model": self.model.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "random": self.random.get_state(),
            "done": self.done,
            "steps": self.steps,
            "seen_bytes": self.seen_bytes,
        }
        new = self.path.with_suffix(".new")
        torch.save(state, new)
        new.rename(self.path)

    def batch(self, text: Tensor) -> Tensor:
        """Sequences from random places."""
        length = max(length for begin, length in LENGTHS if self.done >= begin)
        starts = torch.randint(len(text) - length, (BATCH_BYTES // length,), generator=self.random)
        return torch.stack([text[start : start + length] for start in starts]).long()

    def step(self, text: Tensor) -> float:
        """One batch; its loss in bits per byte."""
        rate = PEAK * min(1.0, self.done / WARM_UP + 0.01, max(1 - self.done, 0.0) / DECAY)
        for optimiser in self.optimisers:
            optimiser.param_groups[0]["lr"] = rate
        ids = self.batch(text)
        weights = list(self.model.parameters())
        found = list(self.pool.map(self.gradients, ids.chunk(self.threads)))
        for weight, *parts in zip(weights, *(gradients for _, gradients in found), strict=True):
            weight.grad = torch.stack(parts).sum(0) / (ids.numel() - len(ids))
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
        self.steps += 1
        self.seen_bytes += ids.numel()
        return sum(loss for loss, _ in found) / (ids.numel() - len(ids)) / math.log(2)

    def gradients(self, ids: Tensor) -> tuple[float, tuple[Tensor, ...]]:
        """Loss in nats over some sequences, and its gradient for each weight."""
        with torch.autocast("cpu", torch.bfloat16):
            loss = cross_entropy(self.model, ids)
        return loss.item(), torch.autograd.grad(loss, tuple(self.model.parameters()))


def blocked_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, scaling: float, **_: object
) -> tuple[Tensor, None]:
    """Causal attention by blocks of queries; on these processors faster than the kernel that comes with torch."""
    shared = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    found = []
    for start in range(0, query.shape[2], BLOCK):
        part = query[:, :, start : start + BLOCK] * scaling
        end = start + part.shape[2]
        scores = part @ key[:, :, :end].transpose(2, 3)
        later = torch.ones(part.shape[2], part.shape[2], dtype=torch.bool).triu(1)
        scores[..., start:].masked_fill_(later, -math.inf)
        found.append(scores.softmax(-1) @ value[:, :, :end])
    return torch.cat(found, 2).transpose(1, 2).contiguous(), None


def cross_entropy(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """Sum over every byte but the first of each sequence, in nats."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")


@torch.no_grad()
def bits_per_byte(model: LlamaForCausalLM, text: bytes) -> float:
    """Code length of a text cut into windows of the full context that know nothing of each other."""
    ids = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    bits = 0.0
    for window in ids.split(CONTEXT):
        bits += 8 + cross_entropy(model, window[None]).item() / math.log(2)
    return bits / len(text)


def train(out: Path, minutes: float, threads: int) -> None:
    """Until the time is over; what was done before counts as done."""
    out.mkdir(parents=True, exist_ok=True)
    text = gather()
    data = torch.frombuffer(bytearray(text.train), dtype=torch.uint8)
    training = Training(out, threads)
    parameters = sum(weight.numel() for weight in training.model.parameters())
    print(
        f"{parameters:,} parameters, {len(data):,} bytes {text.train_bytes}, {len(text.held_out):,} held out",
        flush=True,
    )
    duration = minutes * 60
    begin = time.time() - training.done * duration
    saved, losses = time.time(), []
    while training.done < 1.0:
        losses.append(training.step(data))
        now = time.time()
        training.done = (now - begin) / duration
        if training.steps % SAY_STEPS == 0:
            mean, losses = sum(losses) / len(losses), []
            print(f"{training.done:6.1%} step {training.steps} {training.seen_bytes:,} B {mean:.3f} bits", flush=True)
        if now - saved > CHECKPOINT_S:
            training.save()
            saved = time.time()
            print(f"held out, first 32 KiB: {bits_per_byte(training.model, text.held_out[: 32 << 10]):.3f}", flush=True)
    training.save()


def export(out: Path, to: Path, threads: int) -> None:
    """Weights as bfloat16, the held-out text, and figures of both; prints the figures."""
    text, training = gather(), Training(out, threads)
    model = training.model.bfloat16()
    model.save_pretrained(to)
    (to / "held_out.txt").write_bytes(text.held_out)
    size = len(text.held_out)
    figures = {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "steps": training.steps,
        "trained_on_bytes": training.seen_bytes,
        "part_of_the_schedule": round(min(training.done, 1.0), 4),
        "train_bytes": text.train_bytes,
        "held_out_bytes": size,
        "held_out_files": text.held_out_files,
        "held_out_bits_per_byte": round(bits_per_byte(model.float(), text.held_out), 4),
        "gzip_bits_per_byte": round(8 * len(gzip.compress(text.held_out, 9)) / size, 4),
        "xz_bits_per_byte": round(8 * len(lzma.compress(text.held_out, preset=9 | lzma.PRESET_EXTREME)) / size, 4),
    }
    (to / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


def main() -> None:
    """Train or export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for checkpoints")
    parser.add_argument("--minutes", type=float, default=75.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--export", type=Path, metavar="TO", help="write the model there instead of training it")
    args = parser.parse_args()
    AttentionInterface.register("blocked", blocked_attention)
    if args.export:
        export(args.out, args.export, args.threads)
    else:
        train(args.out, args.minutes, args.threads)


if __name__ == "__main__":
    main()
