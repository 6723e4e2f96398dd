"""Read raw data: KITTI's layout, own drives, calibration, velodyne, splits."""
