"""No bytes from outside are ever run: nothing in the package unpickles, evaluates, or loads what could."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import lmpipe

SOURCES = sorted(Path(lmpipe.__file__).parent.rglob("*.py"))
MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "jsonpickle"}
CALLS = {"recv_pyobj", "send_pyobj", "unsafe_load", "full_load", "read_pickle", "allow_pickle"}
BUILTINS = {"eval", "exec", "__import__"}


def _name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _owner(node: ast.expr) -> str:
    return _name(node.value) if isinstance(node, ast.Attribute) else ""


def _is_true(call: ast.Call, argument: str) -> bool:
    found = [keyword.value for keyword in call.keywords if keyword.arg == argument]
    return bool(found) and isinstance(found[0], ast.Constant) and found[0].value is True


def unsafe(tree: ast.AST) -> list[str]:
    """What in a module could run what it reads."""
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module for _ in node.names if node.module and node.module.split(".")[0] in MODULES]
        elif isinstance(node, ast.Call):
            name, owner = _name(node.func), _owner(node.func)
            whose = f"{owner}.{name}" if owner else name
            loads = (owner, name) in (("torch", "load"), ("yaml", "load"), ("np", "load"), ("numpy", "load"))
            safe = _is_true(node, "weights_only") if owner == "torch" else owner in ("np", "numpy")
            if name in CALLS or (isinstance(node.func, ast.Name) and name in BUILTINS) or (loads and not safe):
                found.append(whose)
            if _is_true(node, "allow_pickle"):
                found.append(f"{whose}(allow_pickle=True)")
    return found


def test_nothing_unpickles() -> None:
    found = {str(path): unsafe(ast.parse(path.read_text())) for path in SOURCES}
    assert len(found) > 100 and {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "__import__(name)",
        "from pickle import loads",
        "def f():\n    import cloudpickle.x",
        "socket.recv_pyobj()",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "eval(text)",
    ],
)
def test_what_would_is_seen(text: str) -> None:
    assert unsafe(ast.parse(text))


def test_what_is_harmless_is_not() -> None:
    assert not unsafe(ast.parse("torch.load(p, weights_only=True)\nload(path).eval()\nnp.load(p)\nyaml.safe_load(t)"))
