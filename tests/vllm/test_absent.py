"""lmpipe is not there yet, is there, is gone, and is back: the engine answers all the time."""

from __future__ import annotations

from pathlib import Path

from cached import CHUNK, ask, connector, idle, producers, ready, settled, stats, tiers, tokens, until
from harness import Engine
from processes import EngineProcess

from lmpipe.testing import Node


def test_lmpipe_comes_and_goes(llama: Path, plain: EngineProcess, tmp_path: Path) -> None:
    node = Node(tiers(tmp_path))
    prompts = [tokens(3 * CHUNK + 1) for _ in range(4)]
    wanted = plain.generate(prompts, 8)
    try:
        with Engine(llama, connector(node)) as engine:
            assert ask(engine, prompts[:1]) == (wanted[:1], [0])
            node.start()
            ready(engine)
            assert ask(engine, prompts[1:2]) == (wanted[1:2], [0])
            settled(engine, "ssd", prompt=prompts[1])
            engine.reset_prefix_cache()
            assert ask(engine, prompts[1:2]) == (wanted[1:2], [3 * CHUNK])
            node.stop()
            until(lambda: all(producer.state == "absent" for producer in producers(engine)), "the node is missed")
            assert ask(engine, prompts[2:3]) == (wanted[2:3], [0])
            node.start()
            ready(engine)
            engine.reset_prefix_cache()
            assert ask(engine, prompts) == (wanted, [0, 3 * CHUNK, 0, 0])
            settled(engine)
            engine.reset_prefix_cache()
            node.kill("all")  # hits in DRAM need no process of lmpipe: the engine has mapped them
            assert ask(engine, prompts) == (wanted, [3 * CHUNK] * 4)
            node.start()
            ready(engine)
            engine.reset_prefix_cache()
            assert ask(engine, prompts) == (wanted, [3 * CHUNK] * 4)
            idle(engine)
            assert engine.free_blocks == engine.scheduler.kv_cache_manager.block_pool.num_gpu_blocks - 1
            assert stats(engine)["loaded_tokens"] == 6 * CHUNK + 24 * CHUNK
    finally:
        node.close()
