"""What a run was made with."""

import platform
from importlib.metadata import PackageNotFoundError, version

import lark_fast


def versions(*packages: str) -> dict[str, str]:
    """Versions of lark-fast, of these packages where they are installed, and of Python."""
    found = {"lark_fast": lark_fast.__version__}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return {**found, "python": platform.python_version()}
