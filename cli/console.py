"""What the commands share: consoles, progress bars, and the net that turns whatever ends a command into one line."""

from __future__ import annotations

import codecs
import logging
import os
import resource
import shlex
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from md2.process import Libraries, shortage
from shards.errors import Md2Error, UsageError, first_line, visible
from shards.files import require_local, require_possible

console = Console()
errors = Console(stderr=True)

DEBUG = "MD2_DEBUG"
"""Environment variable: as `md2 --debug`."""
Device = Annotated[Literal["auto", "cpu", "gpu"], typer.Option(help="Where the networks run.")]
"""Option of several commands, as are the next two."""
PostProcess = Annotated[
    bool, typer.Option("--post-process", help="Average with the prediction for the mirrored image.")
]
Splits = Annotated[Path | None, typer.Option(metavar="DIR", help="Folder that holds splits by name.")]
Advance = Callable[[int, int], None]
"""Called with how many units are done, and of how many (0: unknown)."""
_OURS = ("md2", "prep", "shards", "cli", "bench")
_ROOT = Path(__file__).resolve().parents[1]
# What an ASCII console shows instead; anything else is written out as an escape.
_ASCII = {"±": "+-", "\N{MULTIPLICATION SIGN}": "x", "…": "...", "\N{EN DASH}": "-", "²": "^2", "³": "^3", "→": "->"}
_OUT_OF_MEMORY = ("can't allocate memory", "cannot allocate memory", "out of memory", "failed to map segment")
_PLACES = ("model", "paths", "runs", "inputs", "source", "dataset", "raw", "split", "out", "config")
"""Options and arguments that may be local paths, and URLs or names as well."""
_debug = False


def say(text: str, *, style: str | None = None) -> None:
    """Print one line on stdout as it is, without markup or line breaks; unseen characters are written out."""
    console.print(visible(text), style=style, highlight=False, markup=False, soft_wrap=True)


def warn(text: str, *, style: str | None = "yellow") -> None:
    """As `say`, on stderr."""
    errors.print(visible(text), style=style, highlight=False, markup=False, soft_wrap=True)


def counted(number: int, noun: str) -> str:
    """`1 image`, `1,200 images`."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


class _Rate(ProgressColumn):
    """Units per second: the task's `rate` if it sets one, else what the bar measures; the mean once it is done."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        rate = task.fields.get("rate")
        if rate is None:
            rate = task.completed / task.elapsed if task.finished and task.elapsed else task.speed
        return Text("" if rate is None else f"{rate:.1f} {self._unit}/s")


class _Bar(Progress):
    """A display that an exception wipes, so that the message stands alone."""

    def __exit__(self, *error: Any) -> None:
        if error[0] is not None or not any(task.completed for task in self.tasks):
            self.live.transient = True
        super().__exit__(*error)


def progress_bar(unit: str) -> Progress:
    """Return a bar `label ━━━ 3/10 12.3 unit/s 0:00:42 left`, on stderr so that stdout can be piped.

    Tasks are added with a `note`, which stands at the end, and may set their own `rate`.
    """
    return _Bar(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(unit),
        TimeRemainingColumn(),
        TextColumn("left {task.fields[note]}", markup=False),
        console=errors,
    )


@contextmanager
def bars(unit: str) -> Iterator[Callable[[str], Advance]]:
    """Show bars while inside: call the result with a label to add one, and that with (done, total) to move it."""
    with progress_bar(unit) as display:

        def add(label: str) -> Advance:
            task = display.add_task(visible(label), total=None, note="")
            return lambda done, total: display.update(task, completed=done, total=total or None)

        yield add


class _OnConsole(logging.Handler):
    """Log lines on stderr, above the progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        warn(f"md2: {self.format(record)}", style=None)


def show_log() -> None:
    """Let the storage report what it waits for or fetches; ranks other than 0 report problems only."""
    log = logging.getLogger("shards")
    log.handlers = [_OnConsole()]
    log.setLevel(logging.INFO if _first_rank() else logging.WARNING)
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns of a home folder that cannot be written


def local_paths(command: Callable[..., Any]) -> Callable[..., Any]:
    """Let a command refuse URLs in the place of local paths, and impossible paths, before it does anything."""

    @wraps(command)
    def checked(**options: Any) -> Any:
        for name, value in options.items():
            if isinstance(value, Path):
                require_local(value)
            for word in [value] if isinstance(value, str) else value if isinstance(value, list) else []:
                if name in _PLACES and "://" not in word:
                    require_possible(Path(word))
        return command(**options)

    return checked


def with_room(libraries: Libraries) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Let a command that loads these libraries say in one line that the process may not use what they take."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(command)
        def checked(**options: Any) -> Any:
            if reason := shortage(libraries):
                raise Md2Error(reason)
            return command(**options)

        return checked

    return decorate


def debugging(wanted: bool) -> None:
    """Callback of `--debug`: show tracebacks and the warnings of libraries."""
    global _debug  # noqa: PLW0603
    _debug = wanted or bool(os.environ.get(DEBUG))


def run(app: Callable[..., Any], arguments: Sequence[str]) -> int:
    """Run a command line and return its exit code; whatever ends the command is at most one line on stderr.

    With `--debug` (anywhere in the line) or MD2_DEBUG set, a traceback stands above that line.
    """
    words = list(arguments)
    rest = words.index("--") if "--" in words else len(words)
    if "--debug" in words[:rest]:
        words = ["--debug", *(word for word in words[:rest] if word != "--debug"), *words[rest:]]
    debugging("--debug" in words[:1])
    _plain_output()
    message: str | None
    with _announced_signals() as (announce, announced), _own_warnings():
        try:
            _require_current_folder()
            result = app(words, standalone_mode=False, prog_name="md2")
            _flush()
            return result if isinstance(result, int) else 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
            message = end.code if isinstance(end.code, str) else None
        except KeyboardInterrupt:
            announce(signal.SIGINT)
            return 128 + signal.SIGINT
        except BrokenPipeError:  # the reader, `head` for one, has enough
            _forget_stdout()
            return 1
        except BaseException as error:
            if _debug:
                _print_trace(error)
            # A library may collect what ended its attempts, Ctrl-C among it, and raise an error of its own.
            if _interrupted(error) or (announced.is_set() and not isinstance(error, Md2Error)):
                announce(signal.SIGINT)
                return 128 + signal.SIGINT
            code, message = _explained(error, words)
    # Outside the except clause: the frames that filled the memory are gone.
    with suppress(BrokenPipeError):
        _flush()
    if message is not None:
        _print_error(message)
    return code


def _require_current_folder() -> None:
    """Refuse to begin in a folder that is gone: libraries end the process at it, with words of their own.

    Raises:
        UsageError: it is gone, or may not be looked at.
    """
    try:
        Path.cwd()
    except OSError as error:
        raise UsageError(f"the current folder cannot be used ({error.strerror}): change to another") from error


def _interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C came first: raised inside a library's wait, it can end in a RuntimeError about a lock."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__context__
    return False


def _explained(error: BaseException, words: Sequence[str]) -> tuple[int, str]:
    """Exit code and line of anything that ended a command."""
    if isinstance(error, Md2Error):
        return error.exit_code, str(error)
    show = getattr(error, "format_message", None)
    if callable(show):  # typer's own: a wrong command, option or value
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "md2"
        if type(error).__name__ == "NoArgsIsHelpError":
            console.print(show(), markup=False, highlight=False, soft_wrap=True)
            return 2, f"name a command; {command} COMMAND --help shows its options"
        return getattr(error, "exit_code", 2), f"{' '.join(show().split())} ({command} --help shows the options)"
    if isinstance(error, typer.Abort):
        return 1, "no answer, so nothing was done"
    command = next((word for word in words if not word.startswith("-")), "")
    again = shlex.join(["md2", "--debug", *(word for word in words if word != "--debug")][:4])
    what = f"{command or 'md2'} failed{_place(error)}: {_reason(error)}"
    return 1, what if _debug else f"{what}; --debug shows where: {again}{' ...' * (len(words) > 2)}"


def _reason(error: BaseException) -> str:
    if isinstance(error, ImportError) and isinstance(error.__cause__, ImportError):  # NumPy's advice
        error = error.__cause__
    name, text = type(error).__name__, first_line(error)
    small = text.lower()
    if isinstance(error, MemoryError) or name == "OutOfMemoryError" or any(mark in small for mark in _OUT_OF_MEMORY):
        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        most = "" if limit == resource.RLIM_INFINITY else f" (ulimit -v allows {limit / 1e9:.1f} GB of addresses)"
        return f"{name}: not enough memory{most}; take smaller batches or fewer workers"
    if isinstance(error, RecursionError):
        return f"{name}: an input is nested too deeply"
    if "can't start new thread" in text or "resource temporarily unavailable" in small:
        return f"{name}: the system allows no further thread (see ulimit -u, and the container's limits)"
    if isinstance(error, OSError) and error.strerror:
        return f"{name}: {f'{error.filename}: ' if error.filename else ''}{error.strerror}"
    return name if text == name else f"{name}: {text}"


def _place(error: BaseException) -> str:
    """The innermost function of md2 that the error passed, ` in md2.evaluation.run.run_eval`."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    inside = [frame for frame in frames if str(frame.f_globals.get("__name__")).partition(".")[0] in _OURS]
    if not inside:
        return ""
    return f" in {inside[-1].f_globals['__name__']}.{inside[-1].f_code.co_name}"


def _print_error(message: str) -> None:
    line = f"md2: {visible(message)}"
    try:
        shown = Text(line)
        shown.stylize("bold red", 0, 4)
        errors.print(shown, highlight=False, soft_wrap=True)
    except (MemoryError, RuntimeError):
        os.write(2, f"{line}\n".encode(errors="backslashreplace"))


def _print_trace(error: BaseException) -> None:
    for line in "".join(traceback.format_exception(error)).splitlines():
        warn(line, style=None)


def _first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    rest = error.object[error.start : error.end]
    shown = "".join(_ASCII.get(char) or char.encode("ascii", "backslashreplace").decode() for char in rest)
    return shown, error.end


def _plain_output() -> None:
    """Characters that a console cannot show are replaced: no output fails for want of one."""
    codecs.register_error("md2", _plain)
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="md2")


def _flush() -> None:
    if sys.stdout is not None:  # None where the caller closed it
        sys.stdout.flush()


def _forget_stdout() -> None:
    """Let what is still buffered go nowhere, so that Python's exit does not fail on it."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


@contextmanager
def _own_warnings() -> Iterator[None]:
    """Show md2's own warnings as lines; those of libraries only with --debug or Python's -W."""
    if _debug or sys.warnoptions:
        yield
        return

    def show(message: Warning | str, category: type[Warning], filename: str, *rest: Any, **named: Any) -> None:
        if Path(filename).is_relative_to(_ROOT) and Path(filename).relative_to(_ROOT).parts[0] in _OURS:
            warn(f"warning: {message}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


@contextmanager
def _announced_signals() -> Iterator[tuple[Callable[[int], None], threading.Event]]:
    """Print a line the moment Ctrl-C or SIGTERM arrives, even while the main thread is busy in C code.

    It gives a function that prints it now, and whether it was printed.

    Python writes the number of every signal into a pipe, whatever handler is set; a thread reads it. SIGTERM unwinds
    like an error, so that what is half-written is removed; training has handlers of its own.
    """
    announced = threading.Event()
    process = os.getpid()

    def announce(number: int) -> None:
        if announced.is_set() or os.getpid() != process or not _first_rank():
            return
        announced.set()
        word = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}[signal.Signals(number)]
        errors.print(f"md2: {word}", highlight=False, markup=False)

    if threading.current_thread() is not threading.main_thread():
        yield announce, announced
        return
    source, sink = os.pipe()
    os.set_blocking(sink, False)

    def watch() -> None:
        while (read := os.read(source, 1)) and read[0]:
            if read[0] in (signal.SIGINT, signal.SIGTERM):
                announce(read[0])
        os.close(source)

    thread = threading.Thread(target=watch, name="signals", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # no thread to be had: announced once all is unwound
        yield announce, announced
        return
    before = signal.signal(signal.SIGTERM, _terminated)
    outer = signal.set_wakeup_fd(sink, warn_on_full_buffer=False)
    try:
        yield announce, announced
    finally:
        signal.set_wakeup_fd(outer)
        signal.signal(signal.SIGTERM, before)
        with suppress(OSError):
            os.write(sink, b"\0")
        thread.join(1.0)
        os.close(sink)


def _terminated(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)
