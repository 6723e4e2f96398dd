"""Licence of the KITTI raw data, for the README.md of datasets that are made from them."""

KITTI_LICENCE = """\
Made from the KITTI raw data: Geiger, Lenz, Stiller, Urtasun, "Vision meets Robotics: The KITTI Dataset", IJRR 2013,
https://www.cvlibs.net/datasets/kitti/. Those data, and therefore these shards, are published under
Creative Commons Attribution-NonCommercial-ShareAlike 3.0 (CC BY-NC-SA 3.0): name the source, no commercial use,
share alike.
"""
