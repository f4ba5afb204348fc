"""One question to gather, from a command, and its answer."""

from __future__ import annotations

import secrets
import time
from typing import TypeVar

from lmpipe.bus import Client, Poller
from lmpipe.errors import NodeError
from lmpipe.handles import SessionId
from lmpipe.messages import Message, Refused, id_of
from lmpipe.topology import NodeInfo

T = TypeVar("T", bound=Message)

REF = 1
"""The `ref` of a question: there is one in a session."""
AGAIN_S = 0.1


def new_session() -> SessionId:
    """The session of a command, which holds and leases nothing."""
    return SessionId(secrets.randbits(62) + 1)


def ask(info: NodeInfo, question: Message, answer: type[T], timeout_s: float, *, insist: bool = False) -> T:
    """Put a question with `ref` `REF` behind the saves that were sent before it, and wait for its answer.

    `insist`: a refusal may be for now only, as long as a tier is starting; it is asked again.

    Raises:
        NodeError: gather refuses, cannot be reached, or has not answered in time.
    """
    ends = info.endpoints["gather"]
    client = Client({"load": ends["load"], "save": ends["save"]})
    try:
        deadline_s = time.monotonic() + timeout_s
        poller, sent, reason = Poller(), False, ""
        poller.register(client)
        while time.monotonic() < deadline_s:
            sent = sent or client.send("save", question)
            poller.poll(50)
            while (heard := client.recv()) is not None:
                if isinstance(heard, answer) and id_of(heard) == REF:
                    return heard
                if isinstance(heard, Refused):
                    sent, reason = False, f"gather refused: {heard.reason}"
            if reason and not insist:
                raise NodeError(reason)
            if reason and not sent:
                time.sleep(AGAIN_S)
    finally:
        client.close()
    if reason:
        raise NodeError(reason)
    raise NodeError(
        f"gather has not answered in {timeout_s:g} s" if sent else "gather cannot be reached; see: lmpipe status"
    )
