"""The `md2` command. This file only registers the commands; each lives in the file of its name."""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import Annotated

import typer

from cli.bench import SETTINGS, bench
from cli.console import errors, fail, show_log
from cli.doctor import doctor
from cli.eval import evaluate
from cli.export import export
from cli.odometry import odometry
from cli.predict import predict
from cli.prep import PrepCommand, prep
from cli.report import report
from cli.sample import sample
from cli.shards import app as shards_app
from cli.train import train
from cli.zoo import zoo
from shards.errors import Md2Error
from shards.version import md2_version

app = typer.Typer(
    name="md2",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"md2 {md2_version()}")
        raise typer.Exit


@app.callback()
def md2(
    _: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Train Monodepth2 on KITTI at high throughput."""


app.command()(sample)
app.command(cls=PrepCommand)(prep)
app.command()(train)
app.command("eval")(evaluate)
app.command()(predict)
app.command()(odometry)
app.command()(export)
app.command()(report)
app.command(context_settings=SETTINGS)(bench)
app.command()(zoo)
app.command()(doctor)
app.add_typer(shards_app, name="shards")


def terminated(number: int, frame: FrameType | None) -> None:
    """SIGTERM unwinds like an error, so that what is half-written is removed; training has its own handler."""
    sys.exit(128 + number)


def main() -> None:
    """Console script: exit codes as listed in shards/errors.py."""
    signal.signal(signal.SIGTERM, terminated)
    show_log()
    try:
        app()
    except Md2Error as error:
        fail(error)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is unwound: pressed again, it would only break Python's exit
        errors.print("md2: interrupted")
        sys.exit(130)


if __name__ == "__main__":
    main()
