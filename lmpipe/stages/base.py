"""What a stage is to the runner, and the runner to a stage. Knows no concrete stage, no socket and no thread.

A stage reacts (`handle`), works in small bounded pieces (`step`), and never blocks: what takes long goes to `submit`.
All of its methods, and the callbacks it gives, run on the runner's one thread, so a stage needs no lock.

Errors: raise an `LmpipeError` for trouble that is expected (the message is refused with its text, and counted). A
`ProtocolViolation`, and any other exception, is a bug: the process dies loudly and is restarted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Protocol, TypeVar

from lmpipe.bus import Channel
from lmpipe.bus import Peer as Peer
from lmpipe.handles import SessionId
from lmpipe.messages import Message
from lmpipe.shm.session import Session

T = TypeVar("T")


class Stage(Protocol):
    """One kind of work in the pipeline."""

    @property
    def name(self) -> str:
        """As in the topology."""
        ...

    def handle(self, peer: Peer | None, message: Message) -> None:
        """React to a message; `peer` is None when it comes from the stage below. Ping, Pong and Drain never come."""
        ...

    def step(self, now_s: float) -> float | None:
        """A bounded piece of work that no message asked for.

        Called after messages and finished jobs, and when the time has come. Returns the seconds until it wants to be
        called again (0: at once), None: only when woken.
        """
        ...

    def below_changed(self, chain: dict[str, SessionId]) -> None:
        """The stages below are others than before: sessions by stage name, nearest first; empty: nobody answers."""
        ...

    def busy(self) -> bool:
        """Whether anything is unfinished. Asked while draining."""
        ...

    def accepts_saves(self) -> bool:
        """False: leave saves in the socket, so that those above feel it. Loads are always read."""
        ...

    def close(self) -> None:
        """The end: let go of everything. No thread of `submit` runs any more."""
        ...


class Context(Protocol):
    """What the runner gives a stage."""

    @property
    def session(self) -> Session:
        """The session of the stage's process."""
        ...

    @property
    def chain(self) -> Mapping[str, SessionId]:
        """Sessions of the stages below, by name, nearest first; empty while nobody answers."""
        ...

    @property
    def has_down(self) -> bool:
        """Whether the topology has a stage below this one."""
        ...

    @property
    def draining(self) -> bool:
        """Whether the end has been announced: no new saves come."""
        ...

    @property
    def backlog(self) -> int:
        """Jobs submitted whose callbacks have not run yet."""
        ...

    def now_s(self) -> float:
        """CLOCK_MONOTONIC."""
        ...

    def reply(self, peer: Peer, message: Message) -> bool:
        """Answer; False: the peer is gone, or reads so slowly that its queue is full."""
        ...

    def down(self, channel: Channel, message: Message) -> bool:
        """Send to the stage below; False: nobody there, or its queue is full."""
        ...

    def submit(
        self,
        fn: Callable[[], T],
        done: Callable[[T], None],
        failed: Callable[[Exception], None],
        name: str,
        *,
        urgent: bool = False,
        nbytes: int = 0,
        chunks: int = 0,
    ) -> None:
        """Run `fn` on a worker thread, then `done` with its result or `failed` with its exception on the runner's.

        Urgent jobs (somebody waits for a load) overtake the others. `name`, `nbytes` and `chunks` are for the profile.
        The stage bounds how much it submits; `backlog` tells.
        """
        ...

    def count(self, name: str, n: int = 1) -> None:
        """Add to one of the stage's counters, which metrics.py lists."""
        ...

    def gauge(self, name: str, value: int) -> None:
        """Set one of the stage's gauges."""
        ...

    def span(self, name: str, nbytes: int = 0, chunks: int = 0) -> AbstractContextManager[object]:
        """Mark a part of the work in profiles. `handle`, `step` and jobs are marked already."""
        ...
