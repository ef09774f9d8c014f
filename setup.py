"""Maps the top-level ``kernels`` folder to ``lark_fast.kernels``; all metadata stands in pyproject.toml."""

from setuptools import setup

setup(
    packages=["lark_fast", "lark_fast.demo", "lark_fast.kernels"],
    package_dir={"lark_fast": "lark_fast", "lark_fast.demo": "lark_fast/demo", "lark_fast.kernels": "kernels"},
)
