"""An engine whose pages lie where the node looks after them. Says their path; for each line, saves and loads."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from rig import CHUNK_TOKENS, LAYOUT, tokens_of

from lmpipe import native
from lmpipe.messages import PageSource
from lmpipe.producer import Producer
from lmpipe.rundir import RunDir
from lmpipe.shm.descriptor import HEADER_BYTES
from lmpipe.shm.pages import PageSegment

PAGES = 64
run_dir = Path(sys.argv[1])
planes, size = LAYOUT.plane_count, LAYOUT.page_bytes
with PageSegment.create(RunDir(run_dir).pages, HEADER_BYTES + planes * PAGES * size) as pages:
    print(pages.path, flush=True)
    offsets = HEADER_BYTES + np.arange(planes, dtype=np.uint64) * np.uint64(PAGES * size)
    sizes = np.full(planes, size, np.uint64)
    source = PageSource(str(pages.path), pages.id.hex(), offsets, sizes, sizes, PAGES)
    pool = native.PagePool([pages.segment.region], np.zeros(planes, np.uint32), offsets, sizes, sizes, PAGES)
    memory = np.frombuffer(pages.segment.buf, np.uint8, planes * PAGES * size, HEADER_BYTES).reshape(
        planes, PAGES, size
    )
    ids = np.arange(8, dtype=np.int32).reshape(2, -1)
    with Producer(run_dir, LAYOUT, model="test", pages=source) as producer:
        for seed, _ in enumerate(sys.stdin):
            assert producer.wait_ready(30), producer.reason
            prompt = producer.prompt(tokens_of(seed, 2))
            memory[:, :8] = seed + 1
            assert producer.save(prompt, None, ids).wait(30)
            memory[:, :8] = 0
            with producer.lookup(prompt) as found:
                loaded = producer.load(found, pool, ids).chunks
            assert (memory[:, :8] == seed + 1).all() and CHUNK_TOKENS * loaded == found.tokens
            print(loaded, flush=True)
    del pool, memory
