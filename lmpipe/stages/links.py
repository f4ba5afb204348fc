"""What a stage below gather says to the stages beside it: nothing is lost because a queue is full for a moment.

Knows no tier and no slot.
"""

from __future__ import annotations

from collections import deque

from lmpipe.bus import Channel
from lmpipe.messages import Message, Save
from lmpipe.stages.base import Context, Peer

LIMIT = 1024
"""Messages that wait in one direction; more are a sign that nobody reads, and then the oldest go."""


class Links:
    """The lines up and down of one stage."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._peers: dict[Channel, Peer] = {}
        self._up: deque[tuple[Channel, Message]] = deque(maxlen=LIMIT)
        self._down: deque[tuple[Channel, Message]] = deque(maxlen=LIMIT)

    @property
    def clear(self) -> bool:
        """Nothing waits to be sent."""
        return not self._up and not self._down

    @property
    def crowded(self) -> bool:
        """So much waits that no more work should be taken on."""
        return len(self._up) > LIMIT // 2 or len(self._down) > LIMIT // 2

    def heard(self, peer: Peer) -> None:
        """A message came from above: answers go there from now on. What waits for a former life of it is dropped."""
        if self._peers.get(peer.channel) not in (None, peer):
            self._up = deque((item for item in self._up if item[0] != peer.channel), LIMIT)
        self._peers[peer.channel] = peer

    def up(self, channel: Channel, message: Message) -> None:
        """Tell the stage above, now or as soon as it reads."""
        self._up.append((channel, message))
        self.pump()

    def down(self, channel: Channel, message: Message) -> None:
        """Tell the stage below, now or as soon as it is there and reads."""
        self._down.append((channel, message))
        self.pump()

    def forget_saves(self) -> None:
        """The stage below is another one: what it was to save comes again from above."""
        self._down = deque((item for item in self._down if not isinstance(item[1], Save)), LIMIT)

    def pump(self) -> None:
        """Send what waits, in order, until a queue is full."""
        while self._up:
            channel, message = self._up[0]
            peer = self._peers.get(channel)
            if peer is None or not self._context.reply(peer, message):
                break
            self._up.popleft()
        while self._down and self._context.chain and self._context.down(*self._down[0]):
            self._down.popleft()
