"""docs/reliability.md promises nothing without a test: each row names one, or several, that are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_row_names_tests_that_are_there() -> None:
    lines = (ROOT / "docs" / "reliability.md").read_text().splitlines()
    heads = [line for line in lines if line.startswith("| fault |")]
    rows = [line for line in lines if line.startswith("| ") and line not in heads]
    assert heads and len(rows) > 20
    for row in rows:
        assert row.count(" | ") == heads[0].count(" | "), row
        named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", row)
        assert named, f"no test: {row}"
        for path, name in named:
            functions = {
                node.name
                for node in ast.walk(ast.parse((ROOT / path).read_text()))
                if isinstance(node, ast.FunctionDef)
            }
            assert not name or name in functions, f"{path} has no {name}"
