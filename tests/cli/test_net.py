"""Whatever ends a command is one line: errors, signals, a reader that has gone; and what a console shows."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from cli.console import run
from cli.main import app
from md2.visualize import require_writable
from shards.errors import InputError, visible
from shards.files import write_atomic


def started(script: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """A process in which `script` replaces parts of md2 before the command line runs."""
    root = Path(__file__).resolve().parents[2]
    code = f"import sys; sys.argv = ['md2', *{list(arguments)!r}]\n{script}\nfrom cli.main import main; main()\n"
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=root,
        env={**os.environ, "COLUMNS": "100", **environment},
    )


def raising(what: str) -> str:
    return f"import md2.zoo\ndef zoo():\n    {what}\nmd2.zoo.zoo = zoo"


def too_deep() -> None:
    too_deep()


FAILURES: list[tuple[BaseException | Callable[[], object], str]] = [
    (MemoryError(), "MemoryError: not enough memory"),
    (too_deep, "RecursionError: an input is nested too deeply"),
    (OSError(errno.ENOLCK, "No locks available", "/x/lock"), "OSError: /x/lock: No locks available"),
    (RuntimeError("can't start new thread"), "allows no further thread"),
    ("\udcff".encode, "UnicodeEncodeError: 'utf-8' codec can't encode"),
    (ValueError("one\x1b[2J\u202e\nsecond line"), r"ValueError: one\x1b[2J\u202e; "),
    (type("OddError", (BaseException,), {})("x"), "OddError: x"),
]


@pytest.mark.parametrize(("what", "told"), FAILURES, ids=lambda value: type(value).__name__)
def test_whatever_escapes_a_command_is_one_line(
    what: BaseException | Callable[[], object],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def zoo() -> None:
        if isinstance(what, BaseException):
            raise what
        what()

    monkeypatch.setattr("md2.zoo.zoo", zoo)
    assert run(app, ["zoo"]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    assert line.startswith("md2: zoo failed in cli.zoo.zoo: ")
    assert told in line
    assert line.endswith("--debug shows where: md2 --debug zoo")
    assert "\x1b" not in line
    monkeypatch.setenv("MD2_DEBUG", "1")
    for words in (["zoo"], ["zoo", "--debug"], ["--debug", "zoo"]):
        assert run(app, words) == 1
        lines = capsys.readouterr().err.splitlines()
        assert lines[0] == "Traceback (most recent call last):"
        assert lines[-1].startswith("md2: zoo failed in cli.zoo.zoo: ")
        assert "\x1b" not in "".join(lines)
        monkeypatch.delenv("MD2_DEBUG", raising=False)


PLACES = [
    "predict {}/model.pt {}/street.png --out URL",
    "export {}/model.pt --to monodepth2 --out URL",
    "eval {}/model.pt {}/data --json URL",
    "eval {}/model.pt {}/data --save-png URL",
    "odometry {}/model.pt {}/frames --out URL",
    "report {}/run --out URL",
    "report URL",
    "shards show {}/data --sheet URL",
    "train mono --run URL",
    "train --resume URL",
    "prep --split eigen_zhou --splits URL",
    "sample URL",
]


@pytest.mark.parametrize("words", PLACES)
def test_a_url_is_no_local_place(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder named like the URL, with its credentials, would be made instead."""
    monkeypatch.chdir(tmp_path)
    for url in ("https://user:hUnTeR2@host/x", "simplecache::s3://KEY:hUnTeR2@bucket/x", "s3://bucket/x?sig=hUnTeR2"):
        assert run(app, words.replace("{}", str(tmp_path)).replace("URL", url).split()) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "a URL, but this must be a local file or folder" in line
        assert "hUnTeR2" not in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_pipe_or_device_is_not_replaced_by_a_file(tmp_path: Path, kind: str) -> None:
    """Root may rename over /dev/null; a pipe has a reader that waits."""
    target = tmp_path / "target"
    if kind == "pipe":
        os.mkfifo(target)
    else:
        target.symlink_to(os.devnull)
    with pytest.raises(InputError, match="target: a pipe, socket or device, not a file"):
        require_writable(target)
    with pytest.raises(OSError, match="a pipe, socket or device"):
        write_atomic(target, b"x")
    assert list(tmp_path.iterdir()) == [target]
    assert target.is_fifo() or target.is_symlink()


def test_torchruns_entry_has_a_net_as_well(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import md2.train

    secret = "hUnTeR2sEcReTvAlUe"

    def broken(*_: object) -> None:
        raise ConnectionError(f"GET https://host/a?X-Amz-Signature={secret}\x1b[2J failed")

    monkeypatch.setattr(md2.train, "load_source", broken)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("MD2_DEBUG", raising=False)
    assert md2.train.main(["mono"]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("md2 (rank 1): training failed: ConnectionError: GET https://host/a?…")
    assert shown.count("\n") == 1
    monkeypatch.setenv("MD2_DEBUG", "1")
    assert md2.train.main(["mono"]) == 1
    traced = capsys.readouterr().err
    assert traced.startswith("Traceback")
    assert secret not in shown + traced
    assert "\x1b" not in shown + traced
    assert md2.train.main(["mono", "--run", f"s3://KEY:{secret}@bucket/x"]) == 2
    assert secret not in capsys.readouterr().err


def test_no_secret_leaves_through_the_net_or_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another library's exception, its cause, and words of the command line, with --debug too."""
    secret = "hUnTeR2sEcReTvAlUe"

    def zoo() -> None:
        try:
            raise ConnectionError(f"GET https://host/a?X-Amz-Signature={secret} failed")
        except ConnectionError as error:
            raise RuntimeError(f"simplecache::s3://KEY:{secret}@bucket/x") from error

    monkeypatch.setattr("md2.zoo.zoo", zoo)
    monkeypatch.setenv("MY_API_TOKEN", secret)
    for words in (
        ["zoo"],
        ["zoo", "--debug"],
        ["zoo", f"s3://KEY:{secret}@bucket/x"],
        ["nope", f"https://user:{secret}@host"],
        [f"https://user:{secret}@host/"],
        ["eval", f"sftp://user:{secret}@host/run", "x"],
        ["predict", f"https://host/model.pt?sig={secret}", "x"],
    ):
        assert run(app, words) != 0
        shown = capsys.readouterr()
        assert "md2: " in shown.err
        assert secret not in shown.out + shown.err, words


@pytest.mark.parametrize(("number", "word"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
def test_a_signal_is_answered_at_once_even_while_python_is_busy(number: signal.Signals, word: str) -> None:
    """The main thread sits in C code that lets no handler run for seconds (one long hash)."""
    busy = "print('busy', flush=True); hashlib.pbkdf2_hmac('sha256', b'', b'', 5_000_000); time.sleep(60)"
    with started("import hashlib, time\n" + raising(busy), "zoo") as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "busy\n"
        process.send_signal(number)
        assert process.stderr.readline() == f"md2: {word}\n"
        assert process.poll() is None, "still in its C code"
        assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 128 + number


def test_an_error_out_of_an_interrupted_wait_is_an_interruption(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C in the middle of threading.Condition.wait releases a lock twice (seen in concurrent.futures.wait)."""

    def zoo() -> None:
        try:
            raise KeyboardInterrupt
        finally:
            threading.Lock().release()

    monkeypatch.setattr("md2.zoo.zoo", zoo)
    assert run(app, ["zoo"]) == 130
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "md2: interrupted\n")


def test_an_error_after_ctrl_c_is_an_interruption(capfd: pytest.CaptureFixture[str]) -> None:
    """As torch's ONNX exporter does, which catches Ctrl-C and reports that no attempt succeeded."""

    def exporter(*_: object, **__: object) -> None:
        with suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(30)
        time.sleep(0.2)  # the line comes from another thread
        raise RuntimeError("no attempt succeeded")

    assert run(exporter, []) == 128 + signal.SIGINT
    assert capfd.readouterr().err == "md2: interrupted\n"


def test_a_reader_that_has_enough_ends_quietly_and_a_full_disk_is_one_line() -> None:
    with started("", "zoo") as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1
    root = Path(__file__).resolve().parents[2]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "md2", "zoo"], stdout=full, stderr=subprocess.PIPE, text=True, cwd=root, check=False
        )
    assert done.returncode == 1
    assert "No space left on device" in done.stderr and len(done.stderr.splitlines()) == 1


def test_an_ascii_console_shows_all_of_it() -> None:
    with started("", "zoo", PYTHONIOENCODING="ascii") as process:
        output, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (0, "")
    assert "0.017 +- 0.008 m" in output


def test_warnings_of_libraries_are_not_the_users() -> None:
    script = (
        "import warnings, md2.zoo\nlisted = md2.zoo.zoo\ndef zoo():\n    warnings.warn('of a library')\n"
        "    warnings.warn_explicit('of md2', UserWarning, md2.zoo.__file__, 1)\n    return listed()\nmd2.zoo.zoo = zoo"
    )
    with started(script, "zoo") as process:
        error = process.communicate(timeout=60)[1]
    assert (process.returncode, error) == (0, "warning: of md2\n")
    with started(script, "zoo", "--debug") as process:
        assert "of a library" in process.communicate(timeout=60)[1]


def test_unseen_characters_are_written_out() -> None:
    hostile = "a\x1b[2Jb\u202egnp.exe\u200b\u2028\udcff\ufeffé±"
    shown = visible(hostile)
    assert shown == r"a\x1b[2Jb\u202egnp.exe\u200b\u2028\udcff\ufeffé±"
