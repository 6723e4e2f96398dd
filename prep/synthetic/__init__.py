"""Synthetic drives in KITTI's raw layout: a street ray-cast with exact geometry, seeded, with its true depth."""

from __future__ import annotations

from prep.synthetic.write import SyntheticRaw, write_drives

__all__ = ["SyntheticRaw", "write_drives"]
