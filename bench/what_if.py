"""What limits a training: its step alone, its loader alone, and what both together give.

    md2 bench loader --what-if URL|FOLDER CONFIG [key.sub=value …] [--seconds 10]

The step repeats one batch that is in memory; the loader gives batches that nobody uses, with 1, 2 and as many decoding
threads as the configuration asks for. What both give is predicted from these: a step takes as long as the slowest of

    the step and handing it a batch that is ready, one after the other;
    the loader;
    the CPU time of both, shared among the cores.

Last, both run together, and the table says how far the prediction was off. Each part runs
for `ROUNDS` windows, of which the fastest counts: other programs only ever make a window slower.
"""

from __future__ import annotations

import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, islice, repeat
from pathlib import Path
from statistics import median

import torch

from bench.machine import busy, processor, versions
from md2.config import Config, load_config
from md2.data.batch import Batch
from md2.data.cpu import cores, default_threads
from md2.data.dali import decode_device
from md2.distributed import Ranks, ranks
from md2.pipeline import Loader
from md2.train import PlainReporter
from md2.training.trainer import Trainer
from shards.dataset import LocalDataset, open_dataset

ROUNDS = 3
READY = 5
"""Batches that are taken when they are ready, to see what handing over takes."""
ENOUGH = 0.98
"""Share of the best rate from which on more threads are not worth a word."""


@dataclass(frozen=True)
class Rate:
    """Wall and CPU seconds of a step's worth of something; `handing` of them the training thread cannot work."""

    wall: float
    cpu: float
    handing: float = 0.0


def predicted(step: Rate, loader: Rate, processors: int) -> float:
    """Seconds that a step takes when both run."""
    return max(step.wall + loader.handing, loader.wall, (step.cpu + loader.cpu) / processors)


def limit(step: Rate, loader: Rate, processors: int) -> str:
    """Which of them it is."""
    shared = (step.cpu + loader.cpu) / processors
    if step.wall + loader.handing >= max(loader.wall, shared):
        return "the training step"
    return "the loader" if loader.wall >= shared else "the processor, which both share,"


def sentence(step: Rate, loaders: dict[int, Rate], threads: int, processors: int) -> str:
    """What limits training with `threads` decoding threads, and what others would do."""
    rates = {count: 1 / predicted(step, loader, processors) for count, loader in loaders.items()}
    best = max(rates, key=lambda count: rates[count])
    if rates[threads] < ENOUGH * rates[best]:
        advice = f"data.threads={best} would give {rates[best]:.2f}"
    elif rates[threads] < ENOUGH / step.wall:
        advice = "more needs more cores, or images that are cheaper to decode"
    else:
        advice = "more decoding threads would not help"
    share, what = rates[threads] * step.wall, limit(step, loaders[threads], processors)
    return (
        f"With {threads} decoding threads training takes {rates[threads]:.2f} steps/s, {share:.0%} of what the step "
        f"alone would: {what} limits it, and {advice}."
    )


def measure(work: Callable[[], object], seconds: float, device: torch.device, at_a_time: int) -> Rate:
    """Call `work` for so long, in multiples of `at_a_time`, after as many calls that do not count."""

    def window(length: float) -> Rate:
        done, began, cpu = 0, time.perf_counter(), time.process_time()
        while not done or time.perf_counter() - began < length:
            for _ in range(at_a_time):
                work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            done += at_a_time
        return Rate((time.perf_counter() - began) / done, (time.process_time() - cpu) / done)

    window(0)
    return min((window(seconds / ROUNDS) for _ in range(ROUNDS)), key=lambda rate: rate.wall)


class Measured:
    """The parts of one training, in this process."""

    def __init__(self, config: Config, dataset: LocalDataset, place: Ranks, run: Path, seconds: float) -> None:
        self.config, self.dataset, self.place, self.seconds = config, dataset, place, seconds
        self.trainer = Trainer(config, dataset, run, place, PlainReporter())
        self.trainer.model.train()
        self.accumulate = config.train.accumulate

    def loader(self, threads: int) -> Loader:
        """The training's, with so many decoding threads."""
        data = self.config.data.model_copy(update={"threads": threads})
        return Loader(
            self.dataset,
            "train",
            data,
            batch_size=self.config.train.batch_size,
            seed=self.config.train.seed,
            train=True,
            device=self.place.device,
            accumulate=self.accumulate,
        )

    def groups(self, loader: Loader) -> Iterator[list[Batch]]:
        """The batches of each step, without end."""
        batches = chain.from_iterable(repeat(loader))
        while True:
            yield list(islice(batches, self.accumulate))

    def step(self, group: list[Batch]) -> None:
        self.trainer._step(group)
        self.trainer.step += 1

    def of_step(self) -> Rate:
        group = next(self.groups(self.trainer.loader))
        return measure(lambda: self.step(group), self.seconds, self.place.device, 2)

    def of_loader(self, threads: int) -> Rate:
        loader = self.loader(threads)
        groups = self.groups(loader)
        found = measure(lambda: next(groups), self.seconds, self.place.device, self.at_a_time(loader))
        handing = []
        for _ in range(READY):
            time.sleep(2 * found.wall)
            began = time.perf_counter()
            next(groups)
            if self.place.device.type == "cuda":
                torch.cuda.synchronize(self.place.device)
            handing.append(time.perf_counter() - began)
        loader.close()
        return Rate(found.wall, found.cpu, median(handing))

    def of_both(self, threads: int) -> Rate:
        loader = self.loader(threads)
        groups = self.groups(loader)
        found = measure(lambda: self.step(next(groups)), self.seconds, self.place.device, self.at_a_time(loader))
        loader.close()
        return found

    def at_a_time(self, loader: Loader) -> int:
        """Steps that are read at once, so that no read is counted in part."""
        return max(1, loader._ahead // self.accumulate)


def table(step: Rate, loaders: dict[int, Rate], both: Rate, threads: int, processors: int) -> str:
    """Markdown."""
    lines = ["| | steps/s | CPU ms a step |", "|---|---:|---:|"]
    lines.append(f"| training step alone | {1 / step.wall:.2f} | {1000 * step.cpu:.0f} |")
    named = {count: f"{count} thread{'s' * (count > 1)}" for count in loaders}
    for count, loader in loaders.items():
        lines.append(f"| loader alone, {named[count]} | {1 / loader.wall:.2f} | {1000 * loader.cpu:.0f} |")
    for count, loader in loaders.items():
        rate, cpu = 1 / predicted(step, loader, processors), step.cpu + loader.cpu
        lines.append(f"| both, {named[count]}, predicted | {rate:.2f} | {1000 * cpu:.0f} |")
    off = both.wall / predicted(step, loaders[threads], processors) - 1
    lines.append(
        f"| both, {named[threads]}, measured | {1 / both.wall:.2f} (predicted {off:+.0%}) | {1000 * both.cpu:.0f} |"
    )
    return "\n".join(lines)


def what_if(url: str, recipe: str, overrides: list[str], seconds: float) -> str:
    """Measure and predict; Markdown.

    Raises:
        UsageError, DatasetError, StorageError, TrainingError: as training does.
    """
    config = load_config(recipe, [f"data.url={url}", *overrides])
    processors = cores()
    with tempfile.TemporaryDirectory() as run, ranks(config.train.device) as place:
        parts = Measured(config, open_dataset(url), place, Path(run), seconds)
        threads = config.data.threads or default_threads(decode_device(config.data.device, place.device))
        step = parts.of_step()
        loaders = {count: parts.of_loader(count) for count in sorted({1, 2, threads})}
        both = parts.of_both(threads)
    given = [recipe, *overrides]
    return (
        f"### What limits a training\n\n`md2 bench loader --what-if {shlex.join(['URL', *given])}`\n\n"
        f"Batch {config.train.batch_size}, {config.data.width}x{config.data.height}, {place.device.type}; "
        f"{processor()}, {busy()}; {versions('torch', 'nvidia-dali-cuda120', 'nvidia-dali-cuda130')}.\n\n"
        f"{table(step, loaders, both, threads, processors)}\n\n{sentence(step, loaders, threads, processors)}\n"
    )


def main(given: list[str], seconds: float) -> str:
    """`given`: address, configuration and overrides."""
    url, recipe, *overrides = given if len(given) > 1 else sys.exit("--what-if URL|FOLDER CONFIG [key.sub=value …]")
    return what_if(url, recipe, overrides, seconds)
