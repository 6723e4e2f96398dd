"""`dataset.json`, the manifest of a packed dataset: written last, it is what makes the dataset exist."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from shards.errors import DatasetError, first_line
from shards.sample import MAX_FRAMES, Chroma, Codec, Offset, image_component

MANIFEST = "dataset.json"
CARD = "README.md"
REPORT = "report.json"
SCHEMA_VERSION = 1
MAX_INDEX_BYTES = 32 << 20
"""Of one shard's index."""
_MAX_VALUES = 1_000_000
"""Values in a manifest."""

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Side = Annotated[int, Field(gt=0, le=65535)]
"""Pixels; no JPEG is larger."""
Text = Annotated[str, Field(max_length=300, pattern=r"^\P{Cc}*$")]
"""Without control characters: the text may come from a bucket that others can write, and goes to terminals."""
_LONGEST_NAME = 200
_SHARD_NAME = re.compile(r"[a-z0-9_]+/\d{6}\.tar")


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Shard(_Model):
    """One tar and its DALI index, by paths relative to the manifest."""

    name: str
    samples: int = Field(gt=0)
    bytes: int = Field(gt=0, le=1 << 40)
    sha256: Sha256
    index_bytes: int = Field(gt=0, le=MAX_INDEX_BYTES)
    index_sha256: Sha256

    @field_validator("name")
    @classmethod
    def _stay_inside(cls, name: str) -> str:
        """Others may be able to write the bucket: no name may leave the dataset."""
        if not _SHARD_NAME.fullmatch(name):
            raise ValueError(f"shard name {name!r} is not of the form 'train/000000.tar'")
        return name

    @property
    def part(self) -> str:
        """`train`, `val` or `test`."""
        return PurePosixPath(self.name).parts[0]

    @property
    def index_name(self) -> str:
        return self.name.removesuffix(".tar") + ".idx"

    @property
    def files(self) -> tuple[tuple[str, int, str], tuple[str, int, str]]:
        """Name, size and sha256 of the index and of the tar."""
        return (self.index_name, self.index_bytes, self.index_sha256), (self.name, self.bytes, self.sha256)

    @property
    def total_bytes(self) -> int:
        """Of both files."""
        return self.bytes + self.index_bytes


class Split(_Model):
    """Name of the split, and the sha256 of its lists (part name and lines, in order)."""

    name: Text
    sha256: Sha256


class DepthInfo(_Model):
    """Source of the ground truth, and which depth it is.

    `camera_z` is the point's z in the target camera; `lidar_x` is the lidar's forward x, which the published Eigen
    evaluation uses.
    """

    source: Literal["velodyne", "improved", "dense"]
    convention: Literal["camera_z", "lidar_x"]


class JpegInfo(_Model):
    """How images were encoded as JPEG.

    Attributes:
        chroma: `420` has half the colour resolution both ways, `444` all of it.
        chroma_blur: standard deviation, in pixels of the stored image, of the Gaussian that smoothed the colours
            before they were halved; 0: none.
        tables: `standard` quantisation tables at the manifest's `quality`, or md2's `even` ones.
    """

    chroma: Chroma
    chroma_blur: float = Field(ge=0, allow_inf_nan=False)
    tables: Literal["standard", "even"]


def count_values(data: bytes) -> int:
    """Return at least the number of values in a JSON text, without parsing it: each takes a hundred bytes of memory."""
    return data.count(b",") + data.count(b"[") + data.count(b"{")


def describe_encoding(codec: Codec, quality: int | None, jpeg: JpegInfo | None) -> str:
    """How images are stored, for people: `JPEG, quality 93, chroma 4:4:4`. Arguments are the manifest's fields."""
    if codec != "jpeg":
        return {"png": "PNG (lossless)", "ppm": "PPM (uncompressed)"}[codec]
    tables = "JPEG, even tables" if quality is None else f"JPEG, quality {quality}"
    if jpeg is None or jpeg.chroma == "444":
        return f"{tables}, chroma 4:4:4"
    return f"{tables}, chroma 4:2:0" + f" (smoothed, {jpeg.chroma_blur:g} px)" * bool(jpeg.chroma_blur)


class Manifest(_Model):
    """Contents of `dataset.json`.

    Every sample of every part has all of `components`; `optional_components` counts the samples that have each of the
    others. `size` is (width, height) in pixels of the stored images, or None if they keep their native size. `quality`
    is None for lossless codecs and for JPEG with even tables. `jpeg` is None for other codecs, and for JPEGs packed
    before it was recorded: standard tables, 4:4:4. `intrinsics` is `guessed` if of some drive only a field of view was
    given, else None. `plan_sha256` is the hash of everything that decided the bytes; the
    store fills it in, and recognises by it the same dataset packed again.
    """

    schema_version: Literal[1] = 1
    md2_version: Text
    split: Split
    frames: list[int] = Field(min_length=1, max_length=MAX_FRAMES)
    stereo: bool
    depth: DepthInfo | None
    size: tuple[Side, Side] | None
    codec: Codec
    quality: int | None
    jpeg: JpegInfo | None = None
    intrinsics: Literal["guessed"] | None = None
    seed: int
    components: list[Text]
    optional_components: dict[Text, int]
    skipped: int = Field(ge=0)
    plan_sha256: Sha256 | None = None
    shards: list[Shard] = Field(min_length=1)

    @field_validator("shards")
    @classmethod
    def _no_name_twice(cls, shards: list[Shard]) -> list[Shard]:
        """Refuse two entries for one file."""
        if twice := [name for name, count in Counter(shard.name for shard in shards).items() if count > 1]:
            raise ValueError(f"shard {twice[0]!r} is listed twice")
        return shards

    @property
    def parts(self) -> list[str]:
        return sorted({shard.part for shard in self.shards})

    def part(self, name: str) -> list[Shard]:
        """Return the shards of one part, in reading order.

        Raises:
            DatasetError: no such part.
        """
        found = sorted((s for s in self.shards if s.part == name), key=lambda s: s.name)
        if not found:
            raise DatasetError(f"the dataset has no part {name!r}; it has {', '.join(self.parts) or 'none'}")
        return found

    def samples(self, part: str) -> int:
        return sum(shard.samples for shard in self.part(part))

    @property
    def offsets(self) -> list[Offset]:
        """All images of a sample: the frame offsets, then "s" if it has a stereo partner."""
        offsets: list[Offset] = list(self.frames)
        return [*offsets, "s"] if self.stereo else offsets

    def image_component(self, offset: Offset) -> str:
        return image_component(offset, self.codec)

    @property
    def encoding(self) -> str:
        """How images are stored, for people."""
        return describe_encoding(self.codec, self.quality, self.jpeg)

    def to_json(self) -> str:
        """Return the text of `dataset.json`; the same dataset gives the same bytes, also an old one without `jpeg`."""
        absent = {name for name in ("jpeg", "intrinsics") if getattr(self, name) is None}
        return json.dumps(self.model_dump(mode="json", exclude=absent), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> Manifest:
        """Parse the text of `dataset.json`; `where` (path or URL) goes into messages.

        Raises:
            DatasetError: not JSON, another schema version, or a field that is missing, unknown or unsafe.
        """
        again = "pack or pull the dataset again"
        if count_values(text if isinstance(text, bytes) else text.encode()) > _MAX_VALUES:
            raise DatasetError(f"{where}: more than {_MAX_VALUES:,} values, refused; {again}")
        try:
            data = json.loads(text)
            version = data.get("schema_version") if isinstance(data, dict) else None
            if version != SCHEMA_VERSION:
                raise DatasetError(
                    f"{where}: schema version {str(version)[:20]}, this md2 reads {SCHEMA_VERSION}; use the md2 that "
                    "packed it"
                )
            return cls.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part)[:_LONGEST_NAME] for part in first["loc"])
            raise DatasetError(f"{where}: {field}: {first['msg'][:_LONGEST_NAME]}; {again}") from error
        # Also: not UTF-8, numbers of thousands of digits, nested too deep.
        except (ValueError, RecursionError) as error:
            raise DatasetError(f"{where}: not JSON ({first_line(error)}); {again}") from error
