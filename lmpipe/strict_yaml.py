"""YAML into frozen msgspec structs: every problem at once, each with its line, its path and the nearest valid name.

Owns reading and type checks; knows no field. A value that does not fit is never replaced by a default, an unknown field
is never ignored. Stricter than YAML: a field stands once, numbers are decimal (YAML 1.1 reads 010 as 8, 1:30 as 90).
"""

from __future__ import annotations

import re
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin

import msgspec
import yaml

T = TypeVar("T", bound=msgspec.Struct)

Size = Annotated[int, msgspec.Meta(gt=0, le=1 << 60, extra={"unit": "bytes"})]
"""A number of bytes, written as one or with a unit: 4096, "64KiB", 1.5GiB, 2GB."""

Device = Annotated[str, msgspec.Meta(max_length=40, extra={"names": "device"})]
"""A GPU: its UUID, as `nvidia-smi -L` or rocminfo shows it, or its index among the visible ones, as a number."""

UNITS = (
    {"B": 1}
    | {f"{p}iB": 1 << 10 * i for i, p in enumerate("KMGTP", 1)}
    | {f"{p}B": 1000**i for i, p in enumerate("KMGTP", 1)}
)
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([A-Za-z]+)", re.ASCII)
_INT = re.compile(r"[+-]?(?:0|[1-9][0-9_]*)", re.ASCII)
_DEVICE = re.compile(
    r"[0-9]{1,3}|(GPU|MIG)-[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}|GPU-[0-9a-fA-F]{16}", re.ASCII
)
_MAX_TEXT = 1 << 20
_BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


class Unfit(Exception):
    """A document that does not fit. `problems`: (line, path, text) each, lines counted from 1."""

    def __init__(self, problems: list[tuple[int, str, str]]) -> None:
        super().__init__("; ".join(text for _, _, text in problems))
        self.problems = problems


class Marks:
    """Which line a path such as `tiers.ssd.capacity` stands on; if it is not written, the line of what encloses it."""

    def __init__(self) -> None:
        self._lines: dict[str, int] = {}

    def put(self, path: str, line: int) -> None:
        """Notes where `path` stands."""
        self._lines[path] = line

    def line(self, path: str) -> int:
        """The line of `path`, or of the nearest enclosing path that is written."""
        while path and path not in self._lines:
            path = path[: max(path.rfind("."), path.rfind("["), 0)]
        return self._lines.get(path, 1)


def parse_size(text: str) -> int:
    """Bytes meant by `text`; ValueError, saying how to write it, for anything else."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f'"{_short(text)}" is not a size; write bytes or a unit, such as 512MiB')
    unit = match[2]
    if unit not in UNITS:
        raise ValueError(f'unknown unit "{_short(unit)}"{nearest(unit, UNITS)}; units: {", ".join(UNITS)}')
    whole = float(match[1]) * UNITS[unit] if "." in match[1] else int(match[1][:25]) * UNITS[unit]
    return int(min(whole, 1 << 61))


def parse_device(value: object) -> str:
    """A device as `Device` has it; ValueError, saying how to write it, for anything else."""
    if isinstance(value, bool) or not isinstance(value, str | int) or not _DEVICE.fullmatch(str(value)):
        raise ValueError(
            f'"{_short(str(value))}" is no GPU; write its UUID as nvidia-smi -L shows it, or its number from 0'
        )
    return str(value)


def nearest(name: str, valid: Any) -> str:
    """`; did you mean "x"?` for the valid name most like `name`, else nothing."""
    names = [str(v) for v in valid]
    close = [n for n in names if n.lower() == name.lower()] or get_close_matches(name, names, 1, 0.6)
    return f'; did you mean "{close[0]}"?' if close else ""


def read(text: str, kind: type[T]) -> tuple[T, Marks]:
    """The document as `kind`, with the lines of its paths. Raises Unfit."""
    if len(text) > _MAX_TEXT:
        raise Unfit([(1, "", "the file is larger than 1 MiB")])
    try:
        root = cast("yaml.Node | None", yaml.compose(text, Loader=yaml.SafeLoader))  # pyright: ignore[reportUnknownMemberType]
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise Unfit([((mark.line if mark else 0) + 1, "", f"not YAML: {error.problem or error.context}")]) from None
    # PyYAML lets these through for bad escapes, unreadable characters and very deep nesting.
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise Unfit([(1, "", f"not YAML: {_short(str(error))}")]) from None
    if root is None:
        raise Unfit([(1, "", "the file is empty")])
    walk = _Walk()
    data = walk.value(root, kind, "")
    if walk.problems:
        raise Unfit(walk.problems)
    return msgspec.convert(data, kind), walk.marks


class _Walk:
    """Goes through the nodes along the type, so that its depth is bounded by the type, whatever the document does."""

    def __init__(self) -> None:
        self.problems: list[tuple[int, str, str]] = []
        self.marks = Marks()

    def value(self, node: yaml.Node, kind: Any, path: str) -> Any:
        self.marks.put(path, node.start_mark.line + 1)
        origin = get_origin(kind)
        if origin in (Union, UnionType):
            inner = [k for k in get_args(kind) if k is not NoneType]
            return None if node.tag == "tag:yaml.org,2002:null" else self.value(node, inner[0], path)
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            return self._mapping(node, kind, path)
        if origin is list:
            if not isinstance(node, yaml.SequenceNode):
                return self._fail(node, path, "a list is wanted here")
            if len(node.value) > 4096:
                return self._fail(node, path, "the list is longer than 4096")
            return [self.value(child, get_args(kind)[0], f"{path}[{i}]") for i, child in enumerate(node.value)]
        return self._leaf(node, kind, path)

    def _mapping(self, node: yaml.Node, kind: type[msgspec.Struct], path: str) -> dict[str, Any] | None:
        if not isinstance(node, yaml.MappingNode):
            return self._fail(node, path, "fields are wanted here (name: value)")
        fields = {f.name: f for f in msgspec.structs.fields(kind)}
        data: dict[str, Any] = {}
        seen: set[str] = set()
        for key, child in node.value:
            name = str(key.value) if isinstance(key, yaml.ScalarNode) else ""
            shown = _short(name)
            at = f"{path}.{shown}" if path else shown
            if name not in fields:
                known = ", ".join(fields)
                self._fail(key, at, f"unknown field{nearest(name, fields)} (fields here: {known})")
            elif name in seen:
                self._fail(key, at, "this field stands here twice")
            else:
                data[name] = self.value(child, fields[name].type, at)
            seen.add(name)
        for name, field in fields.items():
            if field.required and name not in seen:
                self._fail(node, f"{path}.{name}" if path else name, "this field is missing and has no default")
        return data

    def _leaf(self, node: yaml.Node, kind: Any, path: str) -> Any:
        if not isinstance(node, yaml.ScalarNode):
            return self._fail(node, path, "a single value is wanted here")
        try:
            value = _scalar(node)
            if isinstance(value, str) and any(
                ord(c) < 32 or 0x7F <= ord(c) < 0xA0 or 0xD800 <= ord(c) < 0xE000 for c in value
            ):
                raise ValueError("control characters are not allowed")
            if _means(kind, "unit", "bytes") and isinstance(value, str):
                value = parse_size(value)
            if _means(kind, "names", "device"):
                value = parse_device(value)
            if get_origin(kind) is Literal and value not in get_args(kind):
                names = get_args(kind)
                raise ValueError(
                    f'"{_short(str(value))}" is none of {", ".join(map(str, names))}{nearest(str(value), names)}'
                )
            if kind is str and not isinstance(value, str):
                raise ValueError(
                    f'text is wanted, this is {_kind(value)}: put it in quotes, "{_short(str(node.value))}"'
                )
            return msgspec.convert(value, kind, strict=True)
        except msgspec.ValidationError as error:
            return self._fail(node, path, f"{_short(str(node.value))}: {error}")
        except ValueError as error:
            return self._fail(node, path, str(error))

    def _fail(self, node: yaml.Node, path: str, text: str) -> None:
        if len(self.problems) < 50:
            self.problems.append((node.start_mark.line + 1, path, text))


def _scalar(node: yaml.ScalarNode) -> str | int | float | bool | None:
    text = str(node.value)
    match node.tag.removeprefix("tag:yaml.org,2002:"):
        case "null":
            return None
        case "bool" if text.lower() in _BOOLS:
            return _BOOLS[text.lower()]
        case "int":
            if len(text) > 30 or not _INT.fullmatch(text):
                raise ValueError(f"{_short(text)} is not a decimal number")
            return int(text)
        case "float":
            value = (
                float(text.replace("_", ""))
                if ":" not in text and text.lower().strip("+-") not in (".inf", ".nan")
                else 1e400
            )
            if not abs(value) < 1e300:
                raise ValueError(f"{_short(text)} is not a finite decimal number")
            return value
        case "str" | "timestamp":
            return text
        case tag:
            raise ValueError(f"the tag {_short(tag)} has no meaning here")


def _means(kind: Any, what: str, value: str) -> bool:
    return get_origin(kind) is Annotated and any(
        isinstance(m, msgspec.Meta) and m.extra is not None and m.extra.get(what) == value for m in get_args(kind)[1:]
    )


def _kind(value: object) -> str:
    if isinstance(value, bool):
        return "a truth value"
    return "nothing" if value is None else "a number"


def _short(text: str) -> str:
    text = text.encode("unicode_escape").decode() if not text.isprintable() else text
    return text if len(text) <= 60 else text[:57] + "..."
