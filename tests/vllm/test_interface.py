"""The contract: what the installed vLLM asks of a connector, what lmpipe implements of it, and what is assumed of its
classes. A vLLM with another interface fails here by name, before anything else fails.

`interface.json` is written by `python tests/vllm/test_interface.py`, after its differences were looked at.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, SupportsHMA, supports_hma

from lmpipe.engines.vllm import LMPipeConnector
from lmpipe.engines.vllm.orders import Handshake, LoadOrder, LoadReport, Orders, Reports, SaveOrder
from lmpipe.handles import Tier
from lmpipe.keys import Namespace
from lmpipe.layout import KVLayout
from lmpipe.producer import LoadResult

GOLDEN = Path(__file__).with_name("interface.json")
TYPINGS = Path(__file__).parents[2] / "typings"


def interface() -> dict[str, str]:
    """The public methods of vLLM's connector classes: their kind and parameters by name."""
    found: dict[str, str] = {}
    for owner in (KVConnectorBase_V1, SupportsHMA):
        for name, member in vars(owner).items():
            plain = member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
            if name.startswith("_") and name != "__init__":
                continue
            if isinstance(member, property):
                found[f"{owner.__name__}.{name}"] = "property"
            elif inspect.isfunction(plain):
                kind = "classmethod " if isinstance(member, classmethod) else ""
                kind += "abstract " if getattr(plain, "__isabstractmethod__", False) else ""
                shown = [str(parameter.replace(annotation=inspect.Parameter.empty)) for parameter in _parameters(plain)]
                found[f"{owner.__name__}.{name}"] = f"{kind}({', '.join(shown)})"
    return dict(sorted(found.items()))


def _parameters(function: Any) -> list[inspect.Parameter]:
    return [*inspect.signature(function).parameters.values()]


def test_the_interface_is_the_recorded_one() -> None:
    recorded, now = json.loads(GOLDEN.read_text()), interface()
    differences = [f"new: {name}{now[name]}" for name in now.keys() - recorded.keys()]
    differences += [f"gone: {name}{recorded[name]}" for name in recorded.keys() - now.keys()]
    differences += [
        f"changed: {name} from {recorded[name]} to {now[name]}"
        for name in now.keys() & recorded.keys()
        if now[name] != recorded[name]
    ]
    assert not differences, "vLLM's connector interface has changed:\n" + "\n".join(sorted(differences))


def test_every_abstract_method_is_implemented() -> None:
    assert not LMPipeConnector.__abstractmethods__
    assert supports_hma(LMPipeConnector)


def test_what_is_overridden_is_there_and_takes_the_same() -> None:
    base = {name: member for owner in (SupportsHMA, KVConnectorBase_V1) for name, member in vars(owner).items()}
    own = {name: member for name, member in vars(LMPipeConnector).items() if not name.startswith("_")}
    assert own.keys() <= base.keys(), f"vLLM calls none of {own.keys() - base.keys()}"
    for name, member in own.items():
        assert type(member) is type(base[name]), name
        if isinstance(member, property):
            continue
        ours, theirs = getattr(LMPipeConnector, name), base[name]
        theirs = theirs.__func__ if isinstance(theirs, classmethod) else theirs
        given = [(one.name, one.kind, one.default) for one in _parameters(theirs) if one.name not in ("self", "cls")]
        takes = [(one.name, one.kind, one.default) for one in _parameters(ours) if one.name != "self"]
        assert takes == given, name


# What travels between the processes.


def _messages() -> list[Any]:
    keys, blocks = np.arange(32, dtype=np.uint8).reshape(2, 16), (np.array([[3, 4], [5, -1]], np.int32),)
    layout = KVLayout(2, 2, 32, "float32", 32, ("layer",), ("opaque",), 2, opaque_page_bytes=8192, isa="x")
    root = Namespace(model="m", revision="", layout=1, kv_dtype="float32", chunk_tokens=0, tenant="t", rope="{}")
    result = LoadResult(64, 1, 4096, {Tier.SSD: 1}, "late", 0.5)
    return [
        Handshake(root, (layout, layout), (True, False), 32, 4),
        SaveOrder(7, "a", keys, 1, blocks, 200, False),
        LoadOrder("b", keys, 0, blocks, True, False),
        Orders(b"root", 64, 5, [], [], ["c"], [7], ["d"], 100, 101),
        LoadReport("b", 2, result, False),
        Reports({7: (1, True)}, [LoadReport("b", 2, result, True)], (100, 0.25)),
    ]


@pytest.mark.parametrize("message", _messages(), ids=lambda message: type(message).__name__)
def test_a_message_is_the_same_after_its_way(message: Any) -> None:
    again = pickle.loads(pickle.dumps(message))
    assert type(again) is type(message)
    assert repr(again) == repr(message)


def test_orders_carry_their_orders() -> None:
    _, save, load, *_ = _messages()
    orders = pickle.loads(pickle.dumps(Orders(saves=[save], loads=[load])))
    assert np.array_equal(orders.saves[0].keys, save.keys)
    assert np.array_equal(orders.loads[0].blocks[0], load.blocks[0])


def test_reports_of_ranks_become_one() -> None:
    def load(rank: int) -> LoadReport:
        return LoadReport("r", 2, LoadResult(64 * rank, rank, 0, {}, "", 0.0), False)

    ranks = [
        Reports({1: (1, True), 2: (1, True)}, [load(2)], (512, 0.5)),
        Reports({1: (1, True), 2: (1, False), 3: (1, True)}, [load(1)], (512, 0.75)),
        Reports(),
    ]
    one = ranks[0].aggregate(ranks[1]).aggregate(ranks[2])
    assert one.settled == {1: (2, True), 2: (2, False), 3: (1, True)}
    assert [report.failed for report in one.loads] == [False, True]
    assert one.prefill == (512, 0.75)
    assert one
    assert not Reports()


# What the type checker believes of vLLM.


def _stubs() -> list[tuple[str, ast.Module]]:
    found: list[tuple[str, ast.Module]] = []
    for path in sorted((TYPINGS / "vllm").rglob("*.pyi")):
        parts = path.relative_to(TYPINGS).with_suffix("").parts
        found.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), ast.parse(path.read_text())))
    return found


RENAMED = {"HfConfig": None, "_Position": "vllm.multimodal.inputs.PlaceholderRange",
           "_Feature": "vllm.multimodal.inputs.MultiModalFeatureSpec"}  # fmt: skip
"""Classes that have another name in vLLM, or none that is fixed."""


@pytest.mark.parametrize(("module", "tree"), [pytest.param(*stub, id=stub[0]) for stub in _stubs()])
def test_stubs_name_what_is_there(module: str, tree: ast.Module) -> None:
    real = importlib.import_module(module)
    missing: list[str] = []
    for node in tree.body:
        match node:
            case ast.ClassDef(name=name) if name in RENAMED:
                place = RENAMED[name]
                if place is not None:
                    owner, _, renamed = place.rpartition(".")
                    missing += _missing(node, getattr(importlib.import_module(owner), renamed))
            case ast.ClassDef(name=name):
                cls = getattr(real, name, None)
                missing += [name] if cls is None else _missing(node, cls)
            case ast.FunctionDef(name=name) | ast.AnnAssign(target=ast.Name(id=name)):
                missing += [] if hasattr(real, name) else [name]
            case ast.Assign(targets=[ast.Name(id=name)]):
                missing += [] if hasattr(real, name) else [name]
            case _:
                pass
    assert not missing, f"{module} has no {', '.join(missing)}"


def _missing(stub: ast.ClassDef, cls: type) -> list[str]:
    there = _attributes(cls)
    missing: list[str] = []
    for node in stub.body:
        match node:
            case ast.AnnAssign(target=ast.Name(id=name)) | ast.Assign(targets=[ast.Name(id=name)]):
                missing += [] if name in there else [f"{stub.name}.{name}"]
            case ast.FunctionDef(name=name):
                if name not in there:
                    missing.append(f"{stub.name}.{name}")
                elif not any(isinstance(one, ast.Name) and one.id == "property" for one in node.decorator_list):
                    real = {one.name for one in _parameters(cls if name == "__init__" else getattr(cls, name))}
                    said = {argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)} - {"self", "cls"}
                    missing += [f"{stub.name}.{name}({argument})" for argument in said - real]
            case _:
                pass
    return missing


def _attributes(cls: type) -> set[str]:
    """Names in a class and its bases, those that `__init__` sets too."""
    there = set(dir(cls)) | {name for base in cls.__mro__ for name in vars(base).get("__annotations__", {})}
    if dataclasses.is_dataclass(cls):
        there |= {field.name for field in dataclasses.fields(cls)}
    for base in cls.__mro__[:-1]:
        if inspect.isfunction(vars(base).get("__init__")) and not dataclasses.is_dataclass(base):
            there |= _set_by(base)
    return there


def _set_by(cls: type) -> set[str]:
    """Attributes that the methods of a class set on `self`."""
    try:
        tree = ast.parse(inspect.getsource(cls))
    except (OSError, TypeError, SyntaxError):
        return set()
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(interface(), indent=1) + "\n")
