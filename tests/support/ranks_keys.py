"""`python -m md2.train` that also writes down which samples each step takes on each rank, and what they look like.

Batch norm is frozen, since its statistics are each rank's own; the noise is large enough to show in the loss.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    from narrow_main import narrow

    narrow()

from torch import nn

from md2.data.batch import Batch
from md2.model import Networks
from md2.photometric import ties
from md2.train import main
from md2.training.trainer import Trainer

_step = Trainer._step


def step(self: Trainer, group: list[Batch]) -> Any:
    samples = [
        [key, hashlib.sha256(image.contiguous().numpy().tobytes()).hexdigest()]
        for batch in group
        for key, image in zip(batch.keys, batch.augmented[0], strict=True)
    ]
    with Path(f"{os.environ['KEYS_FILE']}.{self.ranks.rank}").open("a") as file:
        file.write(json.dumps([self.step, samples]) + "\n")
    return _step(self, group)


def watch(put: Callable[[Any, str, Any], None]) -> None:
    """Change the training of this process; `put` is `setattr`, or one that takes it back."""
    put(Trainer, "_step", step)
    put(Networks, "train", lambda self, mode=True: nn.Module.train(self, False))
    put(ties, "NOISE_SCALE", 0.1)


if __name__ == "__main__":
    watch(setattr)
    sys.exit(main())
