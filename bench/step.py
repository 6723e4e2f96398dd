"""One training step, part by part, against a straightforward implementation of the same method.

    md2 bench step                                  mono+stereo, batch 4, 640x192, this machine's device
    md2 bench step --mode mono --batch 12 --variants channels_last,bf16,compile --append bench/RESULTS.md

The baseline (reference.py) computes the unwarped sources' error at every scale, SSIM by five average pools per pair
of images, and sends each pair of frames through the pose network by itself. First both are checked to give the
same loss and gradients (float64, batch norm frozen, since md2 normalises all pairs together); then they run in turn,
round by round, and the table gives medians and the median of the rounds' ratios. Peak memory of the loss is
what the process grows by in a process of its own (on a GPU: what the allocator says).
"""

from __future__ import annotations

import argparse
import copy
import gc
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from bench import reference  # noqa: E402
from bench.machine import add_append, busy, processor, publish, versions  # noqa: E402
from md2.config import DataConfig, LossConfig, ModelConfig  # noqa: E402
from md2.data.batch import Offset  # noqa: E402
from md2.loss import image_pyramid, reprojection_loss  # noqa: E402
from md2.model import Networks, Pose, Prediction  # noqa: E402
from md2.training.amp import AmpSettings  # noqa: E402
from shards.errors import UsageError  # noqa: E402

MODES: dict[str, tuple[list[int], bool]] = {
    "mono": ([0, -1, 1], False),
    "stereo": ([0], True),
    "mono+stereo": ([0, -1, 1], True),
}
PARTS = ("forward", "loss", "backward", "optimiser")
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Inputs:
    """A batch of smooth random images and a plausible camera."""

    images: dict[Offset, Tensor]
    K: Tensor
    stereo: Tensor | None
    noise: Tensor

    @classmethod
    def make(
        cls, mode: str, batch: int, height: int, width: int, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> Inputs:
        frames, stereo = MODES[mode]
        torch.manual_seed(0)
        offsets: list[Offset] = [*frames, "s"] if stereo else [*frames]
        sources = len(offsets) - 1

        def image() -> Tensor:
            coarse = torch.rand(batch, 3, max(height // 8, 2), max(width // 8, 2), dtype=dtype)
            return (0.9 * F.interpolate(coarse, (height, width), mode="bilinear") + 0.1 * torch.rand(1)).to(device)

        K = torch.tensor([[0.58 * width, 0, 0.5 * width], [0, 1.92 * height, 0.5 * height], [0, 0, 1]], dtype=dtype)
        partner = torch.eye(4, dtype=dtype)
        partner[0, 3] = -0.1
        return cls(
            {offset: image() for offset in offsets},
            K.expand(batch, 3, 3).to(device),
            partner.expand(batch, 4, 4).to(device) if stereo else None,
            torch.randn(batch, sources, height, width, dtype=dtype).to(device),
        )


def md2_loss(prediction: Prediction, inputs: Inputs) -> Tensor:
    """The loss of the package, as training calls it."""
    pyramids = image_pyramid(inputs.images, prediction.disparities)
    return reprojection_loss(prediction, pyramids, inputs.K, inputs.stereo, LossConfig(), noise=inputs.noise).total


def reference_loss(prediction: Prediction, inputs: Inputs) -> Tensor:
    """The loss of the baseline."""
    pyramids = image_pyramid(inputs.images, prediction.disparities)
    return reference.loss(prediction, pyramids, inputs.K, inputs.stereo, inputs.noise)


def leaves(prediction: Prediction) -> list[Tensor]:
    """What the loss is differentiated by."""
    motions = [t for pose in prediction.poses.values() for t in (pose.axis_angle, pose.translation)]
    return [*prediction.disparities.values(), *motions]


def detached(prediction: Prediction) -> Prediction:
    """The same values, cut off from the networks, in float32 (or float64)."""

    def cut(t: Tensor) -> Tensor:
        return (t if t.dtype == torch.float64 else t.float()).detach().requires_grad_()

    poses = {o: Pose(cut(p.axis_angle), cut(p.translation), p.invert) for o, p in prediction.poses.items()}
    return Prediction({s: cut(d) for s, d in prediction.disparities.items()}, poses)


class Contender:
    """A network, an optimiser and a way to take a step.

    The loss part is its value and its gradient by the networks' outputs; backward is the networks' share.
    """

    def __init__(self, networks: Networks, inputs: Inputs, amp: AmpSettings, baseline: bool) -> None:
        self.device = amp.device
        self.amp, self.inputs, self.baseline = amp, inputs, baseline
        self.networks = amp.prepare(copy.deepcopy(networks)).train()
        self.model = amp.compiled(self.networks)
        trainable = [p for p in self.networks.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(trainable, lr=1e-6, fused=self.device.type == "cuda")
        self.seen = amp.inputs(inputs.images)

    def step(self) -> dict[str, float]:
        """Seconds of each part, and of the whole."""
        marks = [self._now()]
        with self.amp.autocast():
            prediction = reference.predict(self.networks, self.seen) if self.baseline else self.model(self.seen)
        marks.append(self._now())
        cut = detached(prediction)
        (reference_loss if self.baseline else md2_loss)(cut, self.inputs).backward()  # type: ignore[no-untyped-call]
        marks.append(self._now())
        outputs = leaves(prediction)
        grads = [leaf.grad.to(o.dtype) for leaf, o in zip(leaves(cut), outputs, strict=True) if leaf.grad is not None]
        torch.autograd.backward(outputs, grads)
        marks.append(self._now())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        marks.append(self._now())
        parts = {part: b - a for part, a, b in zip(PARTS, marks, marks[1:], strict=False)}
        return {**parts, "whole step": marks[-1] - marks[0]}

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def amp_of(variant: str, device: torch.device) -> AmpSettings:
    """A variant's name -> its amp; all but `contiguous` are channels_last too."""
    known = {"contiguous", "channels_last", "bf16", "compile", "bf16+compile"}
    if variant not in known:
        raise UsageError(f"unknown variant {variant!r}: one of {', '.join(sorted(known))}")
    dtype = torch.bfloat16 if "bf16" in variant else None
    return AmpSettings(device, dtype, variant != "contiguous", "compile" in variant)


def check(mode: str) -> tuple[float, float]:
    """Largest relative difference of loss and of any parameter's gradient to the baseline's, float64.

    Raises:
        SystemExit: above 1e-5.
    """
    inputs = Inputs.make(mode, 2, 64, 96, torch.device("cpu"), torch.float64)
    frames, stereo = MODES[mode]
    torch.manual_seed(0)
    data = DataConfig(frames=frames, stereo=stereo)
    ours = Networks(ModelConfig(), data, LossConfig()).double().eval()
    theirs = copy.deepcopy(ours)
    loss, expected = (
        md2_loss(ours(inputs.images), inputs),
        reference_loss(reference.predict(theirs, inputs.images), inputs),
    )
    for value in (loss, expected):
        value.backward()  # type: ignore[no-untyped-call]
    difference = abs(loss.item() / expected.item() - 1)
    pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
    grads = [(a.grad, b.grad) for a, b in pairs if a.grad is not None and b.grad is not None]
    worst = max(((a - b).norm() / b.norm().clamp(min=1e-300)).item() for a, b in grads)
    if max(difference, worst) > TOLERANCE:
        raise SystemExit(f"not the same method: loss differs by {difference:.1e}, gradients by {worst:.1e}")
    return difference, worst


def loss_memory(options: argparse.Namespace, device: torch.device, baseline: bool) -> float:
    """MiB that value and gradient of the loss take at their peak, beyond their inputs and outputs' start."""
    if device.type == "cuda":
        return _grown(options, device, baseline)
    command = [sys.executable, __file__, "--memory-of", "baseline" if baseline else "md2", "--mode", options.mode]
    command += ["--batch", str(options.batch), "--width", str(options.width), "--height", str(options.height)]
    command += ["--device", "cpu", "--threads", str(options.threads)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def _grown(options: argparse.Namespace, device: torch.device, baseline: bool) -> float:
    inputs = Inputs.make(options.mode, options.batch, options.height, options.width, device)
    disparities = {
        s: torch.rand(options.batch, 1, options.height >> s, options.width >> s, device=device)
        .mul_(0.2)
        .requires_grad_()
        for s in range(4)
    }
    zeros = torch.zeros(options.batch, 3, device=device)
    poses: dict[Offset, Pose] = {
        o: Pose((zeros + 1e-3).requires_grad_(), (zeros + 1e-2).requires_grad_(), o < 0)
        for o in MODES[options.mode][0][1:]
    }
    prediction = Prediction(disparities, poses)
    loss = reference_loss if baseline else md2_loss
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        loss(prediction, inputs).backward()  # type: ignore[no-untyped-call]
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    small = Inputs.make(options.mode, 1, 64, 96, device)
    few = {s: torch.rand(1, 1, 64 >> s, 96 >> s).requires_grad_() for s in range(4)}
    warm = {o: Pose(torch.zeros(1, 3), torch.zeros(1, 3), p.invert) for o, p in poses.items()}
    loss(Prediction(few, warm), small).backward()  # type: ignore[no-untyped-call]  # libraries and thread pools
    resident = _status("VmRSS")
    loss(prediction, inputs).backward()  # type: ignore[no-untyped-call]
    return (_status("VmHWM") - resident) / 1024


def _status(field: str) -> float:
    """KiB, from Linux's account of this process."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise SystemExit("peak memory is read from /proc/self/status, which this system does not have")
    return float(found.group(1))


def report(rounds: dict[str, list[dict[str, float]]], memory: dict[str, float], batch: int) -> str:
    """Markdown table: medians per part and the median over rounds of baseline / contender."""
    names = list(rounds)
    lines = [f"| part | {' | '.join(names)} |", f"|---|{'---:|' * len(names)}"]
    for part in (*PARTS, "whole step"):
        cells = []
        for name in names:
            seconds = statistics.median(r[part] for r in rounds[name])
            ratio = statistics.median(b[part] / r[part] for b, r in zip(rounds["baseline"], rounds[name], strict=True))
            cells.append(f"{1000 * seconds:.1f} ms" + ("" if name == "baseline" else f" ({ratio:.2f}x)"))
        lines.append(f"| {part} | {' | '.join(cells)} |")
    speeds = [f"{batch / statistics.median(r['whole step'] for r in rounds[name]):.1f}" for name in names]
    lines.append(f"| samples/s | {' | '.join(speeds)} |")
    used = [f"{memory['baseline' if n == 'baseline' else 'md2']:.0f} MiB" for n in names]
    lines.append(f"| loss, peak memory | {' | '.join(used)} |")
    return "\n".join(lines)


def machine(device: torch.device, threads: int) -> str:
    """Hardware and versions, one line."""
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{processor()}, {threads} threads"
    return f"{hardware}, {busy()}; {versions('torch', 'triton')}"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure one training step against the straightforward baseline.")
    parser.add_argument("--mode", choices=list(MODES), default="mono+stereo")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--height", type=int, default=192)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--variants", default="channels_last", help="comma-separated: contiguous, bf16, compile ...")
    add_append(parser)
    parser.add_argument("--memory-of", choices=["baseline", "md2"], help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace, device: torch.device) -> dict[str, list[dict[str, float]]]:
    """Rounds of all contenders in turn; the first two rounds warm up and are dropped."""
    frames, stereo = MODES[options.mode]
    torch.manual_seed(0)
    networks = Networks(ModelConfig(), DataConfig(frames=frames, stereo=stereo), LossConfig()).to(device)
    inputs = Inputs.make(options.mode, options.batch, options.height, options.width, device)
    plain = AmpSettings(device, None, False, False)
    contenders = {"baseline": Contender(networks, inputs, plain, baseline=True)}
    for variant in options.variants.split(","):
        contenders[f"md2 {variant}"] = Contender(networks, inputs, amp_of(variant, device), baseline=False)
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for index in range(options.repeats + 2):
        for name, contender in contenders.items():
            seconds = contender.step()
            if index >= 2:
                rounds[name].append(seconds)
    return rounds


def main(arguments: Sequence[str] | None = None, say: Callable[[Any], None] = print) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    name = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    device = torch.device(name)
    if options.memory_of:
        say(_grown(options, device, options.memory_of == "baseline"))
        return 0
    difference, worst = check(options.mode)
    rounds = measure(options, device)
    memory = {name: loss_memory(options, device, name == "baseline") for name in ("baseline", "md2")}
    given = shlex.join(sys.argv[1:] if arguments is None else arguments)
    text = "\n".join(
        [
            f"### Step: {options.mode}, batch {options.batch}, {options.width}x{options.height}",
            "",
            f"`md2 bench step {given}`".replace(" `", "`"),
            f"on {machine(device, options.threads)}; medians of {options.repeats} rounds.",
            f"Same method: loss differs by {difference:.0e}, gradients by at most {worst:.0e} (float64).",
            "",
            report(rounds, memory, options.batch),
            "",
        ]
    )
    publish(text, options.append, say)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
