"""How texts from outside come onto the page: every character is seen, and none is so long that the page gets large."""

import html
from collections.abc import Sequence
from pathlib import Path

from lark_fast.rendering.inspection import visible

NAME_BYTES = 90
_GAP = "[...]"
_JAVASCRIPTS_OWN = {
    *(
        "constructor",
        "hasOwnProperty",
        "isPrototypeOf",
        "propertyIsEnumerable",
        "toLocaleString",
        "toString",
        "valueOf",
    ),
    *("__proto__", "__defineGetter__", "__defineSetter__", "__lookupGetter__", "__lookupSetter__"),
}


def as_shown(text: str) -> str:
    """``text`` with the characters that act or hide written as codes; line breaks and tabs stay."""
    return visible(text, "\n\t")


def page_bytes(text: str) -> int:
    """How much of the page ``text`` takes: a mark that hides is written as a code, and ``<`` as ``&lt;``."""
    return len(html.escape(as_shown(text)).encode())


def without_middle(text: str, budget: int, gap: str = f"\n{_GAP}\n") -> tuple[str, int]:
    """``text`` with its middle left out where it takes more than ``budget`` bytes, and the characters left out."""
    if len(text) <= budget and page_bytes(text) <= budget:
        return text, 0
    head = text[: _fitting(text, budget // 2)]
    tail = text[::-1][: _fitting(text[::-1], budget // 2)][::-1]
    return f"{head}{gap}{tail}", len(text) - len(head) - len(tail)


def short(text: str, budget: int = NAME_BYTES) -> str:
    """``text`` with its middle left out where it takes more than ``budget`` bytes."""
    return without_middle(text, budget, _GAP)[0]


def labels(names: Sequence[str]) -> list[str]:
    """Names as a chart shows them: short, visible, and two of them never the same."""
    found: dict[str, None] = {}
    for name in names:
        label = shown = visible(short(name)) or "(no name)"
        if shown in _JAVASCRIPTS_OWN:
            label = shown = f"{shown} "  # Vega looks names up in objects, which have these already
        number = 1
        while label in found:
            number += 1
            label = f"{shown} ({number})"
        found[label] = None
    return list(found)


def tails(paths: Sequence[str]) -> list[str]:
    """The ends of paths: as many parts as tell them apart."""
    parts = [Path(path).absolute().parts for path in paths]
    for depth in range(1, max(map(len, parts), default=1) + 1):
        ends = ["/".join(part[-depth:]) for part in parts]
        if len(set(ends)) == len(set(parts)):
            return ends
    return list(paths)


def _fitting(text: str, budget: int) -> int:
    """How many characters from the start take no more than ``budget`` bytes."""
    low, high = 0, min(len(text), budget)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if page_bytes(text[:middle]) <= budget else (low, middle - 1)
    return low
