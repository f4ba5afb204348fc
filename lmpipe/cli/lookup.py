"""`lmpipe lookup`: how much of a prompt is there, and in which tier. Reads the index in this process, as engines do."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import msgspec
from rich.table import Table

from lmpipe.cli.console import wide_console
from lmpipe.cli.nodes import Subparsers, UsageError, add_node_arguments, add_verb, node_of
from lmpipe.cli.picture import size
from lmpipe.errors import NodeError
from lmpipe.handles import Tier
from lmpipe.index import IndexReader, may_map, reader_identity
from lmpipe.index_row import is_complete, row_records
from lmpipe.keys import Prompt
from lmpipe.shm.node import NodeWords
from lmpipe.topology import NodeInfo

EXAMPLES = """
lmpipe lookup tokens.json --namespace 3f…9a              a file with a JSON list of token ids
tokenize prompt.txt | lmpipe lookup - --namespace 3f…9a
lmpipe lookup tokens.json local --namespace 3f…9a --chunk-tokens 512
"""


@dataclass(frozen=True, slots=True)
class Run:
    """A run of a prompt's chunks that one tier has."""

    tier: Tier
    first: int
    chunks: int
    nbytes: int


def add(verbs: Subparsers) -> None:
    """Registers the verb."""
    parser = add_verb(verbs, "lookup", "which tiers have a prompt", EXAMPLES)
    parser.add_argument("tokens", metavar="TOKENS", help="file with a JSON list of token ids, or - for stdin")
    add_node_arguments(parser)
    parser.add_argument("--namespace", required=True, metavar="HEX", help="the producer's namespace, 64 hex digits")
    parser.add_argument("--chunk-tokens", type=int, metavar="N", help="the producer's chunk (default: the topology's)")
    parser.add_argument("--json", action="store_true", help="the answer as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit status 0 when the prompt's first chunk is there, else 1."""
    namespace = namespace_of(args.namespace)
    tokens = _tokens(args.tokens)
    info = node_of(args)
    chunk_tokens: int = args.chunk_tokens or info.topology.chunk_tokens
    prompt = Prompt.of(namespace, chunk_tokens, tokens)
    runs = find(info, prompt.index_keys)
    hit = sum(run.chunks for run in runs) * chunk_tokens
    if args.json:
        found = [{"tier": r.tier, "first_chunk": r.first, "chunks": r.chunks, "bytes": r.nbytes} for r in runs]
        print(json.dumps({"tokens": len(tokens), "hit_tokens": hit, "chunk_tokens": chunk_tokens, "runs": found}))
        return 0 if hit else 1
    table = Table(title=f"{hit:,} of {len(tokens):,} tokens")
    for column in ("tier", "tokens from", "to", "chunks", "bytes stored"):
        table.add_column(column, justify="left" if column == "tier" else "right")
    for part in runs:
        first, last = part.first * chunk_tokens, (part.first + part.chunks) * chunk_tokens
        table.add_row(part.tier, f"{first:,}", f"{last:,}", f"{part.chunks:,}", size(part.nbytes))
    wide_console().print(table)
    return 0 if hit else 1


def find(info: NodeInfo, keys: list[bytes]) -> list[Run]:
    """The unbroken run from the start, by tier: each chunk in the fastest that has it."""
    if not may_map(info.index_identity):
        raise NodeError(
            f"the node has {info.index_identity}, this is {reader_identity()}: look it up where the node runs"
        )
    node = NodeWords.attach(info.paths.node_shm)
    readers = [
        IndexReader(info.paths.path, t, info.topology.index.map_bytes(t), node) for t in info.topology.tier_names
    ]
    runs: list[Run] = []
    try:
        at, before = 0, -1
        while at != before:
            before = at
            for reader in readers:
                rows = reader.run(keys, at)
                whole = next((i for i, row in enumerate(rows) if not is_complete(row)), len(rows))
                if whole:
                    nbytes = sum(int(row_records(row)["nbytes"].sum()) for row in rows[:whole])
                    runs.append(Run(reader.tier, at, whole, nbytes))
                    at += whole
    finally:
        for reader in readers:
            reader.close()
        node.close()
    return runs


def namespace_of(text: str) -> bytes:
    """A namespace digest from its hex digits. Raises UsageError."""
    try:
        digest = bytes.fromhex(text)
    except ValueError:
        digest = b""
    if len(digest) != 32:
        raise UsageError(f'a namespace has 64 hex digits (Producer.namespace.hex()), "{text}" has not')
    return digest


def _tokens(source: str) -> list[int]:
    try:
        data = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
        return msgspec.json.decode(data, type=list[int])
    except OSError as error:
        raise UsageError(f"{source}: {error.strerror}") from None
    except msgspec.DecodeError as error:
        raise UsageError(f"{source}: a JSON list of token ids is wanted: {error}") from None
