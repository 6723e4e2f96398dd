"""Two gloo ranks on the CPU, started by torchrun as a user does."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import narrow_main
import pytest
import ranks_gradient
import ranks_keys
import torch
from ranks_keys import watch
from storage_servers import Bucket, Fault, Proxy
from train_data import Silent

from bench.write_dataset import write_dataset
from md2 import distributed
from md2.checkpoint import load_checkpoint
from md2.config import load_config
from md2.train import resume_run, start_run
from md2.training.runlog import read_metrics
from shards.dataset import open_dataset
from shards.errors import UsageError
from shards.tar import read_samples
from shards.transfer import copy_dataset

LIMIT = 240
SETTINGS = [
    "model.weights=scratch",
    "data.width=96",
    "data.height=64",
    "data.threads=1",
    "train.device=cpu",
    "train.batch_size=1",
    "train.log_every=1",
    "train.image_every=1000",
]
NARROW = str(Path(narrow_main.__file__))
SMALL_POSE = ["model.pose_network=posecnn"]
"""Less to exchange and to save; the gradient of two ranks is compared with the default's."""


def torchrun(ranks: int, *arguments: str) -> subprocess.Popen[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [*launcher, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    try:
        output, _ = process.communicate(timeout=LIMIT)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return output


@pytest.mark.usefixtures("narrow")
def test_gradients_of_two_ranks_are_those_of_one_with_twice_the_batch(tmp_path: Path) -> None:
    ranks_gradient.main(tmp_path / "1.pt")
    process = torchrun(2, str(Path(ranks_gradient.__file__)), str(tmp_path / "2.pt"))
    output = finish(process)
    assert process.returncode == 0, output
    one, two = (torch.load(tmp_path / f"{world}.pt", weights_only=True) for world in (1, 2))
    assert (one["world"], two["world"]) == (1, 2)
    assert two["loss"].item() == pytest.approx(one["loss"].item(), rel=1e-6)
    assert one["gradients"].keys() == two["gradients"].keys()
    for name, expected in one["gradients"].items():
        scale = expected.abs().max().clamp(min=1e-12)
        assert ((two["gradients"][name] - expected).abs().max() / scale).item() < 1e-3, name
    flat = [torch.cat([g.flatten() for g in r["gradients"].values()]) for r in (one, two)]
    assert ((flat[0] - flat[1]).norm() / flat[0].norm()).item() < 1e-5


def test_two_ranks_train_from_a_bucket_larger_than_the_cache_and_write_once(
    dataset: Path, tmp_path: Path, rclone_bucket: Bucket, rclone_proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """24 shards of one sample, of which the cache holds 18; the part val has one sample, fewer than there are ranks."""
    opened = open_dataset(str(dataset))
    train, val = ([sample for tar in opened.tars(part) for sample in read_samples(tar)] for part in ("train", "val"))
    twice = [replace(sample, key=f"{sample.key}_{again}") for again in (0, 1) for sample in train]
    kept = ("split", "frames", "stereo", "depth", "size", "codec", "quality", "jpeg", "seed")
    about = {name: getattr(opened.manifest, name) for name in kept}
    manifest = write_dataset(tmp_path / "many", {"train": twice, "val": val[:1]}, samples_per_shard=1, **about)
    copy_dataset(str(tmp_path / "many"), rclone_bucket.url)
    limit = sum(sorted((shard.bytes + shard.index_bytes for shard in manifest.part("train")), reverse=True)[:18])
    monkeypatch.setenv("MD2_CACHE_LIMIT", str(limit))
    run = tmp_path / "run"
    arguments = [NARROW, "cli.main", "train", "mono_stereo", f"data.url={rclone_bucket.url}", *SETTINGS, *SMALL_POSE]
    process = torchrun(2, *arguments, "train.epochs=1", "data.prefetch=1", "--run-dir", str(run))
    output = finish(process)
    assert process.returncode == 0, output
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, len(train) + 1))
    assert [line["loss"] > 0 for line in lines if line["kind"] == "val"] == [True]
    held = [path.stat().st_size for path in (tmp_path / "cache").glob("*/*/*") if path.suffix in (".tar", ".idx")]
    assert 0 < sum(held) <= limit
    sent = Counter(r.path for r in rclone_proxy.requests if r.method == "GET" and "/train/" in r.path and r.sent)
    tars = {path: count for path, count in sent.items() if path.endswith(".tar")}
    assert len(tars) == len(twice)
    assert sum(tars.values()) < 2 * len(twice), "the ranks share what is fetched; some is fetched for the next epoch"


def test_four_ranks_then_two_then_one_take_the_samples_of_a_run_on_one(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, narrow: None, undrawn: None
) -> None:
    """Killed in between, each in another epoch; steps hold four samples throughout. While the weights are the same,
    so are the losses: the noise that breaks ties is each sample's."""
    watch(monkeypatch.setattr)
    start = ["mono_stereo", f"data.url={dataset}", *SETTINGS, *SMALL_POSE, "train.epochs=3", "train.checkpoint_every=1"]
    start += ["train.learning_rate=1e-12", "train.val_batches=1"]
    whole = keys_of(tmp_path / "whole", [1, [*start, "train.batch_size=4"], None])
    steps = len(whole) // 3
    assert steps >= 3 and sorted(whole) == list(range(3 * steps))
    assert len({key for step in range(steps) for key, _ in whole[step]}) == 4 * steps
    parts = [
        [4, [*start, "train.batch_size=1"], 2],
        [2, ["train.batch_size=2"], steps + 1],
        [1, ["train.batch_size=2", "train.accumulate=2"], None],
    ]
    assert keys_of(tmp_path / "killed", *parts) == whole
    expected, found = losses(tmp_path / "whole"), losses(tmp_path / "killed")
    assert len({round(loss, 4) for loss in expected}) > steps
    assert found == pytest.approx(expected, rel=1e-5)


def keys_of(run: Path, *parts: list[Any]) -> dict[int, list[list[str]]]:
    """Each step's samples in the order of the ranks, of a run in parts.

    Args:
        parts: ranks, arguments, and the step at which it is killed; None: one rank, in this process, to the end.
    """
    found: dict[int, list[list[str]]] = {}
    for part, (ranks, given, killed_at) in enumerate(parts):
        os.environ["KEYS_FILE"] = f"{run}-keys-{part}"
        arguments = [*given, "--run-dir", str(run)] if part == 0 else ["--resume", str(run), *given]
        if killed_at is None:
            assert ranks_keys.main(arguments) == 0
        else:
            process = torchrun(ranks, str(Path(ranks_keys.__file__)), *arguments)
            try:
                deadline = time.monotonic() + LIMIT
                while not any(step >= killed_at for step, _ in lines_of(f"{run}-keys-{part}.0")):
                    assert process.poll() is None, process.communicate()[0]
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
            finally:
                children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
                for pid in (process.pid, *map(int, children)):
                    os.kill(pid, signal.SIGKILL)
                output = process.communicate()[0]
            assert " samples and now takes " not in output
        of_ranks = [dict(lines_of(f"{run}-keys-{part}.{rank}")) for rank in range(ranks)]
        for step in set.intersection(*map(set, of_ranks)):
            samples = [sample for of_rank in of_ranks for sample in of_rank[step]]
            assert found.setdefault(step, samples) == samples, "a step that is repeated takes other samples"
    return found


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run) if line["kind"] == "train"]


def lines_of(file: str) -> list[tuple[int, list[list[str]]]]:
    if not Path(file).exists():
        return []
    return [(step, samples) for step, samples in map(json.loads, Path(file).read_text().split("\n")[:-1])]


ENDS = """
import os, sys, time
from torch import distributed
from md2.distributed import ranks
from shards.errors import TrainingError

# As under NCCL, where leaving the group waits for all ranks.
distributed.destroy_process_group = lambda: time.sleep(600)
with ranks("cpu") as place:
    if place.rank == 1:
        {end}
    place.barrier()
"""


@pytest.mark.parametrize(
    ("end", "message"),
    [
        ("raise TrainingError('sample 7 cannot be\\x1b decoded')", "md2 (rank 1): sample 7 cannot be\\x1b decoded"),
        ("os.kill(os.getpid(), 9)", "Signal 9"),
    ],
    ids=["raises", "dies"],
)
def test_a_rank_that_ends_says_why_and_ends_the_job(end: str, message: str, tmp_path: Path) -> None:
    script = tmp_path / "ends.py"
    script.write_text(ENDS.format(end=end))
    began = time.monotonic()
    process = torchrun(2, str(script))
    output = finish(process)
    assert process.returncode not in (0, None)
    assert message in output
    assert time.monotonic() - began < 120, "it waits for nobody"


def test_what_a_rank_says_at_its_end(tmp_path: Path) -> None:
    code = "from md2.distributed import _leave; _leave(1, KeyError('lost'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=LIMIT)
    assert (done.returncode, done.stderr) == (1, "md2 (rank 1): KeyError: 'lost'; MD2_DEBUG=1 shows where\n")


@pytest.mark.parametrize(
    ("built", "hidden", "message"),
    [
        ("13.0", None, r"driver 550\.54\.14, but torch \S+, built for CUDA 13\.0, sees no GPU; .* driver 580 or newer"),
        (None, None, r"driver 550\.54\.14, but torch \S+ is built without CUDA"),
        ("13.0", "", None),
        ("13.0", "-1", None),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_not_passed_over(
    built: str | None, hidden: str | None, message: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training would run on the CPU, 500 times slower; a GPU that is hidden on purpose is no such case."""
    driver = tmp_path / "version"
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14  Thu Feb 22 01:44:30 UTC 2024\n")
    monkeypatch.setattr(distributed, "DRIVER", driver)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if hidden is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    with distributed.ranks("cpu") as place:
        assert place.device.type == "cpu"
    if message is None:
        with distributed.ranks("auto") as place:
            assert place.device.type == "cpu"
        return
    with (
        pytest.raises(UsageError, match=message + ".*, or train on the CPU with train.device=cpu$"),
        distributed.ranks("auto"),
    ):
        pass
    driver.unlink()
    with distributed.ranks("auto") as place:
        assert place.device.type == "cpu"


def test_the_dataset_is_opened_before_the_ranks_wait_for_one_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def ranks(setting: str) -> None:
        seen.append("ranks")
        raise KeyboardInterrupt

    for module in ("md2.train.open_dataset", "md2.train._check_dataset"):
        monkeypatch.setattr(module, lambda *arguments, module=module: seen.append(module))
    monkeypatch.setattr(distributed, "ranks", ranks)
    with pytest.raises(KeyboardInterrupt):
        start_run(load_config("mono"), tmp_path / "run", Silent())
    assert seen == ["md2.train.open_dataset", "ranks"]
    (tmp_path / "config.yaml").write_text(load_config("mono").to_yaml())
    with pytest.raises(KeyboardInterrupt):
        resume_run(tmp_path, [], Silent())
    assert seen[2:] == ["md2.train.open_dataset", "md2.train._check_dataset", "ranks"]


def test_a_signal_to_every_process_leaves_a_checkpoint(dataset: Path, tmp_path: Path) -> None:
    """As a scheduler sends it; torchrun then sends its own to the workers, which must not be one too many."""
    run = tmp_path / "run"
    arguments = [NARROW, "cli.main", "train", "stereo", f"data.url={dataset}", *SETTINGS, "train.epochs=1000"]
    process = torchrun(2, *arguments, "--run-dir", str(run))
    try:
        wait_for_metrics(process, run)
        for pid in (*workers(process.pid), process.pid):
            os.kill(pid, signal.SIGTERM)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    output = finish(process)
    assert "resume with: md2 train --resume" in output
    checkpoint = load_checkpoint(run / "checkpoints/last.pt")
    assert checkpoint.step == json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"]


def test_a_signal_ends_ranks_that_wait_for_the_storage_at_once(
    dataset: Path, tmp_path: Path, rclone_bucket: Bucket, rclone_proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The storage falls silent; either rank may be the one that waits for it, the other is then within a step."""
    opened = open_dataset(str(dataset))
    samples = [sample for tar in opened.tars("train") for sample in read_samples(tar)]
    many = [replace(sample, key=f"{sample.key}_{again}") for again in range(40 // len(samples)) for sample in samples]
    kept = ("split", "frames", "stereo", "depth", "size", "codec", "quality", "jpeg", "seed")
    about = {name: getattr(opened.manifest, name) for name in kept}
    manifest = write_dataset(tmp_path / "many", {"train": many}, samples_per_shard=1, **about)
    copy_dataset(str(tmp_path / "many"), rclone_bucket.url)
    limit = 12 * max(shard.bytes + shard.index_bytes for shard in manifest.part("train"))
    monkeypatch.setenv("MD2_CACHE_LIMIT", str(limit))
    monkeypatch.setenv("MD2_STORAGE_PATIENCE", "300")
    run = tmp_path / "run"
    arguments = [NARROW, "md2.train", "mono_stereo", f"data.url={rclone_bucket.url}", *SETTINGS, *SMALL_POSE]
    arguments += ["data.prefetch=1", "train.epochs=1000", "train.checkpoint_every=1000", "--run-dir", str(run)]
    process = torchrun(2, *arguments)
    try:
        wait_for_metrics(process, run)
        rclone_proxy.rule = lambda method, path, number: Fault(silent=True)
        lines, since = -1, time.monotonic()
        while time.monotonic() - since < 3:
            if (now := len((run / "metrics.jsonl").read_text().splitlines())) != lines:
                lines, since = now, time.monotonic()
            time.sleep(0.1)
        began = time.monotonic()
        for pid in (*workers(process.pid), process.pid):
            os.kill(pid, signal.SIGTERM)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    output = finish(process)
    assert time.monotonic() - began < 100  # of 300 that the storage has
    assert output.count("Traceback") <= 1, "torchrun's own"
    assert re.search(r"\nrank [01] stopped after step \d+: it waited for the storage; resume from the last .*", output)


def wait_for_metrics(process: subprocess.Popen[str], run: Path) -> None:
    deadline = time.monotonic() + LIMIT
    while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)


def workers(parent: int) -> list[int]:
    """Child processes of torchrun that train."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [int(pid) for pid in children if b"data.url=" in Path(f"/proc/{pid}/cmdline").read_bytes()]
