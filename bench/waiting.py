"""How OpenMP's threads should wait: small training steps under several settings, on a quiet and on a busy machine.

    md2 bench waiting                      this machine as it is
    md2 bench waiting --beside 2           beside two processes that keep a core busy each
    md2 bench waiting --demo demo/shards   the demo's whole training, with its loader, instead of the step alone
    md2 bench waiting --append bench/RESULTS.md

Each setting gets a process of its own, since libgomp reads its variables when it is loaded. The settings run in
turn, round by round. The step is the demo's: stereo, 192x64, batch 8, without the loader. What a training does before
its first step does not count.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.machine import add_append, busy, processor, publish, versions

ROOT = Path(__file__).resolve().parents[1]
VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS")
SETTINGS = {
    "OpenMP's default": {"GOMP_SPINCOUNT": "300000"},  # libgomp's own number
    "md2's default": {},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
    "OMP_NUM_THREADS=1": {"OMP_NUM_THREADS": "1"},
}
SPIN = "while True: pass"


def measure(seconds: float) -> float:
    """Samples per second of the demo's training step in this process."""
    import torch

    from bench.step import Contender, Inputs, amp_of
    from md2.config import DataConfig, LossConfig, ModelConfig
    from md2.model import Networks

    device, batch = torch.device("cpu"), 8
    data = DataConfig(frames=[0], stereo=True, width=192, height=64)
    networks = Networks(ModelConfig(), data, LossConfig())
    step = Contender(networks, Inputs.make("stereo", batch, 64, 192, device), amp_of("channels_last", device), False)
    step.step()
    began, steps = time.perf_counter(), 0
    while time.perf_counter() - began < seconds or not steps:
        step.step()
        steps += 1
    return steps * batch / (time.perf_counter() - began)


def environment(setting: dict[str, str]) -> dict[str, str]:
    """These variables and none of the shell's."""
    return {name: value for name, value in os.environ.items() if name not in VARIABLES} | setting


def steps_done(metrics: Path) -> int:
    """The last step of a training that metrics.jsonl has."""
    rows = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    return max((json.loads(row)["step"] for row in rows if row.endswith("\n")), default=0)


def demo(shards: Path, setting: dict[str, str], seconds: float) -> float:
    """Samples per second of `md2 train demo`, from its first step until `seconds` later."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = ["train", "demo", f"data.url={shards}", "train.log_every=1", "--run", str(run)]
        training = subprocess.Popen(
            [sys.executable, "-m", "cli.main", *command],
            cwd=ROOT,
            env=environment(setting),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            while not (before := steps_done(run / "metrics.jsonl")):
                if training.poll() is not None:
                    raise SystemExit(f"md2 {' '.join(command)}: exit code {training.returncode} before its first step")
                time.sleep(0.02)
            began, done = time.perf_counter(), before
            while training.poll() is None and (time.perf_counter() - began < seconds or done == before):
                time.sleep(0.02)
                done = steps_done(run / "metrics.jsonl")
            return (done - before) * 8 / (time.perf_counter() - began)
        finally:
            training.kill()
            training.wait()


def child(setting: dict[str, str], seconds: float) -> float:
    """`measure` in a process of its own, with these variables."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.waiting", "--measure", str(seconds)],
        cwd=ROOT,
        env=environment(setting),
        check=True,
        capture_output=True,
        text=True,
    )
    return float(done.stdout)


def report(rates: dict[str, list[float]]) -> str:
    """Markdown table: medians, and the median over rounds of the ratio to OpenMP's default."""
    lines = ["| setting | samples/s | of OpenMP's default |", "|---|---:|---:|"]
    base = rates["OpenMP's default"]
    for name, found in rates.items():
        ratio = statistics.median(a / b for a, b in zip(found, base, strict=True))
        lines.append(f"| {name} | {statistics.median(found):.1f} | {ratio:.2f}x |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None, say: Callable[[Any], None] = print) -> int:
    parser = argparse.ArgumentParser(prog="md2 bench waiting", description="Compare how OpenMP's threads wait.")
    parser.add_argument("--beside", type=int, default=0, help="busy processes to run beside the steps")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5, help="seconds of steps for each setting and round")
    parser.add_argument("--demo", type=Path, metavar="SHARDS", help="dataset of `make demo`: train it instead")
    add_append(parser)
    parser.add_argument("--measure", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure is not None:
        say(measure(options.measure))
        return 0
    others = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(options.beside)]
    shards = options.demo and options.demo.resolve()
    try:
        rates: dict[str, list[float]] = {name: [] for name in SETTINGS}
        for _ in range(options.rounds):
            for name, setting in SETTINGS.items():
                seconds = options.seconds
                rates[name].append(demo(shards, setting, seconds) if shards else child(setting, seconds))
                print(f"{name}: {rates[name][-1]:.1f} samples/s", file=sys.stderr, flush=True)
    finally:
        for other in others:
            other.kill()
            other.wait()
    beside = f"beside {options.beside} busy processes" if options.beside else "the machine as it is"
    text = "\n".join(
        [
            f"### Waiting: {'the demo' if shards else 'the step'}, {beside}",
            "",
            f"{processor()}, {busy()}; {versions('torch')}; {options.rounds} rounds of {options.seconds:g} s, medians.",
            "",
            report(rates),
            "",
        ]
    )
    publish(text, options.append, say)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
