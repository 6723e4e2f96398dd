"""Start or resume a run; also the entry for torchrun.

A folder becomes a run once everything is known to work, so a mistake in the configuration leaves no run behind.

md2 train CONFIG [key.sub=value ...] --run DIR
md2 train --resume DIR
torchrun --nproc-per-node 4 -m md2.train CONFIG --run-dir DIR    (torchrun takes --run for its own)
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from md2.config import Config, config_from_dict, load_source, merge_overrides, read_config_tree, weights_path
from shards.dataset import LocalDataset, open_dataset
from shards.errors import InputError, Md2Error, TrainingError, UsageError, first_line, visible
from shards.files import expanded, read_small, require_local, sweep, write_atomic
from shards.locks import FileLock

# What loads PyTorch, which takes seconds, is imported inside the functions: mistakes in words and dataset come first.
if TYPE_CHECKING:
    from md2.distributed import Ranks
    from md2.training.runlog import Reporter, Stopped
    from md2.training.trainer import Trainer

CONFIG = "config.yaml"
LOCK = ".lock"
CHANGEABLE = (
    "data.url",
    "data.threads",
    "data.prefetch",
    "data.ahead",
    "train.batch_size",
    "train.accumulate",
    "train.epochs",
    "train.max_steps",
    "train.log_every",
    "train.image_every",
    "train.checkpoint_every",
    "train.val_batches",
    "train.on_nan",
    "train.loggers",
)
"""Keys that may change on resume: none alters the numbers of a step while batch_size x accumulate x ranks stays."""

IMPATIENCE = 1.0
"""Seconds after which a second Ctrl-C counts: schedulers and torchrun send the first signal twice."""


class StopRequest:
    """Set by SIGTERM or Ctrl-C and polled between steps. A second Ctrl-C, later, ends the process at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.since = 0.0
        self.cancel: Callable[[], None] = lambda: None
        """Called once, in a thread, to end a wait that would keep the loop from polling."""

    def __call__(self) -> bool:
        return self.signal is not None

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Remember a signal."""
        if self.signal is None:
            self.signal, self.since = number, time.monotonic()
            # Not here: the signal may have interrupted a function that holds a lock which `cancel` needs.
            with suppress(RuntimeError):  # no thread to be had: the wait ends with its time limit
                threading.Thread(target=self.cancel, daemon=True).start()
        elif number == signal.SIGINT and time.monotonic() - self.since > IMPATIENCE:
            raise KeyboardInterrupt

    @property
    def exit_code(self) -> int:
        """The code that a shell reports for the signal: 143 for SIGTERM, 130 for Ctrl-C."""
        return 0 if self.signal is None else 128 + self.signal


@contextmanager
def stop_on_signals(request: StopRequest) -> Iterator[None]:
    """While inside, SIGTERM and SIGINT stop the loop after its step instead of killing the process.

    For the loop only: fetching a dataset may take hours, and loses nothing when it is killed.
    """
    before = {number: signal.signal(number, request.handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class TrainingResult:
    """Where a run stopped, and the exit code."""

    stopped: Stopped
    run: Path
    exit_code: int


def start_run(config: Config, run: Path, reporter: Reporter) -> TrainingResult:
    """Train a new run in the folder `run`, which must not hold one yet.

    Raises:
        UsageError: `run` already holds a run, or the dataset lacks what the configuration needs.
        DatasetError, StorageError: the dataset cannot be read.
        TrainingError: training cannot continue.
    """
    _refuse_used(run)
    config = _with_absolute_url(config)
    stop = StopRequest()
    dataset = open_dataset(config.data.url)
    if config.model.weights not in ("imagenet", "scratch"):
        weights_path(config.model.weights)

    from md2.distributed import ranks
    from md2.training.trainer import Trainer

    with ranks(config.train.device) as place:
        trainer = Trainer(config, dataset, run, place, reporter, should_stop=stop)
        # Only now that everything works: a run that did not get this far can be started again.
        with _claimed(run, place):
            if place.main:
                _refuse_used(run)
                _write_start(config, run, place, dataset)
            return _finish(trainer, run, place, stop)


def resume_run(run: Path, overrides: Sequence[str], reporter: Reporter) -> TrainingResult:
    """Resume a run from its newest checkpoint, mid-epoch and with the same numbers.

    A run that was killed before its first checkpoint starts again, with the same numbers too.

    Raises:
        UsageError: no run there, another process trains in it, or an override would change the numbers.
        InputError: there are checkpoints, but none that can be read.
        TrainingError, DatasetError: as `start_run`; another dataset than the run's.
    """
    config = _with_absolute_url(_config_to_resume(run, overrides))
    stop = StopRequest()
    dataset = open_dataset(config.data.url)
    _check_dataset(run, dataset)

    from md2.checkpoint import has_checkpoint, load_latest
    from md2.distributed import ranks
    from md2.training.trainer import Trainer

    with ranks(config.train.device) as place, _claimed(run, place):
        checkpoint, warning = load_latest(run) if has_checkpoint(run) else (None, "no checkpoint yet: from the start")
        if warning and place.main:
            reporter.message(f"warning: {warning}")
        trainer = Trainer(config, dataset, run, place, reporter, resume=checkpoint, should_stop=stop)
        if trainer.measured and trainer.step >= trainer.total_steps and place.main:
            reporter.message(
                f"the run is finished ({trainer.step} steps): to train further, raise train.epochs"
                + (" or train.max_steps" if config.train.max_steps else "")
            )
        return _finish(trainer, run, place, stop)


def _refuse_used(run: Path) -> None:
    if (run / CONFIG).exists():
        raise UsageError(
            f"{run} already holds a run: md2 train --resume {shlex.quote(str(run))} resumes it, --run names another"
        )


def _with_absolute_url(config: Config) -> Config:
    """A relative folder as an absolute path, so that the run can be resumed from any folder."""
    if "://" in config.data.url:
        return config
    url = str(expanded(Path(config.data.url)).absolute())
    return config.model_copy(update={"data": config.data.model_copy(update={"url": url})})


@contextmanager
def _claimed(run: Path, place: Ranks) -> Iterator[None]:
    """Hold the run folder while inside; the kernel lets go of it however the process ends.

    Raises:
        UsageError: another process holds it.
        InputError: the folder cannot be written.
    """
    if not place.main:
        yield
        return
    lock = FileLock(run / LOCK)
    try:
        free = lock.try_acquire()
    except OSError as error:
        raise _unwritable(run, error) from error
    if not free:
        raise UsageError(f"{run}: {lock.holder()} is training there: wait for it, or name another with --run")
    with lock:
        for folder in (run, run / "checkpoints", run / "panels"):
            sweep(folder, held=True)
        yield


def _finish(trainer: Trainer, run: Path, place: Ranks, stop: StopRequest) -> TrainingResult:
    from md2.training.summary import run_figure

    stop.cancel = trainer.cancel_waits
    with stop_on_signals(stop):
        try:
            stopped = trainer.fit()
        except RuntimeError as error:
            if place.world_size == 1 or not stop():
                raise
            _leave_others(f"another rank has left ({first_line(error)})", trainer, place, stop)
    if stopped.alone:
        _leave_others("it waited for the storage", trainer, place, stop)
    if place.main:
        run_figure(run)
    return TrainingResult(stopped, run, stop.exit_code if stopped.early else 0)


def _leave_others(reason: str, trainer: Trainer, place: Ranks, stop: StopRequest) -> NoReturn:
    """End a rank of several within a step: another cannot finish it, so all end, and torchrun sees to the rest."""
    trainer.reporter.message(
        f"rank {place.rank} stopped after step {trainer.step}: {reason}; resume from the last checkpoint with "
        f"md2 train --resume {shlex.quote(str(trainer.run))}"
    )
    raise SystemExit(stop.exit_code)


def _write_start(config: Config, run: Path, place: Ranks, dataset: LocalDataset) -> None:
    """Make the folder a run: its configuration, which is written last, is the mark of one.

    Raises:
        InputError: the folder cannot be written.
    """
    from md2.training.runlog import ENVIRONMENT, environment

    manifest = dataset.manifest
    facts = {"url": config.data.url, "split": manifest.split.name, "manifest_sha256": dataset.manifest_sha256}
    facts["images"] = manifest.encoding
    try:
        run.mkdir(parents=True, exist_ok=True)
        write_atomic(run / ENVIRONMENT, (json.dumps(environment(place.device, facts), indent=1) + "\n").encode())
        write_atomic(run / CONFIG, config.to_yaml().encode())
    except OSError as error:
        raise _unwritable(run, error) from error


def _unwritable(run: Path, error: OSError) -> InputError:
    return InputError(f"cannot write the run folder {run}: {error.strerror or error}; --run names another")


def _check_dataset(run: Path, dataset: LocalDataset) -> None:
    from md2.training.runlog import ENVIRONMENT

    path = run / ENVIRONMENT
    if not path.is_file():
        raise InputError(f"{run}: no run to resume there ({ENVIRONMENT} is missing)")
    try:
        known = json.loads(read_small(path))["dataset"]["manifest_sha256"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: damaged ({type(error).__name__}); the run cannot be resumed without it") from error
    if known != dataset.manifest_sha256:
        raise TrainingError(
            f"{dataset.url} is not the dataset that the run was trained on (its manifest differs): "
            "give the original as data.url=..., or start a new run"
        )


def _config_to_resume(run: Path, overrides: Sequence[str]) -> Config:
    path = run / CONFIG
    if not path.is_file():
        inside = next((folder for folder in run.parents if (folder / CONFIG).is_file()), None)
        if inside is not None:
            raise UsageError(f"{run} is inside a run: md2 train --resume {shlex.quote(str(inside))} resumes it")
        raise UsageError(
            f"{run}: no run to resume there ({CONFIG} is missing); "
            f"start one with md2 train CONFIG --run {shlex.quote(str(run))}"
        )
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals:
            raise UsageError(
                f"--resume takes the run's own configuration, so {override!r} is one word too many: "
                "give only --resume RUN and key.sub=value"
            )
        if key not in CHANGEABLE:
            raise UsageError(
                f"{key} cannot change on resume (it would alter the numbers); these can: {', '.join(CHANGEABLE)}"
            )
    tree = read_config_tree(path)
    merge_overrides(tree, overrides)
    return config_from_dict(tree, str(path))


def progress_line(step: int, total: int, epoch: int, loss: float, images_per_second: float) -> str:
    """A line of progress for logs; epochs count from 1."""
    return f"step {step}/{total}  epoch {epoch + 1}  loss {loss:.4f}  {images_per_second:.1f} images/s"


class PlainReporter:
    """Lines on stdout, for torchrun and logs."""

    def start(self, total: int, done: int) -> None:
        """Remember the number of steps."""
        self.total = total

    def step(self, step: int, epoch: int, loss: float | None, images_per_second: float) -> None:
        """Print a logged step."""
        if loss is not None:
            print(progress_line(step, self.total, epoch, loss, images_per_second), flush=True)

    def message(self, text: str) -> None:
        """Print one line."""
        print(text, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `python -m md2.train`, as torchrun starts it; returns the exit code."""
    parser = argparse.ArgumentParser(prog="md2.train", description="Train under torchrun; see md2 train --help")
    parser.add_argument("config", nargs="?", help="YAML file or recipe name")
    parser.add_argument("overrides", nargs="*", help="key.sub=value")
    parser.add_argument("--run", "--run-dir", type=Path, help="run folder")
    parser.add_argument("--resume", type=Path, help="run folder to resume")
    options = parser.parse_intermixed_args(arguments)
    rank = f" (rank {os.environ['RANK']})" if "RANK" in os.environ else ""
    try:
        result = run_command(options.config, options.overrides, options.run, options.resume, PlainReporter())
        if os.environ.get("RANK", "0") == "0":
            print(f"{'stopped early' if result.stopped.early else 'done'} at step {result.stopped.step}: {result.run}")
        return result.exit_code
    except Md2Error as error:
        print(f"md2{rank}: {visible(str(error))}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        print("md2: interrupted", file=sys.stderr, flush=True)
        return 128 + signal.SIGINT
    except Exception as error:
        if os.environ.get("MD2_DEBUG"):
            for line in "".join(traceback.format_exception(error)).splitlines():
                print(visible(line), file=sys.stderr)
        line = f"training failed: {type(error).__name__}: {first_line(error)}; MD2_DEBUG=1 shows where"
        print(f"md2{rank}: {visible(line)}", file=sys.stderr, flush=True)
        return 1


def run_command(
    source: str | None, overrides: Sequence[str], run: Path | None, resume: Path | None, reporter: Reporter
) -> TrainingResult:
    """Resume the run `resume`, or start one of the configuration `source`: what both entries do.

    Raises:
        UsageError: neither or both of them.
        Md2Error: as `start_run` and `resume_run`.
    """
    for folder in (run, resume):
        if folder is not None:
            require_local(folder)
    if resume is not None:
        # There is no configuration, so the first word is an override.
        words = [word for word in (source, *overrides) if word is not None]
        if run is not None:
            raise UsageError("--resume names the run folder itself: leave --run out")
        return resume_run(resume, words, reporter)
    config = load_source(source, overrides)
    return start_run(config, run or Path("runs") / Path(str(source)).stem, reporter)


if __name__ == "__main__":
    sys.exit(main())
