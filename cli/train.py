"""`md2 train`: a progress bar around md2/train.py."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import TaskID

from cli.console import errors, progress_bar


class BarReporter:
    """A bar with loss, images/s and time left, messages above it. Ranks other than 0 show messages only.

    If stderr is no terminal but a log file, plain lines.
    """

    def __init__(self) -> None:
        self.bar = progress_bar("images")
        self.task: TaskID | None = None
        self.main = os.environ.get("RANK", "0") == "0"

    def start(self, total: int, done: int) -> None:
        self.total = total
        if self.main:
            self.task = self.bar.add_task("steps", total=total, completed=done, rate=None, note="")
            self.bar.start()

    def step(self, step: int, epoch: int, loss: float | None, images_per_second: float) -> None:
        if self.task is None:
            return
        self.bar.update(self.task, completed=step, rate=images_per_second)
        if loss is not None:
            self.bar.update(self.task, note=f"epoch {epoch + 1}  loss {loss:.4f}")
        if loss is not None and not errors.is_terminal:
            from md2.train import progress_line

            self.message(progress_line(step, self.total, epoch, loss, images_per_second))

    def message(self, text: str) -> None:
        errors.print(text, highlight=False, markup=False, soft_wrap=True)

    def stop(self, *, wiped: bool = False) -> None:
        if self.task is not None:
            self.bar.live.transient = wiped
            self.bar.stop()


def train(
    config: Annotated[
        str | None, typer.Argument(metavar="CONFIG", help="YAML file, or a recipe's name (md2 zoo).")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="key.sub=value, e.g. data.url=... train.epochs=5")
    ] = None,
    run: Annotated[
        Path | None, typer.Option("--run", "--run-dir", metavar="DIR", help="Run folder. (default: runs/CONFIG)")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Resume this run, mid-epoch, with the same numbers.")
    ] = None,
    show: Annotated[
        bool, typer.Option("--show", help="Print the whole configuration, defaults and overrides included, and exit.")
    ] = False,
) -> None:
    """Train a model, or resume a run. Every configuration key is in docs/training.md; --show prints them."""
    from md2.config import load_source
    from md2.train import run_command
    from shards.errors import UsageError

    if show:
        if resume is not None:
            raise UsageError(f"--show takes a configuration; a run's is in {resume / 'config.yaml'}")
        print(load_source(config, overrides or []).to_yaml(), end="")
        return

    reporter = BarReporter()
    try:
        result = run_command(config, overrides or [], run, resume, reporter)
    except BaseException:
        reporter.stop(wiped=True)  # so that the message stands alone
        raise
    reporter.stop()
    if reporter.main:
        done = "stopped early" if result.stopped.early else "done"
        reporter.message(f"{done} at step {result.stopped.step}: {result.run}")
        folder = shlex.quote(str(result.run))
        if result.stopped.early:
            reporter.message(f"resume with: md2 train --resume {folder}")
        else:
            reporter.message(f"next: md2 report {folder}, md2 predict {folder} IMAGE...")
    raise typer.Exit(result.exit_code)
