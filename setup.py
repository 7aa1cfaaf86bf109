"""The rest is in pyproject.toml. The version is read here without importing lorafuse, which needs torch."""

import ast
from pathlib import Path

from setuptools import setup


def read_version() -> str:
    """`__version__` of lorafuse/__init__.py; raises RuntimeError if it is not assigned there."""
    path = Path(__file__).parent / "lorafuse" / "__init__.py"
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(getattr(t, "id", "") == "__version__" for t in node.targets):
            return str(ast.literal_eval(node.value))
    raise RuntimeError(f'{path} has no line `__version__ = "x.y.z"`: add one')


setup(version=read_version())
