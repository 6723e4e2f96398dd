"""Synthetic drives in KITTI's raw layout: seeded streets, ray-cast with exact geometry, and their true depth."""

from __future__ import annotations

from prep.synthetic.write import SyntheticRaw, write_drives

__all__ = ["SyntheticRaw", "write_drives"]
