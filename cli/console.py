"""What the commands share: the console, the progress bar, and how an error ends a command."""

from __future__ import annotations

import logging
import os
import re
import sys
from typing import NoReturn

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from shards.errors import Md2Error

console = Console()
errors = Console(stderr=True)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def visible(text: str) -> str:
    """`text` with control characters written out: names and texts out of a bucket must not steer a terminal."""
    text = text.encode(errors="backslashreplace").decode()
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


class _Rate(ProgressColumn):
    """Units per second: what the task says as `rate`, else what the bar measures, the mean once it is done."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        rate = task.fields.get("rate")
        if rate is None:
            rate = task.completed / task.elapsed if task.finished and task.elapsed else task.speed
        return Text("" if rate is None else f"{rate:.1f} {self._unit}/s")


def progress_bar(unit: str) -> Progress:
    """A bar `label ━━━ 3/10 · 12.3 unit/s · 0:00:42 left`, on stderr so that stdout can be piped.

    Tasks are added with a `note`, which stands at the end, and may give their own `rate`.
    """
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(unit),
        TimeRemainingColumn(),
        TextColumn("left {task.fields[note]}"),
        console=errors,
    )


class _OnConsole(logging.Handler):
    """Log lines on stderr, above the progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        errors.print(f"md2: {visible(self.format(record))}", highlight=False, markup=False, soft_wrap=True)


def show_log() -> None:
    """Let the storage say what it is waiting for or fetching; ranks other than 0 only what is wrong."""
    log = logging.getLogger("shards")
    log.handlers = [_OnConsole()]
    log.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)


def fail(error: Md2Error) -> NoReturn:
    """Print the error's one line and end with its exit code."""
    errors.print(f"[bold red]md2:[/] {escape(visible(str(error)))}", highlight=False, soft_wrap=True, markup=True)
    sys.exit(error.exit_code)
