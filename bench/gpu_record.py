"""The set-up of `bench.gpu`, and its record: tables, checks, Markdown."""

from __future__ import annotations

import argparse
import gc
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from bench.data import FULL_SIZE, SIZE, find_samples, image_bytes, pack_samples, raw_tree
from shards.dataset import LocalDataset
from shards.sample import Codec

MOST_UNCOMPRESSED = 4096
"""Samples: 6 GB of files."""
Cell = str | int | float | None


@dataclass
class Record:
    """Result of one section.

    Attributes:
        name: of the section.
        tables: each a title and rows; a row maps columns to cells.
        checks: each a description, whether it holds, and the figures.
        notes: lines, or whole blocks of Markdown.
        error: the error that ended it early, in one line; None if it ended well.
        seconds: it took.
    """

    name: str
    tables: list[tuple[str, list[dict[str, Cell]]]] = field(default_factory=list)
    checks: list[tuple[str, bool, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    error: str | None = None
    seconds: float = 0.0

    def table(self, title: str) -> list[dict[str, Cell]]:
        """Add a table and return its list of rows, to append to."""
        rows: list[dict[str, Cell]] = []
        self.tables.append((title, rows))
        return rows

    def check(self, what: str, holds: bool, figures: str) -> None:
        self.checks.append((what, bool(holds), figures))

    @property
    def failed(self) -> bool:
        return self.error is not None or not all(holds for _, holds, _ in self.checks)

    def markdown(self) -> str:
        """Render the section, failures first."""
        lines = [f"## {self.name}{': FAILED' if self.failed else ''}", "", f"{self.seconds:.0f} s", ""]
        if self.error:
            lines += [f"**FAILED**: {self.error} (traceback: {self.name}.txt)", ""]
        if self.checks:
            lines += ["| check | | |", "|---|---|---|"]
            lines += [f"| {what} | {'holds' if ok else '**FAILED**'} | {told} |" for what, ok, told in self.checks]
            lines.append("")
        for title, rows in self.tables:
            lines += [*([title, ""] if title else []), *_table(rows), ""]
        for note in self.notes:
            lines += [note, ""]
        return "\n".join(lines)


def _table(rows: Sequence[Mapping[str, Cell]]) -> list[str]:
    if not rows:
        return ["(no rows)"]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return lines + [f"| {' | '.join(_cell(row.get(column)) for column in columns)} |" for row in rows]


def _cell(value: Cell) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)


@dataclass
class Setup:
    """What to measure, and for how long.

    Attributes:
        device: under test.
        folder: for data and runs.
        tiny: use few and small images.
        size: width and height of the networks' images.
        batches: batch sizes.
        seconds: length of each measurement.
        samples: in the dataset.
        warm: batches before each measurement.
        most_steps: limit on the steps of a training, including those before the measurement.
        threads: decoding threads; None: one per core.
        variants: of the step.
    """

    device: torch.device
    folder: Path
    tiny: bool
    size: tuple[int, int]
    batches: list[int]
    seconds: float
    samples: int
    warm: int
    most_steps: int
    threads: int | None
    variants: list[str]

    @classmethod
    def of(cls, options: argparse.Namespace, device: torch.device, folder: Path) -> Setup:
        if options.tiny:
            variants = ["float32", "bf16"]
            return cls(device, folder, True, (96, 64), [2], 0.0, 24, 2, 6, options.threads, variants)
        batches = [int(batch) for batch in options.batches.split(",")]
        variants = ["float32", "bf16", "bf16+contiguous"]
        variants += ["bf16+compile", "bf16+graphs", "bf16+no search"] if device.type == "cuda" else []
        amounts = (options.seconds, options.samples, 20, 600)
        return cls(device, folder, False, SIZE, batches, *amounts, options.threads, variants)

    @cached_property
    def raw(self) -> Path:
        """Synthetic frames of KITTI's size."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        return raw_tree(None, folder, size=(192, 96) if self.tiny else FULL_SIZE, frames=6 if self.tiny else 24)

    @cached_property
    def dataset(self) -> LocalDataset:
        """Those frames packed by prep, mono+stereo."""
        return self._packed("jpeg")

    @cached_property
    def uncompressed(self) -> LocalDataset:
        """The same samples, uncompressed."""
        return self._packed("ppm")

    def _packed(self, codec: Codec) -> LocalDataset:
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        samples = min(self.samples, MOST_UNCOMPRESSED) if codec == "ppm" else self.samples
        return pack_samples(find_samples(self.raw), self.raw, folder, samples, size=self.size, codec=codec)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def peak_memory(self) -> float | None:
        """Peak of torch's allocations since `reset_memory`, in MiB; None on a CPU."""
        return torch.cuda.max_memory_allocated(self.device) / 2**20 if self.device.type == "cuda" else None

    def device_memory(self) -> float | None:
        """Memory of the device in use by all (torch, DALI, other processes), in MiB; None on a CPU."""
        if self.device.type != "cuda":
            return None
        free, total = torch.cuda.mem_get_info(self.device)
        return (total - free) / 2**20

    def reset_memory(self) -> None:
        gc.collect()  # pipelines of earlier measurements
        if self.device.type == "cuda":
            torch._dynamo.reset()  # frees the memory of recorded graphs
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)


def markdown(command: str, about: Mapping[str, str], setup: Setup, records: Sequence[Record]) -> str:
    """Render the whole report."""
    lines = [f"# GPU: {about['gpu']}", "", f"`{command}`", "", f"{about['cpu']}, {about['load']}; {about['versions']}"]
    if setup.tiny:
        lines += ["", "**Tiny**: small images and few steps. It shows that the code runs; the figures mean nothing."]
    if "dataset" in vars(setup):
        size = f"{setup.size[0]}x{setup.size[1]}"
        kept = image_bytes(setup.dataset) / 1000
        lines += [
            "",
            f"{setup.samples} samples of synthetic frames, {size}, {kept:.0f} kB an image (KITTI's: 80 at 640x192)",
        ]
    lines += ["", "| section | | s |", "|---|---|---|"]
    lines += [f"| {r.name} | {'**FAILED**' if r.failed else 'done'} | {r.seconds:.0f} |" for r in records]
    return "\n".join([*lines, "", *(record.markdown() for record in records)])
