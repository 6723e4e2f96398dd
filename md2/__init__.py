"""Monodepth2 at high throughput: the DALI loader, the networks, the loss, training, evaluation, prediction.

import md2
model = md2.load("runs/mono")
result = model.predict(image)  # PIL image, NumPy array or tensor
result.depth, result.unit      # (H, W) float32; "metres" or "unknown"
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from md2 import process

# Before anything else is imported: see md2/process.py.
process.begin()

from shards.version import __version__  # noqa: E402

if TYPE_CHECKING:
    from md2.inference.predictor import Predictor

__all__ = ["__version__", "load"]


def load(path: str | Path, device: Literal["auto", "cpu", "gpu"] = "auto") -> Predictor:
    """Load a run folder (its best checkpoint), a checkpoint file, or a folder of official Monodepth2 weights.

    Also a folder of `md2 export --to safetensors`, or its URL: `hf://USER/NAME`, `s3://`, `https://`.

    Raises:
        InputError: no model there, a damaged file, or weights that do not fit (by name).
        DatasetError: the storage behind a URL fails.
        UsageError: `gpu` is chosen, but no GPU works.
    """
    # Imported here so that `import md2` stays light, without torch.
    from md2.inference.predictor import load as load_predictor

    return load_predictor(path, device)
