"""`python narrow_main.py MODULE …` is `python -m MODULE …` with ResNets a quarter as wide, and without `summary.png`.

For tests of what networks and pictures have no part in; the fixtures `narrow` and `undrawn` are the same in a process.
"""

from __future__ import annotations

import runpy
import sys

import md2.networks.resnet
import md2.training.summary


def narrow() -> None:
    """Make it so in this process, before anything imports the training."""
    md2.networks.resnet.WIDTH = 16
    md2.training.summary.run_figure = lambda run: None


if __name__ == "__main__":
    narrow()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
