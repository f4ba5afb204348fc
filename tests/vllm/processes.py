"""Engines in processes of their own, to be killed, to be several at once, or to speak HTTP. All end when closed.

Each process leads a group, so that whatever vLLM starts for it goes with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

import engine_settings as settings

START_S = 120.0
STOP_S = 30.0

_OF_VLLM = "vllm_dist_"


class _Group:
    """A process and all that it starts."""

    def __init__(self, command: list[str], environment: dict[str, str], stdio: int | None) -> None:
        self._shared: set[Path] = set()
        self._sockets = tempfile.TemporaryDirectory(prefix="vllm-")  # vLLM does not always remove its own
        environment = environment | {"VLLM_RPC_BASE_PATH": self._sockets.name}
        self.process = subprocess.Popen(
            command, env=environment, stdin=stdio, stdout=stdio, text=True, start_new_session=True
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    def members(self) -> list[int]:
        """Living processes of the group: the leader, and an engine core and workers where it has them."""
        found: list[int] = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(ValueError, OSError):
                state, _, group = (entry / "stat").read_text().rpartition(") ")[2].split()[:3]
                if state not in "ZX" and int(group) == self.pid:
                    found.append(int(entry.name))
        return found

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Signal the leader alone; one that is killed is waited for. `close` is still needed."""
        os.kill(self.pid, number)
        if number == signal.SIGKILL:
            self.process.wait(STOP_S)

    def remember_shared(self) -> None:
        """Note which files in shared memory vLLM made for its ranks, since processes that are killed leave them."""
        for pid in self.members():
            with contextlib.suppress(OSError):
                lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
                paths = {line.partition("/dev/shm/")[2] for line in lines}
                self._shared |= {Path("/dev/shm") / path for path in paths if path.startswith(_OF_VLLM)}

    def end(self) -> None:
        """Wait for the leader and kill what is left of the group, which is nothing after an orderly stop."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_S)
        deadline = time.monotonic() + STOP_S
        while (members := self.members()) and time.monotonic() < deadline:
            for pid in members:
                if not _is_tracker(pid):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            self.process.poll()
            time.sleep(0.01)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        for path in self._shared:
            path.unlink(missing_ok=True)
        self._sockets.cleanup()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        raise NotImplementedError


class EngineProcess(_Group):
    """An `Engine` in a process: several at once, SIGKILL, and `tensor_parallel_size=2`. Arguments as of `Engine`."""

    def __init__(
        self, model: Path, connector: dict[str, Any] | None = None, *, wait: bool = True, **overrides: Any
    ) -> None:
        if overrides.get("tensor_parallel_size", 1) > 1:
            overrides = {"distributed_executor_backend": "mp"} | overrides
        script = Path(__file__).with_name("engine_main.py")
        super().__init__([sys.executable, str(script)], settings.environment(overrides), subprocess.PIPE)
        self._send({"model": str(model), "connector": connector, "overrides": overrides})
        if wait:
            self.wait()

    def wait(self) -> None:
        """Until it is ready; for who started several with `wait=False`."""
        try:
            self._receive()
        except EOFError:
            self.end()
            raise
        self.remember_shared()

    def generate(self, prompts: list[list[int]], max_tokens: int = 16, **sampling: Any) -> list[list[int]]:
        """As `Engine.generate`."""
        return self.generate_with_hits(prompts, max_tokens, **sampling)[0]

    def generate_with_hits(
        self, prompts: list[list[int]], max_tokens: int = 16, **sampling: Any
    ) -> tuple[list[list[int]], list[int]]:
        """The tokens, and for each prompt how many tokens were not computed."""
        self.ask(prompts, max_tokens, **sampling)
        return self.answer()

    def ask(self, prompts: list[list[int]], max_tokens: int = 16, **sampling: Any) -> None:
        """Begin to generate; `answer` waits for the end. Between the two the process may be killed."""
        self._send({"do": "generate", "prompts": prompts, "max_tokens": max_tokens, "sampling": sampling})

    def answer(self) -> tuple[list[list[int]], list[int]]:
        """What `ask` asked for; EOFError if the engine has died."""
        answer = self._receive()
        return answer["tokens"], answer["cached"]

    def reset_prefix_cache(self) -> bool:
        """As `Engine.reset_prefix_cache`."""
        self._send({"do": "reset"})
        return self._receive()["reset"]

    def close(self) -> None:
        """An orderly shutdown of the engine, or what is left to do after a kill."""
        with contextlib.suppress(EOFError):
            self._send({"do": "exit"})
            self._receive()
        self.end()

    def _send(self, value: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        try:
            print(json.dumps(value), file=self.process.stdin, flush=True)
        except (BrokenPipeError, ValueError):
            raise EOFError("the engine's process is gone") from None

    def _receive(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise EOFError("the engine's process is gone; its stderr says why")
        return json.loads(line)


class ServerProcess(_Group):
    """The OpenAI server, without a tokenizer: token ids in and out. Arguments as of `Engine`."""

    def __init__(self, model: Path, connector: dict[str, Any] | None = None, **overrides: Any) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{free.getsockname()[1]}"
        arguments = settings.arguments(model, connector, overrides) | {"served_model_name": "tiny"}
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--uvicorn-log-level", "warning"]
        command += ["--host", "127.0.0.1", "--port", self.url.rpartition(":")[2], *_flags(arguments)]
        environment = settings.environment(overrides) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
        super().__init__(command, environment, None)
        deadline = time.monotonic() + START_S
        while not self._healthy():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.end()
                raise RuntimeError("the server did not start; its stderr says why")
            time.sleep(0.1)
        self.remember_shared()

    def complete(self, prompt: list[int], max_tokens: int = 16, **sampling: Any) -> list[int]:
        """The tokens that follow the prompt, by /v1/completions. Raises urllib.error.HTTPError for a refusal."""
        usual = {"model": "tiny", "temperature": 0.0, "ignore_eos": True, "return_token_ids": True}
        body = usual | {"prompt": prompt, "max_tokens": max_tokens} | sampling
        return self.request("/v1/completions", body)["choices"][0]["token_ids"]

    def metrics(self) -> str:
        """The text of /metrics."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=STOP_S) as answer:
            return answer.read().decode()

    def request(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """POST of JSON; its answer."""
        header = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), header)
        with urllib.request.urlopen(request, timeout=START_S) as answer:
            return json.load(answer)

    def close(self) -> None:
        """SIGTERM, as an operator would."""
        with contextlib.suppress(ProcessLookupError):
            self.process.terminate()
        self.end()

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=STOP_S):
                return True
        except (urllib.error.URLError, ConnectionError):
            return False


def _is_tracker(pid: int) -> bool:
    """Python's helper, which removes what killed processes leave and then ends by itself."""
    with contextlib.suppress(OSError):
        return b"multiprocessing.resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def _flags(arguments: dict[str, Any]) -> list[str]:
    """Arguments of `LLM` as arguments of the server."""
    flags: list[str] = []
    for name, value in arguments.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(flag if value else "--no-" + flag[2:])
        else:
            flags += [flag, json.dumps(value) if isinstance(value, dict) else str(value)]
    return flags
