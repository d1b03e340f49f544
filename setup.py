"""Everything about the package is declared in pyproject.toml; this file is the entry point of tools that need one."""

from setuptools import setup

setup()
