"""Run by torchrun from test_distributed.py: one backward pass of every rank on its share of a fixed batch."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from narrow_main import narrow
from torch.nn.parallel import DistributedDataParallel

from md2.config import load_config
from md2.data.batch import Batch
from md2.distributed import ranks
from md2.loss import ReprojectionLoss
from md2.model import Networks

SAMPLES = 4


def fixed_batch() -> Batch:
    """Four smooth random images with neighbours and a partner, the same in every process."""
    generator = torch.Generator().manual_seed(3)
    coarse = torch.rand(SAMPLES * 4, 3, 8, 12, generator=generator)
    images = torch.nn.functional.interpolate(coarse, (64, 96), mode="bicubic").clamp(0, 1).chunk(4)
    K = torch.tensor([[60.0, 0, 47.5], [0, 60.0, 31.5], [0, 0, 1]]).repeat(SAMPLES, 1, 1)
    stereo = torch.eye(4).repeat(SAMPLES, 1, 1)
    stereo[:, 0, 3] = torch.tensor([-0.1, 0.1, -0.1, 0.1])
    named = {0: images[0], -1: images[1], 1: images[2], "s": images[3]}
    return Batch(named, named, K, stereo, 5.4, None, None, [str(i) for i in range(SAMPLES)])  # type: ignore[arg-type]


def share(batch: Batch, rank: int, world: int) -> Batch:
    rows = slice(rank * SAMPLES // world, (rank + 1) * SAMPLES // world)
    images = {offset: image[rows] for offset, image in batch.images.items()}
    assert batch.stereo is not None
    return Batch(images, images, batch.intrinsics[rows], batch.stereo[rows], 5.4, None, None, batch.keys[rows])


def main(out: Path) -> None:
    config = load_config("mono_stereo", ["train.device=cpu"])
    with ranks("cpu") as place:
        torch.manual_seed(0)
        networks = Networks.of(config)
        networks.eval()  # batch norm frozen: its statistics are per rank
        model = DistributedDataParallel(networks) if place.world_size > 1 else networks
        batch = share(fixed_batch(), place.rank, place.world_size)
        output = ReprojectionLoss(config.loss, config.model)(batch, model(batch.augmented))
        output.total.backward()
        loss = place.sum(output.total.detach().clone()) / place.world_size
        if place.main:
            gradients = {name: p.grad for name, p in networks.named_parameters() if p.requires_grad}
            torch.save({"loss": loss, "gradients": gradients, "world": place.world_size}, out)


if __name__ == "__main__":
    narrow()
    main(Path(sys.argv[1]))
