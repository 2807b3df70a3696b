"""What commands print: tables at a terminal, plain lines in a pipe, JSON when asked for."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.table import Table


class Output:
    """Prints in one form; `as_json` is the --json option."""

    def __init__(self, *, as_json: bool = False) -> None:
        self.as_json = as_json
        self._console = Console(soft_wrap=True)

    @property
    def fancy(self) -> bool:
        """Whether a person is looking."""
        return self._console.is_terminal and not self.as_json

    def progress(self, name: str, state: str) -> None:
        """One step of long work; on standard error when JSON is asked for."""
        if self.fancy:
            self._console.print(f"[cyan]{name:>10}[/] {state}")
        else:
            print(f"{name}: {state}", file=sys.stderr if self.as_json else sys.stdout, flush=True)

    def rows(self, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """A table; its columns are those of the first row."""
        if self.as_json:
            print(json.dumps([dict(row) for row in rows], default=readable))
            return
        if not rows:
            print(f"{title}: none")
            return
        if not self.fancy:
            self._plain(rows)
            return
        table = Table(title=title, title_justify="left")
        for name in rows[0]:
            numeric = isinstance(rows[0][name], (int, float))
            table.add_column(name, justify="right" if numeric else "left")
        for row in rows:
            table.add_row(*(cell(value) for value in row.values()))
        self._console.print(table)

    @staticmethod
    def _plain(rows: Sequence[Mapping[str, Any]]) -> None:
        print("\t".join(rows[0]))
        for row in rows:
            print("\t".join(cell(value) for value in row.values()))

    def document(self, value: Any) -> None:
        """One thing: JSON, indented where a person looks."""
        print(json.dumps(value, default=readable, indent=None if self.as_json else 2))

    def line(self, text: str) -> None:
        """A line for people; nothing with --json."""
        if not self.as_json:
            print(text, flush=True)


def cell(value: Any) -> str:
    """A value in a table."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.3f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def readable(value: Any) -> Any:
    """JSON for what JSON does not know: instants as ISO 8601, bytes as hex."""
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, bytes):
        return value.hex()
    return str(value)
