"""The sections of `bench.gpu`: each takes what there is to measure and writes into its record."""

from __future__ import annotations

import argparse
import shutil
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import Tensor

from bench import step
from bench.gpu_record import Cell, Record, Setup
from md2.checkpoint import load_latest
from md2.config import Config, DataConfig, LossConfig
from md2.data.batch import Batch, Offset
from md2.distributed import Ranks
from md2.loss import LossOutput, image_pyramid, reprojection_loss
from md2.model import Pose, Prediction
from md2.photometric import reprojection
from md2.training.runlog import read_metrics
from shards.dataset import LocalDataset

if TYPE_CHECKING:
    from md2.pipeline import Loader

# md2.pipeline and md2.training.trainer are imported where they are used: kernels and baseline run without DALI.

ZHOU_SAMPLES, PAPER_EPOCHS = 39_810, 20
AIM_TRIPLETS, AIM_WAIT = 1500, 0.05
ENGINE_SHARES = (0.5, 0.65, 0.9)
CPU = torch.device("cpu")
UNCOMPRESSED = "nowhere (ppm)"
"""In place of what decodes: the uncompressed dataset."""


# --- the loss


def engine(kernels: bool) -> AbstractContextManager[Any]:
    """The loss by Triton's kernels or by plain operators, whatever the device is."""
    stack = ExitStack()
    stack.enter_context(patch.object(reprojection, "has_kernels", lambda images: kernels))
    if kernels:
        # The kernels take the whole batch; plain operators on a CPU an image at a time.
        stack.enter_context(patch.object(reprojection, "piece_size", lambda images: tuple(images.shape[:2])))
    return stack


def scene(setup: Setup, batch: int, device: torch.device, dtype: torch.dtype) -> tuple[Prediction, step.Inputs]:
    """Smooth images, disparities and small motions: the same numbers on every device and in every precision."""
    width, height = (32, 16) if setup.tiny else setup.size
    inputs = step.Inputs.make("mono+stereo", batch, height, width, CPU, torch.float64)
    torch.manual_seed(1)

    def there(values: Tensor) -> Tensor:
        return values.to(device, dtype).requires_grad_()

    coarse = torch.rand(batch, 1, 4, 8, dtype=torch.float64)
    sizes = {scale: (height >> scale, width >> scale) for scale in range(4)}
    resized = {s: torch.nn.functional.interpolate(coarse, size, mode="bilinear") for s, size in sizes.items()}
    disparities = {scale: there(0.02 + 0.15 * values) for scale, values in resized.items()}
    poses: dict[Offset, Pose] = {
        offset: Pose(
            there(0.01 * torch.randn(batch, 3, dtype=torch.float64)),
            there(0.05 * torch.randn(batch, 3, dtype=torch.float64)),
            offset < 0,
        )
        for offset in (-1, 1)
    }
    moved = {offset: image.to(device, dtype) for offset, image in inputs.images.items()}
    assert inputs.stereo is not None
    rest = [values.to(device, dtype) for values in (inputs.K, inputs.stereo, inputs.noise)]
    return Prediction(disparities, poses), step.Inputs(moved, *rest)


def loss_of(prediction: Prediction, inputs: step.Inputs, panels: bool = False) -> LossOutput:
    pyramids = image_pyramid(inputs.images, prediction.disparities)
    return reprojection_loss(
        prediction, pyramids, inputs.K, inputs.stereo, LossConfig(), noise=inputs.noise, panels=panels
    )


def kernels(setup: Setup, record: Record) -> None:
    """Kernels and plain operators in float32 against plain operators in float64."""
    if find_spec("triton") is None:
        raise RuntimeError("Triton is not installed")
    batch = 1 if setup.tiny else 4
    results = {}
    for name, device, dtype, triton in (
        ("float64", CPU, torch.float64, False),
        ("plain operators", setup.device, torch.float32, False),
        ("kernels", setup.device, torch.float32, True),
    ):
        prediction, inputs = scene(setup, batch, device, dtype)
        with engine(triton):
            output = loss_of(prediction, inputs, panels=True)
            output.total.backward()  # type: ignore[no-untyped-call]
        grads = [leaf.grad.cpu().double() for leaf in step.leaves(prediction) if leaf.grad is not None]
        warped = torch.stack(list(output.panels[0].warped.values())).cpu().double()
        results[name] = (output.total.item(), warped, grads)
    rows = record.table("Difference to float64 on the CPU; gradients relative to their root mean square")
    loss, warped, grads = results.pop("float64")
    found: dict[str, list[float]] = {}
    for name, (value, image, own) in results.items():
        apart = [((a - b) / b.square().mean().sqrt()).abs() for a, b in zip(own, grads, strict=True)]
        found[name] = [abs(value / loss - 1), (image - warped).abs().max().item()]
        found[name] += [max(a.square().mean().sqrt().item() for a in apart), apart[0].median().item()]
        columns = ("", "loss", "warped images", "gradients", "gradient by disparity 0, median")
        rows.append(dict(zip(columns, (name, *found[name]), strict=True)))
    ours, plain = found["kernels"], found["plain operators"]
    # Some pixels have another winner, or neighbour in the grid, by rounding: hence also the median.
    limit = 2 * plain[3] + 1e-5
    record.check(
        "the kernels' median gradient is as near as plain float32's", ours[3] < limit, f"{ours[3]:.1e} < {limit:.1e}"
    )
    record.check("the kernels' loss is float64's", ours[0] < 1e-5, f"{ours[0]:.1e} < 1e-5")
    record.check("their warped images are", ours[1] < 2e-3, f"{ours[1]:.1e} < 2e-3 (float32 coordinates)")
    limit = 2 * plain[2] + 1e-4
    record.check(
        "all gradients together are as near as plain float32's", ours[2] < limit, f"{ours[2]:.1e} < {limit:.1e}"
    )
    time_loss(setup, record)


def time_loss(setup: Setup, record: Record) -> None:
    rows = record.table("Value and gradient of the loss, mono+stereo")
    if setup.device.type == "cpu":
        record.notes.append("The kernels ran in Triton's interpreter: their time says nothing and is left out.")
    for batch in setup.batches:
        for name, triton in (("plain operators", False), ("kernels", True)):
            if triton and setup.device.type == "cpu":
                continue
            prediction, inputs = scene(setup, batch, setup.device, torch.float32)
            setup.reset_memory()

            def once(prediction: Prediction = prediction, inputs: step.Inputs = inputs) -> None:
                loss_of(prediction, inputs).total.backward()  # type: ignore[no-untyped-call]

            with engine(triton):
                seconds, _ = timed(setup, once)
            rows.append({"batch": batch, "": name, "ms": 1000 * seconds, "peak, MiB": setup.peak_memory()})


def timed(setup: Setup, work: Callable[[], Any]) -> tuple[float, int]:
    """Seconds that `work` takes, warm, and how often it ran."""
    for _ in range(setup.warm):
        work()
    setup.synchronize()
    count, begin = 0, time.perf_counter()
    while count < 2 or time.perf_counter() - begin < setup.seconds:
        work()
        count += 1
        if count % 10 == 0:
            setup.synchronize()  # launches run ahead of the device
    setup.synchronize()
    return (time.perf_counter() - begin) / count, count


# --- the loader


def make_loader(
    setup: Setup, batch: int, device: torch.device, *, decode: str = "auto", train: bool = True, **more: Any
) -> Loader:
    from md2.pipeline import Loader

    stereo = more.pop("stereo", False)
    width, height = setup.size
    dataset, decode = (setup.uncompressed, "cpu") if decode == UNCOMPRESSED else (setup.dataset, decode)
    config = DataConfig(width=width, height=height, stereo=stereo, device=decode, threads=setup.threads)
    return Loader(dataset, "train", config, batch_size=batch, seed=0, train=train, device=device, **more)


def endless(loader: Loader) -> Iterator[Batch]:
    while True:
        yield from loader


def host_loader(setup: Setup, batch: int, decoder: str, **more: Any) -> Loader:
    """All on the CPU, from the dataset that goes with `decoder`."""
    return make_loader(setup, batch, CPU, decode=decoder if decoder == UNCOMPRESSED else "cpu", **more)


def decoders(setup: Setup) -> list[str]:
    return [*(["gpu"] if setup.device.type == "cuda" else []), "cpu", UNCOMPRESSED]


def decode(setup: Setup, record: Record) -> None:
    """The same batches, decoded on the CPU and sent to the device, or decoded on the device."""
    batch, count = setup.batches[0], 2 if setup.tiny else 8
    rows = record.table("Images decoded there, beside the CPU's, in levels of 255")
    for decoder in decoders(setup):
        there = iter(make_loader(setup, batch, setup.device, decode=decoder, stereo=True))
        here = iter(host_loader(setup, batch, decoder, stereo=True))
        largest = total = pixels = same = 0.0
        jitter = 0.0
        for _ in range(count):
            a, b = next(there), next(here)
            if a.keys != b.keys:
                raise RuntimeError(f"other samples: {a.keys[0]} and not {b.keys[0]}")
            torch.testing.assert_close(a.intrinsics.cpu(), b.intrinsics)
            assert a.stereo is not None and b.stereo is not None
            torch.testing.assert_close(a.stereo.cpu(), b.stereo)
            for offset, image in b.images.items():
                apart = 255 * (a.images[offset].cpu() - image).abs()
                largest, total = max(largest, apart.max().item()), total + apart.double().sum().item()
                pixels, same = pixels + apart.numel(), same + (apart < 0.5).sum().item()
                seen = 255 * (a.augmented[offset].cpu() - b.augmented[offset]).abs()
                jitter = max(jitter, seen.mean().item())
        mean = total / pixels
        where = f"{decoder}, batches on {setup.device.type}"
        rows.append(
            {"decoded on": where, "largest": largest, "mean": mean, "equal, %": 100 * same / pixels, "jittered": jitter}
        )
        limit = 8.0 if decoder == "gpu" else 0.01
        record.check(f"decoded on {where}: largest difference", largest < limit, f"{largest:.2f} < {limit} levels")
        record.check(f"decoded on {where}: mean difference", mean < limit / 16, f"{mean:.4f} < {limit / 16:.4f} levels")
    record.notes.append(f"Keys, flips (by camera and baseline sign) and order are equal over {count} batches.")


def loader(setup: Setup, record: Record) -> None:
    """Batches alone, with flips and jitter."""
    from md2.data import dali

    rows = record.table("The loader alone, with flips and colour jitter")
    for stereo in (False, True):
        for batch in setup.batches:
            for decoder in decoders(setup):
                rate = loader_rate(setup, batch, decoder, stereo)
                mode = "mono+stereo" if stereo else "mono"
                rows.append({"mode": mode, "batch": batch, "decoded on": decoder, "samples/s": rate})
    if setup.device.type == "cuda":
        rows = record.table(f"Decoded on the GPU, by the share that its JPEG engines take (md2: {dali.JPEG_ENGINES})")
        for share in ENGINE_SHARES:
            with patch.object(dali, "JPEG_ENGINES", share):
                rate = loader_rate(setup, setup.batches[-1], "gpu", stereo=False)
            rows.append({"mode": "mono", "batch": setup.batches[-1], "share": share, "samples/s": rate})


def loader_rate(setup: Setup, batch: int, decoder: str, stereo: bool) -> float:
    """Samples/s of a loader whose batches nobody uses."""
    from md2.pipeline import SAMPLES_AHEAD

    setup.reset_memory()
    batches = endless(make_loader(setup, batch, setup.device, decode=decoder, stereo=stereo))
    for _ in range(4 * SAMPLES_AHEAD // batch if not setup.tiny else 1):
        next(batches)  # what was prepared while nothing was timed
    seconds, _ = timed(setup, lambda: next(batches))
    return batch / seconds


# --- training


class Clock:
    """A reporter that stops the time between two steps, when the device has done them."""

    def __init__(self, setup: Setup, begin: int) -> None:
        self.setup, self.first = setup, begin
        self.last = self.seconds = 0.0
        self.total = 0

    def start(self, total: int, done: int) -> None:
        self.total = total

    def step(self, step: int, epoch: int, loss: float | None, images_per_second: float) -> None:
        if step == self.first:
            self.setup.synchronize()
            self.last = time.perf_counter()
        if step == self.total:
            self.setup.synchronize()
            self.seconds = time.perf_counter() - self.last

    def message(self, text: str) -> None:
        print(text, flush=True)


def make_config(setup: Setup, batch: int, **train: Any) -> Config:
    width, height = setup.size
    return Config.model_validate(
        {
            "data": {"width": width, "height": height, "threads": setup.threads},
            "model": {"weights": "scratch"},
            "train": {"batch_size": batch, "epochs": 1, "log_every": 2 if setup.tiny else 50, **train},
        }
    )


def switches(variant: str) -> dict[str, Any]:
    """A variant's name as keys of the section `train`."""
    precision, _, other = variant.partition("+")
    compiled = {"compile": True, "no search": True, "graphs": "graphs"}.get(other, False)
    return {
        "precision": precision,
        "compile": compiled,
        "channels_last": other != "contiguous",
        "cudnn_benchmark": other != "no search",
    }


def step_alone(setup: Setup, batch: int, variant: str) -> tuple[float, float, float | None]:
    """Triplets/s of training steps on one batch that stays where it is, its loss after the warm ones, and MiB."""
    from md2.training.trainer import Trainer

    run = setup.folder / "step"
    shutil.rmtree(run, ignore_errors=True)
    config = make_config(setup, batch, **switches(variant))
    trainer = Trainer(config, setup.dataset, run, Ranks(0, 1, setup.device), Clock(setup, 0))
    trainer.model.train()
    group = [next(iter(trainer.loader))]
    setup.reset_memory()
    losses = [trainer._step(group)[1].total.item() for _ in range(setup.warm)]
    seconds, _ = timed(setup, lambda: trainer._step(group))
    return batch / seconds, losses[-1], setup.peak_memory()


def steps(setup: Setup, record: Record) -> None:
    """Each variant by batch size; one that fails is a failed check, and the others go on."""
    rows = record.table("Training steps on a batch that is there: forward, loss, backward, guard, optimiser; mono")
    for batch in setup.batches:
        first: float | None = None
        for variant in setup.variants:
            try:
                rate, loss, memory = step_alone(setup, batch, variant)
            except Exception as error:
                told = str(error).strip().splitlines() or ["no message"]
                record.check(f"{variant}, batch {batch}", False, f"{type(error).__name__}: {told[0]}")
                record.notes.append(f"{variant}, batch {batch}:\n\n```\n{traceback.format_exc()}```")
                continue
            first = loss if first is None else first
            rows.append(
                {"batch": batch, "": variant, "triplets/s": rate, "peak, MiB": memory, f"loss, step {setup.warm}": loss}
            )
            apart = abs(loss / first - 1)
            record.check(f"{variant}, batch {batch}: float32's loss", apart < 0.03, f"{100 * apart:.2f} % < 3 %")


def training(setup: Setup, record: Record) -> None:
    """`md2 train` as it is, by batch size, from compressed and from uncompressed shards."""
    rows = record.table("Training end to end, mono, flips and colour jitter, the defaults of this device")
    on_gpu = setup.device.type == "cuda"
    for batch in setup.batches:
        alone, _, _ = step_alone(setup, batch, "bf16+compile" if on_gpu else "float32")
        for dataset, ahead in ((setup.dataset, on_gpu), (setup.dataset, not on_gpu), (setup.uncompressed, on_gpu)):
            rate, figures = train_once(setup, batch, dataset, ahead)
            beyond = max(0.0, 1 - rate / alone)
            codec = dataset.manifest.codec
            minutes = PAPER_EPOCHS * (ZHOU_SAMPLES // batch * batch) / rate / 60
            rows.append(
                {"batch": batch, "shards": codec, "data.ahead": ahead, "triplets/s": rate, "step alone": alone}
                | {"share beyond the step, %": 100 * beyond, **figures, "20 epochs of eigen_zhou, min": minutes}
            )
            if on_gpu and ahead:
                # The host's time in the loader, too, is at least the device's wait for it: the loader's own work on the
                # device makes a step longer than the step alone without any data being late.
                waits = min(beyond, float(figures["host in the loader, %"] or 0) / 100)
                record.check(f"batch {batch}, {codec}: waits for data", waits < AIM_WAIT, f"{100 * waits:.1f} % < 5 %")
    if on_gpu:
        best = max(float(row["triplets/s"] or 0) for row in rows)
        record.check("triplets/s (aimed at on an H200)", best >= AIM_TRIPLETS, f"{best:.0f} >= {AIM_TRIPLETS}")


def train_once(setup: Setup, batch: int, dataset: LocalDataset, ahead: bool) -> tuple[float, dict[str, Cell]]:
    """Triplets/s of a run after its warm steps; what it waited for and took."""
    from md2.training.trainer import Trainer

    most = min(setup.most_steps, dataset.manifest.samples("train") // batch - 1)
    run = setup.folder / "train"
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir()
    clock = Clock(setup, setup.warm)
    setup.reset_memory()
    config = make_config(setup, batch, max_steps=most)
    config = config.model_copy(update={"data": config.data.model_copy(update={"ahead": ahead})})
    Trainer(config, dataset, run, Ranks(0, 1, setup.device), clock).fit()
    lines = [line for line in read_metrics(run) if line["kind"] == "train" and line["step"] > setup.warm]
    waited = sum(line["data_wait"] for line in lines) / len(lines)
    return (most - setup.warm) * batch / clock.seconds, {
        "host in the loader, %": 100 * waited,
        "peak, MiB": setup.peak_memory(),
        "in use with DALI, MiB": setup.device_memory(),
    }


def resume(setup: Setup, record: Record) -> None:
    """What was saved on the CPU goes on on the device, and the other way."""
    from md2.training.trainer import Trainer

    batch = setup.batches[0]
    rows = record.table("A loader's state of the CPU, gone on with")
    for decoder in decoders(setup):
        here = host_loader(setup, batch, decoder)
        for _ in range(3):
            next(iter(here))
        there = make_loader(setup, batch, setup.device, decode=decoder, state=here.state())
        pairs = [(next(iter(here)), next(iter(there))) for _ in range(3)]
        same = all(a.keys == b.keys and torch.equal(a.intrinsics, b.intrinsics.cpu()) for a, b in pairs)
        back = host_loader(setup, batch, decoder, state=there.state())
        again = next(iter(back)).keys == next(iter(here)).keys
        rows.append({"decoded on": decoder, "device": setup.device.type, "the same samples": same, "and back": again})
        record.check(f"loader, decoded on {decoder}", same and again, "three batches there, one back")
    run = setup.folder / "resume"
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir()
    config = make_config(setup, min(batch, 4), max_steps=2, precision="float32")
    Trainer(config, setup.dataset, run, Ranks(0, 1, CPU), Clock(setup, 0)).fit()
    checkpoint, _ = load_latest(run)
    losses = {}
    for device in (CPU, setup.device):
        trainer = Trainer(config, setup.dataset, run, Ranks(0, 1, device), Clock(setup, 0), resume=checkpoint)
        trainer.model.train()
        batches = iter(trainer.loader)
        losses[device.type] = [trainer._step([next(batches)])[1].total.item() for _ in range(2)]
    a, b = losses["cpu"], losses[setup.device.type]
    apart = max(abs(x / y - 1) for x, y in zip(a, b, strict=True))
    rows = record.table("A run's checkpoint of the CPU after two steps: loss of the next two")
    rows += [{"device": device, "first": values[0], "second": values[1]} for device, values in losses.items()]
    record.check("the run goes on with the same losses", apart < 0.01, f"{100 * apart:.2f} % < 1 %")


def baseline(setup: Setup, record: Record) -> None:
    """bench.step: parts of the step against the straightforward implementation."""
    width, height = setup.size
    for mode in ("mono", "mono+stereo"):
        difference, worst = step.check(mode)
        record.check(
            f"{mode}: the same method", max(difference, worst) < step.TOLERANCE, f"{worst:.0e} < 1e-5 (float64)"
        )
        words = ["--mode", mode, "--batch", str(setup.batches[0]), "--width", str(width), "--height", str(height)]
        words += ["--device", setup.device.type, "--repeats", "1" if setup.tiny else "10"]
        words += ["--variants", "contiguous" if setup.tiny else "contiguous,channels_last,bf16"]
        options: argparse.Namespace = step.parse(words)
        rounds = step.measure(options, setup.device)
        memory = {name: step.loss_memory(options, setup.device, name == "baseline") for name in ("baseline", "md2")}
        record.notes.append(f"{mode}, batch {options.batch}\n\n{step.report(rounds, memory, options.batch)}")


SECTIONS = {
    "kernels": kernels,
    "decode": decode,
    "step": steps,
    "training": training,
    "loader": loader,
    "resume": resume,
    "baseline": baseline,
}
"""In the order in which they run: what is asked for first comes first, should the time run out."""
