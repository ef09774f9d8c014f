"""Maps the top-level ``kernels`` folder to ``lark_fast.kernels``; all metadata stands in pyproject.toml."""

from setuptools import find_packages, setup

# An sdist does not hold the door of lark_fast/kernels, so that package is named and not found.
setup(
    packages=[*find_packages(include=["lark_fast", "lark_fast.*"], exclude=["lark_fast.kernels"]), "lark_fast.kernels"],
    package_dir={"lark_fast": "lark_fast", "lark_fast.kernels": "kernels"},
)
