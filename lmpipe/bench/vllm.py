"""lmpipe inside real vLLM engines on this machine's processors: time to first token, and a mixed workload's throughput.

The model is a Llama of 53 MB (bf16) written on the spot: hidden 512, 8 layers, 8 query and 2 KV heads of 64, that is,
4 KiB of KV a token. `vllm_ttft.py` and `vllm_mixed.py` say what is inside the clock. All engines of a phase are alive
at the same time, in processes of their own, and idle when it is not their turn.

A quick run has a small model in fp32 and checks every token.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from lmpipe.bench import vllm_mixed, vllm_ttft
from lmpipe.bench.harness import Setting, main
from lmpipe.bench.report import Figure
from lmpipe.bench.vllm_caches import Cache, ExampleCache, LmpipeCache, lmpipe_options, wait_attached
from lmpipe.bench.vllm_client import Common, Plan, running
from lmpipe.bench.vllm_mixed import Workload
from lmpipe.bench.vllm_models import LARGE, SMALL, ModelSize, write_llama
from lmpipe.bench.vllm_ttft import Prompts
from lmpipe.demo.node import DemoNode
from lmpipe.errors import LmpipeError

ROUNDS = 5
KV_BYTES = 1 << 28
SMALL_KV_BYTES = 1 << 25
"""Room for 8,192 tokens of the large model, where the mixed workload comes to more than 17,000."""

PROMPTS = Prompts((4096, 8192), ROUNDS, warm_ups=1, vocabulary=LARGE.vocabulary)
QUICK_PROMPTS = Prompts((1024,), 1, warm_ups=0, vocabulary=SMALL.vocabulary)
WORKLOAD = Workload(ROUNDS, 8, 4, system=1024, question=480, answer=32, vocabulary=LARGE.vocabulary)
QUICK_WORKLOAD = Workload(1, 2, 2, system=256, question=124, answer=4, vocabulary=SMALL.vocabulary)
MARGIN_TOKENS = 512


def run(setting: Setting) -> list[Figure]:
    """Time to first token, then throughput."""
    prompts, workload = (QUICK_PROMPTS, QUICK_WORKLOAD) if setting.quick else (PROMPTS, WORKLOAD)
    with scratch(setting.disk) as work, ExitStack() as stack:
        common = common_of(work, SMALL if setting.quick else LARGE, max(prompts.sizes), quick=setting.quick)
        caches: list[Cache] = [
            LmpipeCache(work / "lmpipe", tiers=("DRAM", "SSD") if setting.quick else ("DRAM", "SSD", "remote"))
        ]
        if not setting.quick:
            caches.append(ExampleCache(work / "example", common.longest_tokens))
        for cache in caches:
            stack.enter_context(cache)
        figures = vllm_ttft.measure(common, caches, prompts, setting.say)
        stack.close()
        return [*figures, *mixed(common, workload, work / "mixed", setting)]


def mixed(common: Common, workload: Workload, work: Path, setting: Setting) -> list[Figure]:
    """The workload in an engine without and one with lmpipe, both with little room of their own."""
    work.mkdir()
    small = replace(common, kv_bytes=SMALL_KV_BYTES, longest_tokens=workload.longest + MARGIN_TOKENS)
    setting.say("mixed: starting 2 engines")
    with DemoNode(work) as node:
        plans = [Plan("without"), Plan("lmpipe", lmpipe_options(node))]
        with running(small, plans) as (plain, attached):
            wait_attached(node, attached)
            return vllm_mixed.measure(plain, [attached], workload, setting.say)


@contextmanager
def scratch(disk: Path) -> Generator[Path]:
    """A directory on a disk, removed at the end with all that is in it; its logs stay when LmpipeError is raised."""
    disk.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="lmpipe-vllm-", dir=disk.resolve()))
    try:
        yield work
    except LmpipeError:
        for entry in work.iterdir():
            if entry.name != "logs":
                shutil.rmtree(entry, ignore_errors=True)
        raise
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    shutil.rmtree(work, ignore_errors=True)


def common_of(work: Path, model: ModelSize, longest_tokens: int, *, quick: bool) -> Common:
    """What the engines have in common; the model is written below `work`."""
    logs = work / "logs"
    logs.mkdir()
    return Common(
        write_llama(work / "model", model),
        "float32" if quick else "bfloat16",
        longest_tokens + MARGIN_TOKENS,
        KV_BYTES,
        not quick,
        logs,
    )


if __name__ == "__main__":
    sys.exit(main(run))
