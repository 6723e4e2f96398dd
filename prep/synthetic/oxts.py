"""GPS/IMU records of a synthetic drive, in KITTI's oxts format."""

from __future__ import annotations

import math

import numpy as np

from prep.synthetic.rig import FRAME_SECONDS, Array, CameraRig, Trajectory

FORMAT = """lat:     latitude of the oxts-unit (deg)
lon:     longitude of the oxts-unit (deg)
alt:     altitude of the oxts-unit (m)
roll:    roll angle (rad),    0 = level, positive = left side up
pitch:   pitch angle (rad),   0 = level, positive = front down
yaw:     heading (rad),       0 = east,  positive = counter clockwise
vn:      velocity towards north (m/s)
ve:      velocity towards east (m/s)
vf:      forward velocity, parallel to earth-surface (m/s)
vl:      leftward velocity, parallel to earth-surface (m/s)
vu:      upward velocity, perpendicular to earth-surface (m/s)
ax:      acceleration in x, in direction of vehicle front (m/s^2)
ay:      acceleration in y, in direction of vehicle left (m/s^2)
az:      acceleration in z, in direction of vehicle top (m/s^2)
af:      forward acceleration (m/s^2)
al:      leftward acceleration (m/s^2)
au:      upward acceleration (m/s^2)
wx:      angular rate around x (rad/s)
wy:      angular rate around y (rad/s)
wz:      angular rate around z (rad/s)
wf:      angular rate around forward axis (rad/s)
wl:      angular rate around leftward axis (rad/s)
wu:      angular rate around upward axis (rad/s)
pos_accuracy:  position accuracy (north/east in m)
vel_accuracy:  velocity accuracy (north/east in m/s)
navstat:       navigation status
numsats:       number of satellites
posmode:       position mode
velmode:       velocity mode
orimode:       orientation mode
"""

_EARTH_RADIUS = 6378137.0
_LATITUDE, _LONGITUDE, _ALTITUDE = 49.0, 8.4, 115.0
_GRAVITY = np.array([0.0, 0.0, 9.81])
# World z (where the street leads) is east, so that east, north, up = M · world.
_ENU_FROM_WORLD = np.array([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])


def oxts_line(trajectory: Trajectory, rig: CameraRig, frame: int) -> str:
    """The thirty values of one frame. Position is KITTI's Mercator projection about the drive's first frame."""

    def imu(at: float) -> tuple[Array, Array]:
        pose = trajectory.world_from_rectified(at) @ rig.rectified_from_velodyne @ rig.velodyne_from_imu
        return _ENU_FROM_WORLD @ pose[:3, :3], _ENU_FROM_WORLD @ pose[:3, 3]

    step = 0.05
    seconds = step * FRAME_SECONDS
    (turn, position), (_, origin) = imu(frame), imu(0)
    (turn_before, before), (turn_after, after) = imu(frame - step), imu(frame + step)
    velocity = (after - before) / (2 * seconds)
    force = (after - 2 * position + before) / seconds**2 + _GRAVITY
    spin = turn_before.T @ turn_after  # nearly the identity: its skew part is the turn in the vehicle's axes
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
