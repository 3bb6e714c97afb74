"""One style of docstring sections and of error sentences, in the library, the nodes and the launch files."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [path for folder in ("carla_digr", "ros2_ws/src", "launch") for path in sorted((ROOT / folder).rglob("*.py"))]
SECTIONS = {"Args", "Returns", "Yields", "Raises", "Attributes"}
VALUE = "\0"  # stands for a placeholder
STRANGE = re.compile(
    r"(Parameters|Arguments|Params|Return|Yield|Raise|Throws|Notes?|Examples?):"
    r"|Raises?\s(the\s)?[A-Z]\w*(Error|Gone|Failed|Collision)\b"
    r"|Returns\s[a-z(]"
)


def docstrings(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield getattr(node, "lineno", 1), text


def literal(node: ast.expr) -> str:
    """The text of an expression, VALUE for what is not known before it runs."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(literal(part) for part in node.values)
    return VALUE


def sentences(tree: ast.AST):
    for node in ast.walk(tree):
        called = node.func if isinstance(node, ast.Call) and node.args else None
        if isinstance(called, ast.Name) and called.id in ("UserError", "SimulatorGone"):
            yield called.lineno, literal(node.args[0])


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_and_errors_have_one_style(path):
    tree = ast.parse(path.read_text())
    for line, text in docstrings(tree):
        paragraphs = re.split(r"\n\n|(?<=[.;])\s", text)
        odd = [paragraph for paragraph in paragraphs if STRANGE.match(paragraph)]
        assert not odd, f"line {line}: {odd[0][:60]!r} is no section ({', '.join(sorted(SECTIONS))})"
        for section in re.findall(r"\n\n(\w+):\n(?! {4}\S)", text):
            assert section not in SECTIONS, f"line {line}: the section {section} has no entries"
    for line, said in sentences(tree):
        assert said[0] in f"{VALUE}'`-" or said[0].isupper(), f"line {line}: {said!r} begins with no capital"
        assert said[-1] in f"{VALUE}.?", f"line {line}: {said!r} has no full stop"
