"""The `md2` command. This file only registers the commands; each lives in the file of its name."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from typer.core import TyperArgument

from cli.bench import SETTINGS, bench
from cli.compare import compare
from cli.console import debugging, local_paths, run, show_log, with_room
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
from md2.process import DALI
from shards.version import __version__

app = typer.Typer(
    name="md2",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"md2 {__version__}")
        raise typer.Exit


@app.callback()
def md2(
    _: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show where in the code an error arises, and the warnings of libraries.")
    ] = False,
) -> None:
    """Train Monodepth2 on KITTI at high throughput."""
    debugging(debug)


# Help shows an argument's name. Its Python type, such as `<list[str]>`, says nothing to a user.
TyperArgument.display_type_rich = lambda self, ctx: None  # type: ignore[method-assign]

app.command()(local_paths(sample))
app.command(cls=PrepCommand)(local_paths(prep))
app.command()(local_paths(with_room(DALI)(train)))
app.command("eval")(local_paths(with_room(DALI)(evaluate)))
app.command()(local_paths(with_room("PyTorch")(predict)))
app.command()(local_paths(with_room("PyTorch")(odometry)))
app.command()(local_paths(with_room("PyTorch")(export)))
app.command()(local_paths(with_room(DALI)(report)))
app.command()(local_paths(with_room("PyTorch")(compare)))
app.command(context_settings=SETTINGS)(bench)
app.command()(zoo)
app.command()(doctor)
app.add_typer(shards_app, name="shards")


def main() -> None:
    """Run the command line; exit codes as listed in shards/errors.py."""
    show_log()
    sys.exit(run(app, sys.argv[1:]))


if __name__ == "__main__":
    main()
