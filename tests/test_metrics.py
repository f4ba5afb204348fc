"""Counter tables and their exposition, fetched over HTTP as Prometheus does."""

from __future__ import annotations

import urllib.request

from prometheus_client.parser import text_string_to_metric_families

from lmpipe import metrics
from lmpipe.exposition import Sample, render, serve
from lmpipe.metrics import GAUGES, PRODUCER_COUNTERS, RUNNER_COUNTERS, STAGE_COUNTERS, worker_counters

SAMPLES = [
    Sample("gather", {"turns": 7, "gather_committed_chunks": 3, "gather_dram_rows": 5}),
    Sample("gather", {"turns": 1, "gather_committed_chunks": 1, "gather_dram_rows": 4}),  # a later life
    Sample("engine-1", {"lookups": 2, "something_new": 1}),
]


def values(text: str) -> dict[tuple[str, str], float]:
    families = text_string_to_metric_families(text)
    return {(s.name, s.labels["process"]): s.value for family in families for s in family.samples}


def test_a_worker_counts_for_its_runner_and_each_of_its_stages() -> None:
    names = worker_counters(["gather", "persist"])
    assert len(set(names)) == len(names)
    assert set(RUNNER_COUNTERS) <= set(names)
    assert {"gather_messages", "gather_committed_chunks", "persist_messages", "persist_read_bytes"} <= set(names)
    assert not any(name.startswith("compress_") for name in names)


def test_gauges_are_counters_that_exist_and_everything_has_a_help_text() -> None:
    every = {*worker_counters([*STAGE_COUNTERS]), *PRODUCER_COUNTERS}
    assert every >= GAUGES
    assert every == set(metrics.HELP)


def test_counters_of_lives_add_up_and_gauges_are_the_latest() -> None:
    assert values(render(SAMPLES)) == {
        ("lmpipe_turns_total", "gather"): 8,
        ("lmpipe_gather_committed_chunks_total", "gather"): 4,
        ("lmpipe_gather_dram_rows", "gather"): 4,
        ("lmpipe_lookups_total", "engine-1"): 2,
        ("lmpipe_something_new_total", "engine-1"): 1,
    }


def test_served_over_http() -> None:
    exporter = serve("127.0.0.1", 0, lambda: SAMPLES)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{exporter.port}/metrics", timeout=10) as response:
            assert values(response.read().decode()) == values(render(SAMPLES))
    finally:
        exporter.close()
