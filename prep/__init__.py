"""From raw KITTI (or a folder of frames) to samples: layout, calibration, velodyne, splits."""
