"""LMCache 0.5.6 as a cache of the vLLM benchmarks: its server, and the engines that are attached to it.

The server is `lmcache server` with all that it needs to be at its best here: its memory taken and touched at the start,
room for all that is saved, telemetry off. Knows LMCache by its command line, its HTTP API and its connector's options.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmpipe.bench.vllm_caches import Cache, connector
from lmpipe.bench.vllm_client import Plan, group_of
from lmpipe.errors import LmpipeError

MODES = {
    "engine-driven": ("engine_driven", False),
    "worker-driven": ("lmcache_driven", False),
    "worker-driven, 1 OpenMP thread": ("lmcache_driven", True),
}
"""LMCache's ways to move KV, and whether its server is kept to one OpenMP thread."""

MODULE = "lmcache.integration.vllm.lmcache_mp_connector"
"""The connector that comes with LMCache; the one inside vLLM does not know the transfer modes."""

CHUNK_TOKENS = 256
MEMORY_GB = 1
START_S, STOP_S, SAVED_S, STEP_S = 90.0, 20.0, 60.0, 0.05
SETTLE_S = 0.3
OFF = {"LMCACHE_TRACK_USAGE": "false", "LMCACHE_DISABLE_BANNER": "1", "LMCACHE_LOG_LEVEL": "WARNING"}


class LmcacheCache(Cache):
    """One server, started with the object and gone with it."""

    def __init__(self, mode: str, work: Path) -> None:
        super().__init__()
        self._mode, self._log = mode, work / f"{mode.replace(' ', '-').replace(',', '')}.log"
        self._transfer, single = MODES[mode]
        self._port, self._http = _free_port(), _free_port()
        self._shm = f"lmpipe-peer-{secrets.token_hex(4)}"
        self._objects = 0
        env = {**os.environ, **OFF, **({"OMP_NUM_THREADS": "1"} if single else {})}
        with self._log.open("ab") as log:
            self._server = subprocess.Popen(
                self._argv(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env, start_new_session=True
            )
        self.stack.callback(self._stop)
        try:
            self._wait_healthy()
        except BaseException:
            self.stack.close()
            raise

    def savers(self) -> Sequence[Plan]:
        return [Plan(f"cold, LMCache attached, {self._mode}", self._options(), OFF, judged=False)]

    def loaders(self) -> Sequence[Plan]:
        return [Plan(f"LMCache, {self._mode}", self._options(), OFF, judged=False)]

    def pids(self) -> Sequence[int]:
        return group_of(self._server.pid)

    def saved(self, tokens: int) -> None:
        """Its server counts objects, one a chunk, and those that are still being written."""
        self._objects += tokens // CHUNK_TOKENS
        deadline_s = time.monotonic() + SAVED_S
        while time.monotonic() < deadline_s:
            memory = self._get("status")["storage_manager"]["l1_managers"]["_default"]
            if memory["total_object_count"] >= self._objects and not memory["write_locked_count"]:
                time.sleep(SETTLE_S)
                return
            time.sleep(STEP_S)
        raise LmpipeError(f"LMCache has not {self._objects} objects after {SAVED_S:g} s; its log: {self._log}")

    def _argv(self) -> list[str]:
        program = Path(sys.executable).with_name("lmcache")
        return [
            *(sys.executable, str(program), "server", "--host", "127.0.0.1"),
            *("--port", str(self._port), "--http-host", "127.0.0.1", "--http-port", str(self._http)),
            *("--l1-size-gb", str(MEMORY_GB), "--l1-init-size-gb", str(MEMORY_GB), "--no-l1-use-lazy"),
            *("--eviction-policy", "LRU", "--chunk-size", str(CHUNK_TOKENS)),
            *("--supported-transfer-mode", "auto", "--shm-name", self._shm),
        ]

    def _options(self) -> dict[str, Any]:
        extra = {
            "lmcache.mp.host": "tcp://127.0.0.1",
            "lmcache.mp.port": self._port,
            "lmcache.mp.mp_transfer_mode": self._transfer,
        }
        return connector("LMCacheMPConnector", extra, MODULE)

    def _wait_healthy(self) -> None:
        deadline_s = time.monotonic() + START_S
        while time.monotonic() < deadline_s:
            if self._server.poll() is not None:
                raise LmpipeError(f"lmcache server ended with status {self._server.returncode}; its log: {self._log}")
            with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
                self._get("healthcheck")
                return
            time.sleep(STEP_S)
        raise LmpipeError(f"lmcache server was not up after {START_S:g} s; its log: {self._log}")

    def _get(self, path: str) -> dict[str, Any]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self._http}/{path}", timeout=5.0) as answer:
            return json.load(answer)

    def _stop(self) -> None:
        self._server.terminate()
        try:
            self._server.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._server.pid, signal.SIGKILL)
        for left in Path("/dev/shm").glob(f"*{self._shm}*"):
            left.unlink(missing_ok=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
