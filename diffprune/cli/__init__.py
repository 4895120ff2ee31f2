"""The command line: each verb parses, calls the public function of the same name, and prints what it returns."""

from __future__ import annotations

from diffprune.cli.app import main

__all__ = ["main"]
