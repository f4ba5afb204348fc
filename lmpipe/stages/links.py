"""What a stage below gather says to the stages beside it: nothing is lost because a queue is full for a moment.

Each channel has a queue of its own in either direction: what waits for a peer that is gone, or reads no saves now, does
not hold up the other channel.

Knows no tier and no slot.
"""

from __future__ import annotations

from collections import deque

from lmpipe.bus import CHANNELS, Channel
from lmpipe.messages import Message, Save
from lmpipe.stages.base import Context, Peer

LIMIT = 1024
"""Messages that wait in one direction; more are a sign that nobody reads, and then the oldest go."""


class Links:
    """The lines up and down of one stage."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._peers: dict[Channel, Peer] = {}
        self._up: dict[Channel, deque[Message]] = {channel: deque(maxlen=LIMIT) for channel in CHANNELS}
        self._down: dict[Channel, deque[Message]] = {channel: deque(maxlen=LIMIT) for channel in CHANNELS}

    @property
    def clear(self) -> bool:
        """Nothing waits to be sent."""
        return not any((*self._up.values(), *self._down.values()))

    @property
    def crowded(self) -> bool:
        """So much waits that no more work should be taken on."""
        return any(len(waiting) > LIMIT // 2 for waiting in (*self._up.values(), *self._down.values()))

    def heard(self, peer: Peer) -> None:
        """A message came from above: answers go there from now on. What waits for a former life of it is dropped."""
        if self._peers.get(peer.channel) not in (None, peer):
            self._up[peer.channel].clear()
        self._peers[peer.channel] = peer

    def up(self, channel: Channel, message: Message) -> None:
        """Tell the stage above, now or as soon as it reads."""
        self._up[channel].append(message)
        self.pump()

    def down(self, channel: Channel, message: Message) -> None:
        """Tell the stage below, now or as soon as it is there and reads."""
        self._down[channel].append(message)
        self.pump()

    def forget_saves(self) -> None:
        """The stage below is another one: what it was to save comes again from above."""
        for channel, waiting in self._down.items():
            self._down[channel] = deque((message for message in waiting if not isinstance(message, Save)), LIMIT)

    def pump(self) -> None:
        """Send what waits, in order, until a queue is full."""
        for channel in CHANNELS:
            waiting, peer = self._up[channel], self._peers.get(channel)
            while waiting and peer is not None and self._context.reply(peer, waiting[0]):
                waiting.popleft()
            waiting = self._down[channel]
            while waiting and self._context.chain and self._context.down(channel, waiting[0]):
                waiting.popleft()
