"""The command line. Each command is a module with a function `command`; a module is imported when it is named."""

from __future__ import annotations

from kvarn.cli.app import main

__all__ = ["main"]
