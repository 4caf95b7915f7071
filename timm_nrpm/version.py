"""The version, and how the package is installed."""

__version__ = "0.1.0"

INSTALL = "pip install ."
"""Command that installs the package in a clone of its repository. It is in no package index."""

PYTHON = "3.10"
"""The oldest version of Python that it runs on."""
