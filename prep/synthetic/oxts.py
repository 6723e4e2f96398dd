"""GPS/IMU records of a synthetic drive, in KITTI's oxts format."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from prep.synthetic.rig import FRAME_SECONDS, Array, CameraRig, Trajectory

FORMAT = Path(__file__).with_name("dataformat.txt")
"""Description of the thirty values, as KITTI adds it to each drive."""
_EARTH_RADIUS = 6378137.0
_LATITUDE, _LONGITUDE, _ALTITUDE = 49.0, 8.4, 115.0
_GRAVITY = np.array([0.0, 0.0, 9.81])
_ENU_FROM_WORLD = np.array([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])
"""World -> east, north, up. World z, in which the street runs, is east."""


def oxts_line(trajectory: Trajectory, rig: CameraRig, frame: int) -> str:
    """The thirty values of one frame. The position is by KITTI's Mercator projection about the drive's first frame."""

    def imu(at: float) -> tuple[Array, Array]:
        pose = trajectory.world_from_rectified(at) @ rig.rectified_from_velodyne @ rig.velodyne_from_imu
        return _ENU_FROM_WORLD @ pose[:3, :3], _ENU_FROM_WORLD @ pose[:3, 3]

    step = 0.05
    seconds = step * FRAME_SECONDS
    (turn, position), (_, origin) = imu(frame), imu(0)
    (turn_before, before), (turn_after, after) = imu(frame - step), imu(frame + step)
    velocity = (after - before) / (2 * seconds)
    force = (after - 2 * position + before) / seconds**2 + _GRAVITY
    spin = turn_before.T @ turn_after  # close to the identity: its skew part is the turn about the vehicle's axes
    rates = np.array([spin[2, 1] - spin[1, 2], spin[0, 2] - spin[2, 0], spin[1, 0] - spin[0, 1]]) / (4 * seconds)

    roll, pitch = math.atan2(turn[2, 1], turn[2, 2]), math.asin(-turn[2, 0])
    yaw = math.atan2(turn[1, 0], turn[0, 0])
    level = np.array([[math.cos(yaw), math.sin(yaw), 0], [-math.sin(yaw), math.cos(yaw), 0], [0, 0, 1]])
    east, north, up = position - origin
    scale = math.cos(math.radians(_LATITUDE)) * _EARTH_RADIUS
    mercator = math.log(math.tan(math.radians((90 + _LATITUDE) / 2))) + north / scale
    latitude = 2 * math.degrees(math.atan(math.exp(mercator))) - 90
    longitude = _LONGITUDE + math.degrees(east / scale)
    values = [latitude, longitude, _ALTITUDE + up, roll, pitch, yaw, velocity[1], velocity[0]]
    values += [*(level @ velocity), *(turn.T @ force), *(level @ force), *rates, *(level @ turn @ rates), 0.05, 0.02]
    return " ".join(f"{value:.13g}" for value in values) + " 4 10 4 4 0\n"
