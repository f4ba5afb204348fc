"""How a dataclass of plain fields and arrays stands in frames. Knows no message: messages.py has types and drawing.

The annotations are the format: a plain field carries msgspec bounds, an array field an `ArraySpec`, anything else a
`Via`. Each type gets one strict struct for its header (msgspec checks names, types and bounds in C) and a list
of array specs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Annotated, Any, Generic, TypeVar, Union, cast, get_args, get_type_hints

import msgspec
import numpy as np
import numpy.typing as npt
import orjson
from msgspec import Meta

from lmpipe.errors import MessageError

VERSION = 2
MAX_HEADER_BYTES = 1 << 20
MAX_FRAMES = 8
MAX_TEXT = 512

Frame = bytes | memoryview
_Array = npt.NDArray[np.generic]
M = TypeVar("M")

_Name = Annotated[str, Meta(max_length=64)]
_Row = tuple[_Name, _Name, Annotated[list[Annotated[int, Meta(ge=0, le=2**31 - 1)]], Meta(max_length=4)]]
_AT_FAULT = re.compile(r"`\$\.?([^`]*)`|field `([^`]*)`")


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """An array field: its dtype on the wire and in memory, dimensions, rows and elements at most, a check of its bytes.

    `check(name, count, frame)` raises `MessageError`.
    """

    wire: str
    dtype: np.dtype[Any]
    ndim: int
    rows: int
    items: int
    check: Callable[[str, int, Frame], None] | None = None


@dataclass(frozen=True, slots=True)
class Via:
    """A field that stands in the header as `header` or null; `build` makes the value, or raises `MessageError`."""

    header: Any
    build: Callable[[Any], Any]


def equal(one: object, other: object) -> bool:
    """Whether two dataclasses are of one type and equal in all fields, arrays byte by byte."""
    if type(one) is not type(other):
        return False
    for field_ in fields(one):  # type: ignore[arg-type]
        a, b = attrgetter(field_.name)(one), attrgetter(field_.name)(other)
        arrays = isinstance(a, np.ndarray) and isinstance(b, np.ndarray)
        if not (np.array_equal(cast(_Array, a), cast(_Array, b)) if arrays else a == b):
            return False
    return True


class _Codec(Generic[M]):
    """One type on the wire."""

    def __init__(self, cls: type[M], check: Callable[[Any], None] | None) -> None:
        notes = {name: get_args(hint) for name, hint in get_type_hints(cls, include_extras=True).items()}
        hints = get_type_hints(cls, include_extras=True)
        names = list(hints)
        arrays = {name: note for name in names for note in notes[name] if isinstance(note, ArraySpec)}
        via = {name: note for name in names for note in notes[name] if isinstance(note, Via)}
        self.cls = cls
        self.check = check
        self.plain = [name for name in names if name not in arrays]
        self.arrays = list(arrays.items())
        self.builds = [(self.plain.index(name), note.build) for name, note in via.items()]
        self.values: Callable[[M], tuple[Any, ...]] = attrgetter(*names, "__class__")  # two names at least: a tuple
        # Where each field stands in plain + arrays, which is what decoding has at hand; and back.
        found = [*self.plain, *arrays]
        self.order = [found.index(name) for name in names]
        self.plain_at = [(name, names.index(name)) for name in self.plain]
        self.arrays_at = [(name, spec, names.index(name)) for name, spec in self.arrays]
        types = [(name, via[name].header | None if name in via else hints[name]) for name in self.plain]
        self.header = msgspec.defstruct(
            cls.__name__,
            [
                ("v", Annotated[int, Meta(ge=VERSION, le=VERSION)]),
                *types,
                ("arrays", Annotated[list[_Row], Meta(max_length=MAX_FRAMES)]),
            ],
            tag_field="type",
            tag=cls.__name__,
            forbid_unknown_fields=True,
        )

    def encode(self, message: M) -> list[Frame]:
        """The frames of a message of this type."""
        values = self.values(message)
        header: dict[str, Any] = {"v": VERSION, "type": self.cls.__name__}
        for name, at in self.plain_at:
            header[name] = values[at]
        if "reason" in header:
            header["reason"] = header["reason"][:MAX_TEXT]
        table: list[tuple[str, str, tuple[int, ...]]] = []
        frames: list[Frame] = [b""]
        for name, spec, at in self.arrays_at:
            array = values[at]
            if (
                array.dtype != spec.dtype
                or array.ndim != spec.ndim
                or len(array) > spec.rows
                or array.size > spec.items
            ):
                raise MessageError(name, f"{array.dtype} {array.shape}, wanted {spec.wire} of {spec.ndim} dimensions")
            table.append((name, spec.wire, array.shape))
            small = array.nbytes <= 4096
            frames.append(array.tobytes() if small else np.ascontiguousarray(array).view(np.uint8).reshape(-1).data)
        header["arrays"] = table
        frames[0] = orjson.dumps(header, option=orjson.OPT_SERIALIZE_NUMPY)
        return frames

    def decode(self, header: Any, frames: Sequence[Frame]) -> M:
        """The message of a header that the struct accepted, and of its array frames."""
        _, *found, rows = msgspec.structs.astuple(header)
        if len(rows) != len(self.arrays):
            raise MessageError("arrays", f"{len(rows)} are named, wanted {[name for name, _ in self.arrays]}")
        if len(frames) != len(rows) + 1:
            raise MessageError("frames", f"{len(frames)}, wanted {len(rows) + 1}")
        for (name, spec), (said, wire, shape), frame in zip(self.arrays, rows, frames[1:], strict=True):
            if said != name or wire != spec.wire or len(shape) != spec.ndim:
                raise MessageError(name, f"{said} {wire} {shape}, wanted {spec.wire} of {spec.ndim} dimensions")
            size = math.prod(shape)
            if size > spec.items or shape[0] > spec.rows:
                raise MessageError(name, f"{shape} is more than {spec.rows} rows or {spec.items} elements")
            if len(frame) != size * spec.dtype.itemsize:
                raise MessageError(name, f"{len(frame)} bytes for {wire} {shape}")
            if spec.check is not None:
                spec.check(name, size, frame)
            found.append(np.ndarray(shape, spec.dtype, frame))
        for at, build in self.builds:
            found[at] = None if found[at] is None else build(found[at])
        message = self.cls(*[found[at] for at in self.order])
        if self.check is not None:
            self.check(message)
        return message


class Wire(Generic[M]):
    """The codec of a closed set of types. `checks`, which raise `MessageError`, say what bounds of one field cannot."""

    def __init__(self, types: Sequence[type[M]], checks: Mapping[type[M], Callable[[Any], None]]) -> None:
        self._codecs = {cls: _Codec(cls, checks.get(cls)) for cls in types}
        self._by_header = {codec.header: codec for codec in self._codecs.values()}
        self._headers: msgspec.json.Decoder[Any] = msgspec.json.Decoder(Union[tuple(self._by_header)])  # noqa: UP007

    def encode(self, message: M) -> list[Frame]:
        """The frames of a message.

        Raises:
            MessageError: an array has another dtype, shape or size than its field may have.
        """
        return self._codecs[type(message)].encode(message)

    def decode(self, frames: Sequence[Frame]) -> M:
        """Inverse of `encode`.

        Raises:
            MessageError: anything does not fit.
        """
        if not frames or len(frames[0]) > MAX_HEADER_BYTES:
            raise MessageError("frames", "no header, or one above 1 MiB")
        try:
            header = self._headers.decode(frames[0])
        except msgspec.ValidationError as error:
            at = _AT_FAULT.search(str(error))
            raise MessageError((at and (at[1] or at[2])) or "header", str(error)) from None
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise MessageError("header", str(error)) from None
        return self._by_header[type(header)].decode(header, frames)
