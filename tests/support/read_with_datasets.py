"""Reads packed datasets by the `datasets` library; prints of each: part -> [key, pixels, numbers, meta, what is None].

python read_with_datasets.py FOLDER …
"""

from __future__ import annotations

import base64
import hashlib
import json
import sys
from typing import Any

import numpy as np


def digest(values: Any) -> str:
    """Hash of an array's numbers and shape, or of bytes."""
    if isinstance(values, bytes):
        return hashlib.sha256(values).hexdigest()
    array = np.ascontiguousarray(values)
    return f"{array.dtype}{array.shape}{hashlib.sha256(array.tobytes()).hexdigest()}"


def rows(samples: Any) -> list[list[Any]]:
    """Of each sample: key, component -> hash of pixels, component -> base64, `meta.json`, missing components."""
    found = []
    for sample in samples:
        images = [name for name, value in sample.items() if name.endswith(("jpg", "png")) and value is not None]
        pixels = {name: digest(np.asarray(sample[name])) for name in images}
        numbers = {name: base64.b64encode(sample[name]).decode() for name in ("k.f32", "t.f32")}
        absent = [name for name, value in sample.items() if value is None]
        found.append([sample["__key__"], pixels, numbers, sample["meta.json"], absent])
    return found


def main(folders: list[str]) -> None:
    from datasets import load_dataset

    found = [{part: rows(samples) for part, samples in load_dataset(folder).items()} for folder in folders]
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1:])
