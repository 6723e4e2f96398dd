"""The synthetic car: cameras, lidar, IMU, their calibration in KITTI's format, and its motion along a road.

Axes, as in KITTI: camera x right, y down, z forward; velodyne and IMU x forward, y left, z up. The world has x right,
y down, z forward and the ground at y = 0. `a_from_b` maps homogeneous coordinates of b to those of a.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
_Values = TypeVar("_Values", bound=npt.NDArray[np.floating[Any]])

DATE = "2011_09_26"
BASELINE = 0.54
CAMERAS = (0, 1, 2, 3)
COLOUR_CAMERAS = (2, 3)
FRAME_SECONDS = 0.1

_OFFSETS = {
    0: (0.0, 0.0, 0.0),
    1: (-BASELINE, 0.0, 0.0),
    2: (0.06, 2.0e-4, 2.7e-3),
    3: (0.06 - BASELINE, 2.0e-4, 2.7e-3),
}
"""X_camera = X_rectified_camera_0 + offset, metres. The colour cameras share y and z, so the pair is exactly rectified.
Neither of them is at camera 0, so only the difference of two projections gives the baseline."""
_RECTIFYING = {0: (0.24, -0.43, -0.56), 1: (-0.25, 1.34, 0.51), 2: (0.05, -0.16, -0.87), 3: (0.13, 0.97, 0.41)}
"""Small rotations (degrees about x, y, z) between each physical camera and its rectified image."""


def dot(a: _Values, b: _Values) -> _Values:
    """Scalar products of vectors (…,3), term by term: a matrix product may round differently with more threads."""
    return a[..., 0] * b[..., 0] + a[..., 1] * b[..., 1] + a[..., 2] * b[..., 2]  # type: ignore[return-value]


def rotation(x: float, y: float, z: float) -> Array:
    """Rotation matrix (3,3) Ry · Rx · Rz for angles in radians about x, y, z."""
    cx, sx, cy, sy, cz, sz = (f(a) for a in (x, y, z) for f in (math.cos, math.sin))
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return np.asarray(about_y @ about_x @ about_z, dtype=np.float64)


def rigid(turn: npt.ArrayLike, shift: npt.ArrayLike) -> Array:
    """Homogeneous (4,4) transform from a (3,3) rotation and a (3,) translation."""
    matrix = np.eye(4)
    matrix[:3, :3] = turn
    matrix[:3, 3] = shift
    return matrix


def inverse(transform: Array) -> Array:
    """Inverse of a rigid (4,4) transform."""
    turn = transform[:3, :3].T
    return rigid(turn, -turn @ transform[:3, 3])


def _as_written(value: float) -> float:
    """The value as a reader of the calibration file gets it (seven significant digits)."""
    return float(f"{value:.6e}")


@dataclass(frozen=True)
class CameraRig:
    """Cameras with KITTI's field of view and an off-centre principal point. `size` is width, height in pixels."""

    size: tuple[int, int]

    @property
    def intrinsics(self) -> Array:
        """Intrinsics (3,3) of each rectified camera, in pixels, pixel centres at integers."""
        width, height = self.size
        focal = _as_written(0.58 * width)
        cx, cy = _as_written(0.4915 * width - 0.5), _as_written(0.462 * height - 0.5)
        return np.array([[focal, 0, cx], [0, focal, cy], [0, 0, 1.0]])

    def projection(self, camera: int) -> Array:
        """`P_rect` (3,4) of a camera: K · [I | offset], applied to rectified camera-0 coordinates."""
        return np.asarray(self.intrinsics @ np.column_stack([np.eye(3), _OFFSETS[camera]]), dtype=np.float64)

    @staticmethod
    def rectifying(camera: int) -> Array:
        """`R_rect` (3,3) of a camera: physical orientation -> rectified orientation."""
        return rotation(*np.radians(_RECTIFYING[camera]))

    @staticmethod
    def camera_from_rectified(camera: int) -> Array:
        """(4,4), rectified camera 0 -> a rectified camera."""
        return rigid(np.eye(3), _OFFSETS[camera])

    @property
    def camera0_from_velodyne(self) -> Array:
        """(4,4), velodyne -> physical (not rectified) camera 0."""
        axes = np.array([[0.0, -1, 0], [0, 0, -1], [1, 0, 0]])
        return rigid(rotation(*np.radians((-0.85, 0.43, -0.03))) @ axes, (-0.004, -0.08, -0.27))

    @property
    def velodyne_from_imu(self) -> Array:
        """(4,4), IMU -> velodyne."""
        return rigid(rotation(*np.radians((0.85, -0.12, -0.05))), (-0.81, 0.32, -0.8))

    @property
    def rectified_from_velodyne(self) -> Array:
        """(4,4), velodyne -> rectified camera 0."""
        return rigid(self.rectifying(0), (0, 0, 0)) @ self.camera0_from_velodyne

    def calibration_files(self) -> dict[str, str]:
        """File name -> text of the three calibration files of a date folder."""
        cameras: list[tuple[str, npt.ArrayLike]] = [("corner_dist", [0.1])]
        for camera in CAMERAS:
            rectifying = self.rectifying(camera)
            entries: dict[str, npt.ArrayLike] = {
                "S": self.size,
                "K": self.intrinsics,
                "D": np.zeros(5),
                # X_camera = R X_0 + T between the physical cameras, consistent with R_rect and P_rect.
                "R": np.round(rectifying.T @ self.rectifying(0), 12) + 0.0,
                "T": rectifying.T @ _OFFSETS[camera],
                "S_rect": self.size,
                "R_rect": rectifying,
                "P_rect": self.projection(camera),
            }
            cameras += [(f"{name}_{camera:02d}", value) for name, value in entries.items()]
        lidar, imu = (
            [("R", matrix[:3, :3]), ("T", matrix[:3, 3])]
            for matrix in (self.camera0_from_velodyne, self.velodyne_from_imu)
        )
        return {
            "calib_cam_to_cam.txt": _calibration_text(cameras),
            "calib_velo_to_cam.txt": _calibration_text([*lidar, ("delta_f", (0.0, 0.0)), ("delta_c", (0.0, 0.0))]),
            "calib_imu_to_velo.txt": _calibration_text(imu),
        }


def _calibration_text(entries: Iterable[tuple[str, npt.ArrayLike]]) -> str:
    lines = [f"{name}: " + " ".join(f"{value:.6e}" for value in np.ravel(values)) for name, values in entries]
    return "\n".join(["calib_time: 26-Sep-2011 12:00:00", *lines]) + "\n"


@dataclass(frozen=True)
class Place:
    """A point of the ground, world metres, and a direction: radians about y, 0 along +z, positive to the right."""

    x: float
    z: float
    heading: float

    def frame(self) -> Array:
        """(4,4), the place's own axes (x right, y down, z ahead) -> world."""
        return rigid(rotation(0, self.heading, 0), (self.x, 0, self.z))

    def offset(self, right: float, ahead: float, turn: float = 0.0) -> Place:
        """The place this many metres to the right and ahead, turned by `turn` radians."""
        sine, cosine = math.sin(self.heading), math.cos(self.heading)
        x, z = self.x + right * cosine + ahead * sine, self.z - right * sine + ahead * cosine
        return Place(x, z, self.heading + turn)


@dataclass(frozen=True)
class Road:
    """The street's centre line: x = centre(z), a sum of sines, 0 at the start.

    Attributes:
        waves: amplitude in metres, wavelength in metres, phase in radians of each sine.
    """

    waves: tuple[tuple[float, float, float], ...]

    def centre(self, z: npt.ArrayLike) -> Array:
        """x of the centre line at z, metres."""
        z = np.asarray(z, dtype=np.float64)
        total = np.zeros_like(z)
        for amplitude, length, phase in self.waves:
            total = total + amplitude * (np.sin(2 * np.pi * z / length + phase) - math.sin(phase))
        return total

    def heading(self, z: npt.ArrayLike) -> Array:
        """Direction of the centre line at z: radians about y, 0 along +z, positive to the right."""
        z = np.asarray(z, dtype=np.float64)
        slope = np.zeros_like(z)
        for amplitude, length, phase in self.waves:
            slope = slope + amplitude * 2 * np.pi / length * np.cos(2 * np.pi * z / length + phase)
        return np.asarray(np.arctan(slope), dtype=np.float64)

    def place(self, z: float, lateral: float, turn: float = 0.0) -> Place:
        """The place `lateral` metres right of the centre line at z, along the road, turned by `turn` radians."""
        heading = float(self.heading(z))
        x, z = float(self.centre(z)) + lateral * math.cos(heading), z - lateral * math.sin(heading)
        return Place(x, z, heading + turn)


@dataclass(frozen=True)
class Trajectory:
    """The car's motion: about one metre a frame in the right lane, with a little sway and pitch."""

    road: Road
    speed: float
    phase: float

    def _position(self, frame: float) -> Array:
        wobble = self.phase + 2 * np.pi * frame / 23
        along = self.speed * frame + 0.2 * (math.sin(wobble) - math.sin(self.phase))
        place = self.road.place(along, 1.7 + 0.25 * math.sin(2 * np.pi * frame / 41 + self.phase))
        return np.array([place.x, -1.65 + 0.012 * math.sin(2 * np.pi * frame / 7 + self.phase), place.z])

    def world_from_rectified(self, frame: float) -> Array:
        """(4,4), rectified camera 0 -> world at a frame, which may be a fraction."""
        ahead = self._position(frame + 0.5) - self._position(frame - 0.5)
        yaw = math.atan2(ahead[0], ahead[2]) + 0.006 * math.sin(2 * np.pi * frame / 11 + self.phase)
        pitch = 0.005 * math.sin(2 * np.pi * frame / 9 + 2 * self.phase)
        roll = 0.004 * math.sin(2 * np.pi * frame / 13 + 3 * self.phase)
        return rigid(rotation(pitch, yaw, roll), self._position(frame))
