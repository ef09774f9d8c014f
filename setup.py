"""Maps the top-level ``kernels`` folder to ``lark_fast.kernels``; all metadata stands in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=find_packages(include=["lark_fast", "lark_fast.*"]),
    package_dir={"lark_fast": "lark_fast", "lark_fast.kernels": "kernels"},
)
