"""What each way of storing images leaves of the photometric loss: how often its smallest error is at the true depth.

    md2 bench codec [RAW] [--route "jpeg 95 420" …] [--chain] [--frames 6] [--points 1000]

RAW holds drives in KITTI's raw layout, real (velodyne; neighbouring frames only with oxts) or made by `md2 sample`
(exact depth and poses); without it three short synthetic drives are rendered, which takes minutes. For each route it
prints, over stereo pairs and over neighbouring frames, the share of points whose smallest photometric error lies within
1 pixel of the true disparity; the same of flat and textured, near and far points; error and contrast at the true depth;
kB a frame and CPU milliseconds. `bench/matching.py` has the definitions. A route is a list of words:

    lossless | jpeg     codec; `jpeg` as prep encodes it, unless words say otherwise
    even | 93           quantisation tables: prep's, or the standard ones at a quality
    steps2,6            tables that have one step for luma and one for chroma
    420 | 422 | 444     chroma; `420` is smoothed as prep does it; blur0 … blur3: by so many pixels instead
    832x256 | native    stored size, resized to the measured one after decoding
    lanczos | bicubic | box | hamming | nearest | linear     filter when packed; linear: Lanczos in linear light
    dali | pillow | plain   decoder: the loader's; Pillow's; libjpeg-turbo with chroma repeated instead of interpolated
    bf16 | jitter       what is done to the decoded image: rounded, or brightened by a fifth as strongest jitter does
"""

from __future__ import annotations

import argparse
import io
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import nvidia.dali.fn
import nvidia.dali.types
import simplejpeg
import torch
from PIL import Image
from torch import Tensor

from bench.machine import busy, processor, versions
from bench.matching import Matches, find_views, identity_error, measure
from md2.data.augment import Jitter
from prep.packing.encode import CHROMA_BLUR, EVEN_TABLES, ImageFormat, encode, smooth_chroma
from prep.synthetic import write_drives
from shards.errors import UsageError

SIZE = (640, 192)
PUBLISHED = "jpeg 92 420 blur0 native pillow"
ROUTES = (
    "lossless",
    PUBLISHED,
    "jpeg 93 444",
    "jpeg 97 444",
    "jpeg 90 420 blur0",
    "jpeg 95 420 blur0",
    "jpeg 98 420 blur0",
    "jpeg 98 420",
    "jpeg 98 422 blur0",
    "jpeg even 444",
    "jpeg even 420 blur0",
    "jpeg even 420 blur1",
    "jpeg steps2,6 420",
    "jpeg steps1,6 420",
    "jpeg 93 420 832x256",
    "jpeg",
)
CHAIN = (
    "jpeg",
    "jpeg bicubic",
    "jpeg box",
    "jpeg hamming",
    "jpeg nearest",
    "jpeg linear",
    "jpeg plain",
    "jpeg pillow",
    "jpeg native",
    "jpeg native pillow",
    "lossless",
    "lossless native",
    "lossless native pillow",
    "jpeg bf16",
    "jpeg jitter",
)
FILTERS = {name: Image.Resampling[name.upper()] for name in ("lanczos", "bicubic", "box", "hamming", "nearest")}
_LOUD = torch.tensor([[1.2, 1.2, 1.2, 0.1]])
"""The strongest jitter: brightness, contrast, saturation, hue."""
dali: Any = nvidia.dali
fn, types = dali.fn, dali.types


_CHOICES = {
    "codec": ("lossless", "jpeg"),
    "chroma": ("420", "422", "444"),
    "filter": (*FILTERS, "linear"),
    "decoder": ("dali", "plain", "pillow"),
    "after": ("bf16", "jitter"),
}


def _meaning(word: str) -> dict[str, Any] | None:
    """What a word sets of a `Route`; None: it has no meaning."""
    for name, choices in _CHOICES.items():
        if word in choices:
            return {name: word}
    if word in ("even", "native"):
        return {"tables" if word == "even" else "size": None}
    if word.isdecimal() and 1 <= int(word) <= 100:
        return {"tables": int(word)}
    found = re.fullmatch(r"steps(\d+),(\d+)|blur([\d.]+)|(\d+)x(\d+)", word)
    if found is None:
        return None
    luma, chroma, blur, width, height = found.groups()
    if luma:
        return {"tables": ([int(luma)] * 64, [int(chroma)] * 64)}
    return {"blur": float(blur)} if blur else {"size": (int(width), int(height))}


@dataclass(frozen=True)
class Route:
    """A way from a raw frame to what the loss sees; the module's text says what the words mean."""

    words: str
    codec: str = "jpeg"
    tables: tuple[Sequence[int], Sequence[int]] | int | None = None
    chroma: str = "420"
    blur: float | None = None
    size: tuple[int, int] | None = SIZE
    filter: str = "lanczos"
    decoder: str = "dali"
    after: str = ""

    @classmethod
    def of(cls, words: str) -> Route:
        """From words.

        Raises:
            UsageError: one of them has no meaning.
        """
        route = cls(words)
        for word in words.split():
            change = _meaning(word)
            if change is None:
                raise UsageError(f"--route {words!r}: {word!r} has no meaning; md2 bench codec --help lists the words")
            route = replace(route, **change)
        return route

    def resize(self, raw: Image.Image) -> Image.Image:
        if self.size is None:
            return raw
        if self.filter == "linear":
            light = np.asarray(raw, dtype=np.float32) ** 2.2
            planes = [
                Image.fromarray(plane).resize(self.size, FILTERS["lanczos"]) for plane in np.moveaxis(light, 2, 0)
            ]
            levels = np.stack([np.asarray(plane) for plane in planes], axis=2).clip(0, 255**2.2) ** (1 / 2.2)
            return Image.fromarray(np.rint(levels).astype(np.uint8))
        return raw.resize(self.size, FILTERS[self.filter])

    def store(self, picture: Image.Image) -> bytes:
        quality = self.tables if isinstance(self.tables, int) else None
        if self.codec == "lossless":
            return encode(picture, ImageFormat(None, "ppm"))
        if self.blur is None and self.chroma != "422" and (quality or self.tables is None):
            return encode(picture, ImageFormat(None, "jpeg", quality, self.chroma))  # type: ignore[arg-type]
        blur = self.blur if self.blur is not None else CHROMA_BLUR * (self.chroma == "420")
        if blur:
            picture = smooth_chroma(picture, blur)
        tables = {"quality": quality} if quality else {"qtables": list(self.tables or EVEN_TABLES)}  # type: ignore[arg-type]
        buffer = io.BytesIO()
        sampling = f"4:{self.chroma[1]}:{self.chroma[2]}"
        picture.save(buffer, "JPEG", subsampling=sampling, optimize=True, **tables)
        return buffer.getvalue()

    def decode(self, data: bytes) -> Tensor:
        """(3, height, width) in 0 … 1, at the measured size."""
        if self.decoder == "pillow":
            with Image.open(io.BytesIO(data)) as picture:
                picture.load()
            sized = picture if picture.size == SIZE else picture.resize(SIZE, FILTERS["lanczos"])
            pixels = torch.from_numpy(np.array(sized))
        elif self.decoder == "plain":
            pixels = torch.from_numpy(simplejpeg.decode_jpeg(data, fastupsample=True))
        else:
            pixels = Dali.get(self.size != SIZE)([data])[0]
        image = pixels.permute(2, 0, 1).float() / 255
        if self.after == "jitter":
            return Jitter.of(torch.tensor([0]), _LOUD)(image[None])[0]
        return image.bfloat16().float() if self.after == "bf16" else image


class Dali:
    """The loader's decoder, and its resize, alone: bytes in, (height, width, 3) uint8 out."""

    def __init__(self, resized: bool, batch: int = 1) -> None:
        pipeline = dali.Pipeline(batch_size=batch, num_threads=1, device_id=None, prefetch_queue_depth=1)
        with pipeline:
            data = fn.external_source(name="data", dtype=types.UINT8, ndim=1)
            images = fn.decoders.image(
                data, device="cpu", output_type=types.RGB, jpeg_fancy_upsampling=True, affine=False
            )
            if resized:
                images = fn.resize(images, size=[SIZE[1], SIZE[0]], interp_type=types.INTERP_LANCZOS3, antialias=True)
            pipeline.set_outputs(images)
        pipeline.build()
        self._pipeline = pipeline

    @staticmethod
    @cache
    def get(resized: bool) -> Dali:
        return Dali(resized)

    def __call__(self, files: list[bytes]) -> Tensor:
        self._pipeline.feed_input("data", [np.frombuffer(file, dtype=np.uint8) for file in files])
        (images,) = self._pipeline.run()
        return torch.from_numpy(np.array(images.as_tensor()))


@dataclass
class Stored:
    """Frames by one route, each encoded once; `frames` keeps them while they are measured."""

    route: Route
    sizes: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    some: list[bytes] = field(default_factory=list)
    frames: dict[Path, Tensor] = field(default_factory=dict)

    def __call__(self, path: Path) -> Tensor:
        if path not in self.frames:
            small = self.route.resize(_raw(path))
            start = time.thread_time()
            data = self.route.store(small)
            self.seconds.append(time.thread_time() - start)
            self.sizes.append(len(data))
            self.some = [*self.some, data][:8]
            self.frames[path] = self.route.decode(data)
        return self.frames[path]

    def speed(self) -> tuple[float, float, float]:
        """CPU milliseconds to encode a frame, to decode it by libjpeg-turbo, and by DALI (0: not a JPEG)."""
        encoding = 1e3 * float(np.median(self.seconds))
        if self.route.codec != "jpeg":
            return encoding, 0, 0
        turbo = [_best(lambda data=data: simplejpeg.decode_jpeg(data)) for data in self.some]  # type: ignore[misc]
        decoder = Dali(self.route.size != SIZE, len(self.some))
        return encoding, float(np.mean(turbo)), _best(lambda: decoder(self.some), time.process_time) / len(self.some)


def _best(work: Callable[[], object], clock: Callable[[], float] = time.thread_time, turns: int = 15) -> float:
    """Milliseconds of the quickest turn, which others on the machine disturbed least."""
    times = []
    for _ in range(turns):
        start = clock()
        work()
        times.append(clock() - start)
    return 1e3 * min(times)


@cache
def _raw(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        return picture.convert("RGB")


def neighbours(raw: Path, count: int) -> list[tuple[Path, Path]]:
    """Pairs of consecutive left frames, `count` of every drive, with or without known depth."""
    pairs = []
    for folder in sorted(raw.glob("*/*_sync/image_02/data")):
        paths = sorted(folder.glob("*.png"))
        near = [pair for pair in pairwise(paths) if int(pair[1].stem) - int(pair[0].stem) == 1]
        pairs += near[:: max(1, len(near) // count)][:count]
    return pairs


def run(raw: Path, routes: Sequence[Route], frames: int, points: int) -> str:
    """Measure the routes on the drives of a raw tree; Markdown tables."""
    stores = {route.words: Stored(route) for route in routes}
    lossless = Stored(Route.of("lossless"))
    found: dict[str, dict[str, dict[str, Matches]]] = {}
    drives = find_views(raw, SIZE, frames=frames, points=points)
    for drive, views in drives.items():
        found[drive] = measure(views, stores, lossless)
        for store in (*stores.values(), lossless):
            store.frames.clear()
        _raw.cache_clear()
        print(f"{drive}: measured", file=sys.stderr, flush=True)
    identity = {
        words: float(np.mean([identity_error(store(first), store(second)) for first, second in neighbours(raw, 3)]))
        for words, store in stores.items()
    }
    kinds = sorted({kind for drive in found.values() for name in drive.values() for kind in name})
    tables = [_table(kind, stores, found) for kind in kinds]
    lines = [
        "| stored as | kB a frame | encode ms | libjpeg-turbo ms | DALI ms | identity error, neighbours |",
        "|---|---|---|---|---|---|",
    ]
    for words, store in stores.items():
        encoding, turbo, dali = store.speed()
        kb = float(np.mean(store.sizes)) / 1e3
        lines.append(f"| {words} | {kb:.1f} | {encoding:.2f} | {turbo:.2f} | {dali:.2f} | {identity[words]:.4f} |")
    return "\n\n".join([*tables, "\n".join(lines)])


def _table(kind: str, stores: dict[str, Stored], found: dict[str, dict[str, dict[str, Matches]]]) -> str:
    drives = [drive for drive, names in found.items() if kind in next(iter(names.values()))]

    def joined(words: str) -> Matches:
        return Matches.joined([found[drive][words][kind] for drive in drives])

    base = joined(PUBLISHED) if PUBLISHED in stores else joined(next(iter(stores)))
    several = [drive.rpartition("drive_")[2].removesuffix("_sync") for drive in drives] if len(drives) > 1 else []
    lines = [
        f"| {kind}, {len(base.won)} points | share % | against {'published' if PUBLISHED in stores else 'the first'} | "
        f"flat | textured | near | far |{''.join(f' {drive} |' for drive in several)} error | contrast |",
        f"|---|{'---|' * (8 + len(several))}",
    ]
    for words in stores:
        m = joined(words)
        difference = 100 * (m.won.double() - base.won.double())
        error = float(difference.std()) / len(difference) ** 0.5
        shares = [m.share(chosen) for chosen in (m.flat, ~m.flat, m.near, ~m.near)]
        shares += [found[drive][words][kind].share() for drive in drives] if several else []
        lines.append(
            f"| {words} | {m.share():.1f} | {float(difference.mean()):+.1f} ± {error:.1f} | "
            f"{' | '.join(f'{share:.1f}' for share in shares)} | {float(m.error.mean()):.4f} | {m.contrast:.4f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("raw", nargs="?", type=Path, metavar="RAW", help="default: three synthetic drives")
    parser.add_argument("--route", action="append", metavar="WORDS", help="measure these only; repeat for several")
    parser.add_argument("--chain", action="store_true", help="one step of the default's chain changed at a time")
    parser.add_argument("--frames", type=int, default=6, help="targets of each drive")
    parser.add_argument("--points", type=int, default=1000, help="of each target")
    options = parser.parse_args()
    if options.frames < 1 or options.points < 1:
        raise UsageError("--frames and --points: at least 1")
    routes = [Route.of(words) for words in options.route or (CHAIN if options.chain else ROUTES)]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        raw = options.raw
        if raw is None:
            raw = write_drives(Path(folder) / "raw", drives=3, frames=8, size=(1242, 375), lidar=False, workers=2).root
        tables = run(raw, routes, options.frames, options.points)
    print(f"### Codec\n\n`{shlex.join(['md2', 'bench', 'codec', *sys.argv[1:]])}`\n\n{tables}\n")
    packages = versions("torch", "nvidia-dali-cuda120", "pillow", "simplejpeg")
    print(f"{SIZE[0]}x{SIZE[1]}; {processor()}, {busy()}, {packages}")


if __name__ == "__main__":
    main()
