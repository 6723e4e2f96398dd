"""A drive as a sequence of frames, for odometry: KITTI odometry's `09`, or a raw drive."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from prep.raw.calibration import Matrix
from prep.raw.drives import Kitti
from prep.raw.sources import RawData, Ref, read
from prep.raw.splits import Side
from shards.errors import InputError


@dataclass(frozen=True)
class FrameSequence:
    """Consecutive frames of one camera.

    Attributes:
        name: as asked for.
        frames: number -> file, in order, without a gap.
        poses: (N, 3, 4) camera-to-world, metres, of all frames of the sequence; None where there are none.
    """

    name: str
    frames: dict[int, Ref]
    poses: Matrix | None

    def read(self) -> Iterator[tuple[str, bytes]]:
        """Name and content of each frame's file.

        Raises:
            InputError: a file cannot be read.
        """
        for number, ref in self.frames.items():
            yield f"{self.name} frame {number}", read(ref)


def open_sequence(raw: Sequence[str], name: str, side: Side = "l") -> FrameSequence:
    """Find a sequence in raw data.

    Args:
        raw: folders or URLs, as for `md2 prep --raw`.
        name: `09` (KITTI odometry), or `2011_09_26/2011_09_26_drive_0002_sync` (raw).
        side: which camera.

    Raises:
        InputError: not there, a frame is missing between others, or its calibration or poses are broken.
    """
    drive = Kitti(RawData(list(raw)), None).open(name)
    found = drive.images[side] if drive is not None else {}
    if drive is None or not found:
        raise InputError(
            f"sequence {name} is not at {', '.join(raw)}; expected there: sequences/{name}/image_2/000000.png (or "
            f".jpg), sequences/{name}/calib.txt and, for the error, poses/{name}.txt"
        )
    numbers = sorted(found)
    gap = next((number for number in range(numbers[0], numbers[-1]) if number not in found), None)
    if gap is not None:
        raise InputError(f"sequence {name}: frame {gap} is missing; a trajectory needs every frame")
    return FrameSequence(name, {number: found[number] for number in numbers}, drive.poses)
