"""Check and measure everything that needs a GPU machine, with one command.

    md2 bench gpu OUT                          needs one NVIDIA GPU, no network; about a quarter of an hour
    md2 bench gpu OUT --only kernels,decode    these sections only
    md2 bench gpu OUT --device cpu --tiny      the same code on small inputs, to see that it runs; no GPU figures

OUT receives gpu.md (tables) and gpu.json (the same numbers). Both are rewritten after each section, so a later
failure loses nothing. A failing section or check becomes a row of the tables, its traceback goes to OUT/SECTION.txt,
the other sections still run, and the exit code is 1. The data are rendered and packed here.

    kernels    loss and gradients by Triton's kernels and by plain operators, compared with float64; time, memory
    decode     images decoded on the GPU and on the CPU; order, flips and cameras must be equal
    step       training steps on a batch that is already on the device: float32, bf16, contiguous, compiled,
               as a CUDA graph, without cuDNN's search; peak memory
    training   `md2 train` from end to end, batches made ahead and not, its time beyond the step alone, and the time of
               the paper's 20 epochs
    loader     batches alone: triplets/s by batch size, decoded on the GPU, on the CPU, and uncompressed; on the GPU
               also by the share of images that its JPEG engines take
    resume     a loader's state and a run's checkpoint, saved on the CPU and resumed on the GPU
    baseline   forward, loss, backward and optimiser compared with bench/reference.py

If commands are limited to ten minutes, run it in two parts: --only kernels,decode,step,training, then the rest.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shlex
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.gpu_record import Record, Setup, markdown
from bench.gpu_sections import SECTIONS
from bench.machine import busy, processor, versions
from shards.errors import InputError

Section = Callable[[Setup, Record], None]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="md2 bench gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the tables")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="few and small images, to see that it runs")
    parser.add_argument("--only", help=f"comma-separated, of {', '.join(SECTIONS)}")
    parser.add_argument("--batches", default="12,32,64", help="batch sizes")
    parser.add_argument("--seconds", type=float, default=6.0, help="length of each measurement")
    parser.add_argument("--samples", type=int, default=8192, help="samples in the dataset")
    parser.add_argument("--threads", type=int, help="decoding threads; default: one per core")
    options = parser.parse_args(arguments)
    options.sections = options.only.split(",") if options.only else list(SECTIONS)
    if unknown := [name for name in options.sections if name not in SECTIONS]:
        parser.error(f"--only {','.join(unknown)}: of {', '.join(SECTIONS)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device; --device cpu --tiny shows that the code runs")
    return options


def machine(device: torch.device) -> dict[str, str]:
    """Describe the machine: CPU, load, versions, GPU."""
    about = {"cpu": processor(), "load": busy(), "versions": versions()}
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        about["gpu"] = f"{torch.cuda.get_device_name(device)}, {total / 2**30:.0f} GiB, {free / 2**30:.0f} free"
        about["cuda"] = str(torch.version.cuda)
    else:
        about["gpu"] = "none used: every figure below is the CPU's"
    return about


def guarded(name: str, section: Section, setup: Setup, out: Path) -> Record:
    """Run a section; record an error in one line, and write its traceback to a file."""
    record, begin = Record(name), time.perf_counter()
    try:
        section(setup, record)
    except (Exception, SystemExit) as error:
        told = str(error).strip().splitlines()
        record.error = f"{type(error).__name__}: {told[0] if told else 'no message'}"
        (out / f"{name}.txt").write_text(traceback.format_exc())
    record.seconds = time.perf_counter() - begin
    gc.collect()
    if setup.device.type == "cuda":
        torch.cuda.empty_cache()
    return record


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sections; return 0, or 1 if a section or a check failed."""
    options = parse(arguments)
    device = torch.device(options.device)
    if device.type == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before md2.photometric.kernels is imported
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{options.out}: cannot be written: {error.strerror}") from error
    words = [str(word) for word in (sys.argv[1:] if arguments is None else arguments)]
    command = shlex.join(["md2", "bench", "gpu", *("OUT" if word == str(options.out) else word for word in words)])
    about, records = machine(device), []
    with tempfile.TemporaryDirectory() as folder:
        setup = Setup.of(options, device, Path(folder))
        for name in options.sections:
            print(f"{name} ...", flush=True)
            records.append(guarded(name, SECTIONS[name], setup, options.out))
            text = markdown(command, about, setup, records)
            (options.out / "gpu.md").write_text(text)
            whole: dict[str, Any] = {"command": command, "machine": about, "tiny": options.tiny}
            whole["sections"] = [asdict(record) for record in records]
            (options.out / "gpu.json").write_text(json.dumps(whole, indent=1) + "\n")
            print(records[-1].markdown(), flush=True)
    failed = [record.name for record in records if record.failed]
    print(f"{options.out / 'gpu.md'}: " + (f"FAILED: {', '.join(failed)}" if failed else "every check holds"))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
