"""The page: one HTML file that needs nothing but a browser, and the figures as PNGs.

Whatever comes from a pool or from files is text here: escaped by the template, and characters that are invisible, turn
the writing direction or act on a terminal are shown as their codes.
"""

import base64
import hashlib
import json
import math
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from lark_fast.files import atomic_open, atomic_path
from lark_fast.report.sections import Figure, Section
from lark_fast.report.texts import as_shown, short

_LEVELS = 10  # of the heat strip
_WARMEST = 6.0  # nats: from here on all are the same colour
_PNG_WIDTH = 640
# Vega shortens a long label between the two halves of such a character, and vl-convert refuses one half.
_ASTRAL = re.compile("[\U00010000-\U0010ffff]")


def render(title: str, sections: Sequence[Section]) -> str:
    """The page as HTML."""
    import jinja2
    import vl_convert
    from markupsafe import Markup

    here = files("lark_fast.report") / "page"
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: (here / name).read_text(encoding="utf-8")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    environment.filters |= {"heat": _heat, "number": _number, "percent": _percent, "short": short}
    specs = {figure.name: specification(figure) for section in sections for figure in section.figures}
    bundle = vl_convert.javascript_bundle(vl_version=_vega_lite())
    scripts = [bundle.replace("</script", "<\\/script"), (here / "page.js").read_text(encoding="utf-8")]
    return environment.get_template("page.html.j2").render(
        title=title,
        sections=sections,
        style=Markup((here / "style.css").read_text(encoding="utf-8")),
        scripts=[Markup(script) for script in scripts],
        allowed=" ".join(map(_digest, scripts)),
        specs=Markup(_embedded(specs)),
        levels=[_WARMEST * level / (_LEVELS - 1) for level in range(_LEVELS)],
    )


def write_figures(directory: Path, sections: Sequence[Section]) -> list[str]:
    """Write each figure as ``name.png``, on white; returns their paths."""
    import vl_convert

    written = []
    directory.mkdir(parents=True, exist_ok=True)
    for section in sections:
        for figure in section.figures:
            wanted = specification(figure) | {"width": _PNG_WIDTH, "title": figure.title, "background": "white"}
            drawn = _ASTRAL.sub(lambda found: f"U+{ord(found[0]):X}", json.dumps(wanted, ensure_ascii=False))
            path = directory / f"{figure.name}.png"
            with atomic_path(path) as temporary:
                temporary.write_bytes(vl_convert.vegalite_to_png(drawn, vl_version=_vega_lite(), scale=2))
            written.append(str(path))
    return written


def write_page(path: Path, html: str) -> int:
    """Write the page, whole or not at all; returns its bytes."""
    with atomic_open(path) as file:
        file.write(html)
    return path.stat().st_size


def specification(figure: Figure) -> dict[str, Any]:
    """The figure as Vega-Lite JSON."""
    chart = figure.chart.to_dict()
    chart.pop("config", None)  # colours of lines and text are the page's
    return chart


def _vega_lite() -> str:
    """The version that Altair writes for, as vl-convert names it: 6.4."""
    import altair

    return ".".join(altair.SCHEMA_VERSION.removeprefix("v").split(".")[:2])


def _digest(script: str) -> str:
    """What a content security policy calls a script: no other one runs on the page."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _embedded(value: Any) -> str:
    """JSON inside of a script element: nothing in it can end the element or begin a comment."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _shown(value: Any) -> Any:
    """What a template prints."""
    return as_shown(value) if type(value) is str else value


def _heat(nll: float) -> str:
    """The class of a token's colour: h0 to h9, "" where there is no nll."""
    if not math.isfinite(nll):
        return ""
    return f"h{min(_LEVELS - 1, max(0, round(nll / _WARMEST * (_LEVELS - 1))))}"


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:.{digits}g}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %" if value else "0"
