"""What a kernel's code is, whatever its comments and docstrings say: SHA-256 of its syntax tree without docstrings."""

import ast
import hashlib
from pathlib import Path

KERNELS = Path(__file__).parent.parent / "kernels"


def fingerprints(folder: Path = KERNELS) -> dict[str, str]:
    """{file name: fingerprint} of every Python file in ``folder``."""
    return {path.name: fingerprint(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.py"))}


def fingerprint(source: str) -> str:
    """Of Python source."""
    return hashlib.sha256(repr(_plain(ast.parse(source))).encode()).hexdigest()


def _plain(node: object) -> object:
    """Nodes as (type, fields); without fields that are empty, which some versions of Python have and others not.

    ``ast.dump`` differs between those versions, and a machine that only measures may have another than this one.
    """
    if isinstance(node, list):
        return [_plain(child) for child in node]
    if not isinstance(node, ast.AST):
        return node
    fields = dict(ast.iter_fields(node))
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node):
        fields["body"] = node.body[1:]
    return type(node).__name__, [(name, _plain(value)) for name, value in fields.items() if value not in (None, [])]
