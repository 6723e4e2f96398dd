"""What a training step moves on a GPU, counted without one: operations, kernel launches of the loss, bytes.

    md2 bench count
    md2 bench count --mode stereo --batch 12 --append bench/RESULTS.md

The step runs on torch's meta device, whose tensors have shapes and no numbers, uncompiled and in float32, with the
loss's Triton kernels counted instead of started. Bytes are those of every operation's inputs and outputs; views move
none, and a cache that saves some is not seen. The optimiser is one fused launch on a GPU and is left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.machine import add_append, publish, versions
from bench.step import MODES
from md2.config import Config
from md2.data.batch import Batch, Offset
from md2.loss import ReprojectionLoss
from md2.model import Networks
from md2.networks import decoder
from md2.photometric import kernels, reprojection

META = torch.device("meta")


def size(values: Any) -> int:
    """Bytes of all tensors in a structure."""
    return sum(v.numel() * v.element_size() for v in tree_leaves(values) if isinstance(v, Tensor))


class Count(TorchDispatchMode):
    """Operations that compute or copy, launches of the loss's kernels, and the bytes of both."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.launches = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func.overloadpacket.__name__ not in ("detach", "empty", "empty_like", "new_empty"):
            self.operations += 1
            self.bytes += size((args, kwargs)) + size(result)
        return result

    def launch(self, kernel: Any, images: Tensor, *arguments: Tensor, **constants: Any) -> None:
        """Take the place of a kernel's start."""
        self.launches += 1
        self.bytes += size(arguments)


@contextmanager
def as_on_a_gpu(count: Count) -> Iterator[None]:
    """The paths that CUDA tensors take."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(torch, "autocast", lambda *_, **__: nullcontext()))
        stack.enter_context(patch.object(reprojection, "has_kernels", lambda images: True))
        stack.enter_context(patch.object(kernels, "_launch", count.launch))
        stack.enter_context(patch.object(decoder, "reflect", decoder.Reflect.apply))
        yield


def count_step(mode: str, batch: int, width: int, height: int) -> dict[str, Count]:
    """Part of a step -> what it took."""
    frames, stereo = MODES[mode]
    config = Config.model_validate({"data": {"frames": frames, "stereo": stereo, "width": width, "height": height}})
    with META:
        networks: Any = Networks(config.model, config.data, config.loss).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        offsets: list[Offset] = [*frames, *(["s"] if stereo else [])]  # type: ignore[list-item]
        images = {o: torch.empty(batch, 3, height, width).to(memory_format=torch.channels_last) for o in offsets}
        partner = torch.empty(batch, 4, 4) if stereo else None
        inputs = Batch(images, images, torch.empty(batch, 3, 3), partner, 5.4, None, None, [])
        noise = torch.empty(batch, len(offsets) - 1, height, width)
    parts = {part: Count() for part in ("networks", "loss", "backward")}
    loss = ReprojectionLoss(config.loss, config.model)
    with as_on_a_gpu(parts["loss"]):
        with parts["networks"]:
            prediction = networks(images)
        with parts["loss"]:
            total = loss(inputs, prediction, noise=noise).total
        with parts["backward"]:
            total.backward()
    return parts


def main(arguments: Sequence[str] | None = None, say: Callable[[Any], None] = print) -> int:
    parser = argparse.ArgumentParser(prog="md2 bench count", description="Count what a training step moves on a GPU.")
    parser.add_argument("--mode", choices=list(MODES), default="mono")
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--height", type=int, default=192)
    add_append(parser)
    options = parser.parse_args(arguments)
    parts = count_step(options.mode, options.batch, options.width, options.height)
    rows = [(name, one.operations, one.launches, one.bytes) for name, one in parts.items()]
    rows.append(("whole step", *(sum(row[i] for row in rows) for i in (1, 2, 3))))  # type: ignore[arg-type]
    lines = [
        f"### Counted: {options.mode}, batch {options.batch}, {options.width}x{options.height}",
        "",
        f"`md2 bench count`, uncompiled, float32; {versions('torch', 'triton')}.",
        "",
        "| part | operations | kernel launches | MB a sample |",
        "|---|---:|---:|---:|",
        *(f"| {name} | {ops} | {starts} | {moved / options.batch / 1e6:.0f} |" for name, ops, starts, moved in rows),
        "",
    ]
    text = "\n".join(lines)
    publish(text, options.append, say)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
