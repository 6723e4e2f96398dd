"""A whole training step (forward, loss, backward, optimiser) as one CUDA graph: one launch instead of a thousand.

With small batches a GPU waits for the host to launch its kernels. `train.compile=graphs` records them once and replays
them. What is recorded reads the memory that it was recorded with, so each batch is copied into the same tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

import torch

from md2.config import TrainConfig
from md2.data.batch import Batch
from shards.errors import first_line

WARM_STEPS = 3
"""Steps that run plainly first: they compile, choose convolutions and make the optimiser's state."""

Result = TypeVar("Result")


class Recorder(Protocol):
    """Records work once, and repeats it."""

    def warm(self, work: Callable[[], Any]) -> Any:
        """Do work that will be recorded later."""

    def record(self, work: Callable[[], Any]) -> None:
        """Record work without doing it."""

    def replay(self) -> Any:
        """Do the recorded work and return its result, whose memory the next replay fills again."""


class CudaGraph:
    """A CUDA graph, recorded on a stream of its own, on which the work has been done before."""

    def __init__(self) -> None:
        torch.cuda.synchronize()  # the memory of an earlier recording is let go of next
        self.graph, self.stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self.result: Any = None

    def warm(self, work: Callable[[], Any]) -> Any:
        """As `Recorder.warm`."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            result = work()
        torch.cuda.current_stream().wait_stream(self.stream)
        return result

    def record(self, work: Callable[[], Any]) -> None:
        """As `Recorder.record`."""
        with torch.cuda.graph(self.graph, stream=self.stream):
            self.result = work()

    def replay(self) -> Any:
        """As `Recorder.replay`."""
        self.graph.replay()
        return self.result


class StepGraph(Generic[Result]):
    """Does a step by replaying its recording; plainly at first, and from then on where it cannot be recorded.

    Args:
        compute: the whole step on a batch, which never waits for the device.
        say: shows the reason why a step cannot be recorded.
        recorder: makes what records.
    """

    def __init__(
        self,
        compute: Callable[[Batch], Result],
        say: Callable[[str], None],
        recorder: Callable[[], Recorder] = CudaGraph,
    ) -> None:
        self.compute, self.say, self.make = compute, say, recorder
        self.works = True
        self._key: Any = None
        self._done = 0

    def __call__(self, batch: Batch, key: Any) -> Result:
        """Do a step.

        Args:
            batch: of the same size each time.
            key: numbers that the recording holds, such as the learning rate; it is made again when they change.
        """
        if not self.works:
            return self.compute(batch)
        if key != self._key or self._done == 0:
            self._key, self._done, self._recorder = key, 0, self.make()
        self._done += 1
        if self._done <= WARM_STEPS:
            return self._recorder.warm(lambda: self.compute(batch))  # type: ignore[no-any-return]
        if self._done == WARM_STEPS + 1:
            self._batch = batch.map(torch.clone)
            try:
                self._recorder.record(lambda: self.compute(self._batch))
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # of CUDA, of compilers, of whatever waits for the device
                self.works = False
                self.say(
                    f"warning: the step cannot be recorded as a CUDA graph and runs slower without: "
                    f"{type(error).__name__}: {first_line(error)}; train.compile=true leaves it out"
                )
                return self.compute(batch)
        self._fill(batch)
        return self._recorder.replay()  # type: ignore[no-any-return]

    def _fill(self, batch: Batch) -> None:
        tensors: list[torch.Tensor] = []
        batch.map(lambda tensor: tensors.append(tensor) or tensor)  # type: ignore[func-returns-value]
        places = iter(tensors)
        self._batch.map(lambda tensor: tensor.copy_(next(places), non_blocking=True))


def why_not_whole(train: TrainConfig, world_size: int, scaled: bool) -> str | None:
    """Why a run's steps are not recorded whole; None if they are."""
    if world_size > 1:
        return "ranks exchange gradients within it"
    if train.accumulate > 1:
        return "train.accumulate makes it of several batches"
    return "fp16's loss scale waits for the outcome" if scaled else None
