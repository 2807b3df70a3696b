"""The `causemesh` command."""

from causemesh.cli.app import main

__all__ = ["main"]
