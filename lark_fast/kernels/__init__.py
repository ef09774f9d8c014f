"""The door to the kernels when lark_fast runs from a checkout: they live in ``<checkout>/kernels``.

A wheel does not ship this file: there ``lark_fast.kernels`` is that folder itself, a namespace package.
"""

from pathlib import Path

_checkout = Path(__file__).resolve().parents[2]
if (_checkout / "setup.py").exists():
    __path__.append(str(_checkout / "kernels"))
