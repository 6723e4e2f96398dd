"""What a training step moves on a GPU, counted without one: operations, kernel launches of the loss, bytes.

    md2 bench count
    md2 bench count --mode stereo --batch 12 --append bench/RESULTS.md

The step runs on fake tensors, which have shapes and no numbers, in bfloat16, with the loss's Triton kernels counted
instead of started: once without compiling, and once with the networks compiled, as on a GPU by default. Of compiled
networks TorchInductor's schedule is counted: the kernels that it would generate, and what they read and write.
Bytes are those of every operation's inputs and outputs; views move none, and a cache that saves some is not seen.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.machine import add_append, publish, versions
from bench.step import MODES, Inputs, detached, leaves, md2_loss
from md2.config import DataConfig, LossConfig, ModelConfig
from md2.model import Networks
from md2.networks import decoder
from md2.photometric import kernels, reprojection
from md2.training.amp import gather_pooled_gradients

PARTS = ("networks", "loss and its gradient", "backward", "guard and optimiser")
FREE = ("detach", "empty", "empty_like", "new_empty")
"""Operations that neither compute nor copy."""


class Took(NamedTuple):
    """What a part of a step took; bytes of the whole batch."""

    operations: int
    launches: int
    bytes: int


BEFORE_OF = ("mono", 12, 640, 192)
BEFORE = {
    "networks": Took(341, 0, 7_964_412_160),
    "loss and its gradient": Took(580, 13, 5_736_284_232),
    "backward": Took(275, 0, 8_143_094_656),
    "guard and optimiser": Took(9, 0, 965_874_605),
}
"""The same step at commit 5329342, whose networks were not compiled, with the copies that CUDA's padding makes."""


def size(values: Any) -> int:
    """Bytes of all tensors in a structure."""
    return sum(v.numel() * v.element_size() for v in tree_leaves(values) if isinstance(v, Tensor))


def written(func: Any, args: tuple[Any, ...]) -> list[Any]:
    """Arguments that an operation writes to."""
    pairs = zip(func._schema.arguments, args, strict=False)
    return [value for argument, value in pairs if argument.alias_info is not None and argument.alias_info.is_write]


class Count(TorchDispatchMode):
    """Operations that compute or copy, launches of the loss's kernels, and the bytes of both."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.launches = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "aten" and not func.is_view and func.overloadpacket.__name__ not in FREE:
            self.operations += 1
            self.bytes += size((args, kwargs)) + size(written(func, args) if result is None else result)
        return result

    def launch(self, kernel: Any, maps: Tensor, programs: int, *arguments: Any, **constants: Any) -> None:
        """Take the place of a kernel's start."""
        self.launches += 1
        self.bytes += size(arguments)

    def schedule(self, graph: Any) -> SimpleNamespace:
        """Take the place of TorchInductor's code generation: the graph's kernels are counted, plain operators run."""
        graph.init_wrapper_code()
        graph._update_scheduler()
        from torch._inductor.ir import MultiOutput

        for node in graph.scheduler.nodes:
            part = getattr(node, "node", None)
            if isinstance(part, MultiOutput):  # of a library's result: no kernel of its own, and counted nowhere else
                self.bytes += int(part.get_numel()) * part.get_dtype().itemsize
            elif type(node).__name__ != "NopKernelSchedulerNode":
                self.operations += 1
                self.bytes += node.get_read_write_buffers_sizes()
        run = torch.fx.Interpreter(graph.module).run
        return SimpleNamespace(call=lambda inputs: run(*inputs), __file__="", __name__="", _cache_key="")


def reflect_as_cuda(x: Tensor) -> Tensor:
    """`decoder.reflect` of a CUDA tensor. A CPU's autocast would widen what is padded; CUDA's does not."""
    with torch.autocast("cpu", enabled=False):
        if torch.compiler.is_compiling():
            return nn.functional.pad(x, (1, 1, 1, 1), mode="reflect")
        return decoder.Reflect.apply(x)  # type: ignore[no-any-return, no-untyped-call]


@contextmanager
def as_on_a_gpu(count: Count) -> Iterator[None]:
    """The paths that CUDA tensors take, for fake tensors of the CPU."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(reprojection, "has_kernels", lambda images: True))
        stack.enter_context(patch.object(reprojection, "piece_size", lambda images: tuple(images.shape[:2])))
        stack.enter_context(patch.object(kernels, "_launch", count.launch))
        stack.enter_context(patch.object(decoder, "reflect", reflect_as_cuda))
        yield


@contextmanager
def scheduled(count: Count) -> Iterator[None]:
    """What is compiled inside is scheduled as for a GPU and counted, instead of generated."""
    from torch._inductor import config
    from torch._inductor.graph import GraphLowering

    gather_pooled_gradients()
    try:
        # The lambda becomes a method, which gets the graph.
        replaced = patch.object(GraphLowering, "compile_to_module", lambda graph: count.schedule(graph))  # noqa: PLW0108
        with config.patch(cpu_backend="triton", fx_graph_cache=False), replaced:
            yield
    finally:
        torch._dynamo.reset()


def count_step(mode: str, batch: int, width: int, height: int, *, compiled: bool = False) -> dict[str, Took]:
    """Part of a step -> what it took."""
    frames, stereo = MODES[mode]
    networks: Any = Networks(ModelConfig(), DataConfig(frames=frames, stereo=stereo), LossConfig())
    networks = networks.to(memory_format=torch.channels_last)
    trained = [p for p in networks.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, fused=True)
    counts = {part: Count() for part in PARTS}
    forward, loss, backward, end = counts.values()

    def within(count: Count) -> AbstractContextManager[Any]:
        return scheduled(count) if compiled else count

    with FakeTensorMode(allow_non_fake_inputs=True), as_on_a_gpu(loss):
        inputs = Inputs.make(mode, batch, height, width, torch.device("cpu"))
        images = {o: image.to(memory_format=torch.channels_last) for o, image in inputs.images.items()}
        inputs = Inputs(images, inputs.K, inputs.stereo, inputs.noise)
        with within(forward), torch.autocast("cpu", torch.bfloat16):
            prediction = (torch.compile(networks) if compiled else networks)(images)
        cut = detached(prediction)
        with loss:
            md2_loss(cut, inputs).backward()  # type: ignore[no-untyped-call]
        grads = [
            leaf.grad.to(o.dtype)
            for leaf, o in zip(leaves(cut), leaves(prediction), strict=True)
            if leaf.grad is not None
        ]
        with within(backward):
            torch.autograd.backward(leaves(prediction), grads)
        optimizer.step()  # makes its state
        with end:
            torch.isfinite(torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None], foreach=True))
            optimizer.step()
    return {part: Took(count.operations, count.launches, count.bytes) for part, count in counts.items()}


def table(columns: dict[str, dict[str, Took]], batch: int) -> list[str]:
    """Markdown: parts of a step by state of the code, operations with the loss's launches and MB a sample."""
    for parts in columns.values():
        parts["whole step"] = Took(*map(sum, zip(*parts.values(), strict=True)))
    lines = [f"| part | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    for part in (*PARTS, "whole step"):
        taken = [parts[part] for parts in columns.values()]
        cells = [
            f"{t.operations}{f' + {t.launches}' if t.launches else ''}, {t.bytes / batch / 1e6:.0f} MB" for t in taken
        ]
        lines.append(f"| {part} | {' | '.join(cells)} |")
    return lines


def main(arguments: Sequence[str] | None = None, say: Callable[[Any], None] = print) -> int:
    parser = argparse.ArgumentParser(prog="md2 bench count", description="Count what a training step moves on a GPU.")
    parser.add_argument("--mode", choices=list(MODES), default="mono")
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--height", type=int, default=192)
    add_append(parser)
    options = parser.parse_args(arguments)
    step = (options.mode, options.batch, options.width, options.height)
    columns = {"commit 5329342": dict(BEFORE)} if step == BEFORE_OF else {}
    for name, compiled in (("uncompiled", False), ("compiled (the default)", True)):
        columns[name] = count_step(*step, compiled=compiled)
    lines = [
        f"### Counted: {options.mode}, batch {options.batch}, {options.width}x{options.height}",
        "",
        "`md2 bench count`, bfloat16: operations + launches of the loss's kernels, MB a sample; "
        f"{versions('torch', 'triton')}.",
        "",
        *table(columns, options.batch),
        "",
    ]
    publish("\n".join(lines), options.append, say)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
