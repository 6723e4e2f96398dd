"""Monodepth2 at high throughput: the DALI loader, the networks, the loss, training, evaluation, prediction.

import md2
model = md2.load("runs/mono")
result = model.predict(image)  # PIL image, NumPy array or tensor
result.depth, result.unit      # (H, W) float32; "metres" or "unknown"
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from shards.version import __version__

if TYPE_CHECKING:
    from md2.inference.predictor import Predictor

__all__ = ["__version__", "load"]

_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
if not any(name in os.environ for name in _WAITING):
    # OpenMP reads this when torch loads it. Otherwise its threads spin while they wait for one another. On a busy
    # machine a spinning thread takes the core that the awaited one needs (figures: bench/RESULTS.md, Waiting).
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def load(path: str | Path, device: Literal["auto", "cpu", "gpu"] = "auto") -> Predictor:
    """Load a run folder (its best checkpoint), a checkpoint file, or a folder of official Monodepth2 weights.

    Raises:
        InputError: no model there, a damaged file, or weights that do not fit (by name).
        UsageError: `gpu` is chosen, but no GPU works.
    """
    # Imported here so that `import md2` stays light, without torch.
    from md2.inference.predictor import load as load_predictor

    return load_predictor(path, device)
