"""`dataset.json`: what a packed dataset holds. It is written last and is the commit point."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from shards.errors import DatasetError
from shards.sample import Chroma, Codec, Offset, image_component
from shards.tar import MAX_INDEX_BYTES

MANIFEST = "dataset.json"
CARD = "README.md"
REPORT = "report.json"
SCHEMA_VERSION = 1

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Side = Annotated[int, Field(gt=0, le=65535)]
"""Pixels; no JPEG is larger."""
Text = Annotated[str, Field(max_length=300, pattern=r"^\P{Cc}*$")]
"""Without control characters: it comes from a bucket that others can write, and goes to terminals."""
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
        """A manifest comes from a bucket that others can write: no name may leave the dataset."""
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


class Split(_Model):
    """The split's name, and the sha256 over its lists (part name and lines, in order)."""

    name: Text
    sha256: Sha256


class DepthInfo(_Model):
    """Where ground truth came from, and which depth it is.

    `camera_z` is the z of the point in the target camera; `lidar_x` the lidar's forward x, which the
    published Eigen evaluation uses.
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


class Manifest(_Model):
    """Contents of `dataset.json`.

    Every sample of every part has all of `components`; `optional_components` says how many samples
    have each of the rest. `size` is (width, height) in pixels of the stored images, or None where
    they keep their native size. `quality` is None for lossless codecs and for JPEG with even tables. `jpeg` is None
    for other codecs, and for JPEGs packed before it was recorded: standard tables, 4:4:4. `plan_sha256` hashes
    everything that decided the bytes, which distinguishes packing the same again from packing something else; the
    store fills it in.
    """

    schema_version: Literal[1] = 1
    md2_version: Text
    split: Split
    frames: list[int] = Field(min_length=1, max_length=100)
    stereo: bool
    depth: DepthInfo | None
    size: tuple[Side, Side] | None
    codec: Codec
    quality: int | None
    jpeg: JpegInfo | None = None
    seed: int
    components: list[Text]
    optional_components: dict[Text, int]
    skipped: int = Field(ge=0)
    plan_sha256: Sha256 | None = None
    shards: list[Shard] = Field(min_length=1)

    @field_validator("shards")
    @classmethod
    def _no_name_twice(cls, shards: list[Shard]) -> list[Shard]:
        """Two entries would stand for one file, which can be only one of them."""
        if twice := [name for name, count in Counter(shard.name for shard in shards).items() if count > 1]:
            raise ValueError(f"shard {twice[0]!r} is listed twice")
        return shards

    @property
    def parts(self) -> list[str]:
        return sorted({shard.part for shard in self.shards})

    def part(self, name: str) -> list[Shard]:
        """Shards of one part, in reading order.

        Raises:
            DatasetError: there is no such part.
        """
        found = sorted((s for s in self.shards if s.part == name), key=lambda s: s.name)
        if not found:
            raise DatasetError(f"the dataset has no part {name!r}; it has {', '.join(self.parts) or 'none'}")
        return found

    def samples(self, part: str) -> int:
        return sum(shard.samples for shard in self.part(part))

    @property
    def offsets(self) -> list[Offset]:
        """All images of a sample: the frame offsets, then "s" where there is a stereo partner."""
        offsets: list[Offset] = list(self.frames)
        return [*offsets, "s"] if self.stereo else offsets

    def image_component(self, offset: Offset) -> str:
        return image_component(offset, self.codec)

    @property
    def encoding(self) -> str:
        """How images are stored, for people: `JPEG 93, 4:4:4`."""
        if self.codec != "jpeg":
            return {"png": "PNG (lossless)", "ppm": "PPM (uncompressed)"}[self.codec]
        tables = "JPEG, even tables" if self.quality is None else f"JPEG, quality {self.quality}"
        if self.jpeg is None or self.jpeg.chroma == "444":
            return f"{tables}, chroma 4:4:4"
        return f"{tables}, chroma 4:2:0" + f" (smoothed, {self.jpeg.chroma_blur:g} px)" * bool(self.jpeg.chroma_blur)

    def to_json(self) -> str:
        """Stable text: the same dataset gives the same bytes, also one that was packed before `jpeg` was recorded."""
        absent = {"jpeg"} if self.jpeg is None else None
        return json.dumps(self.model_dump(mode="json", exclude=absent), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> Manifest:
        """Parse; `where` (path or URL) goes into the message.

        Raises:
            DatasetError: not JSON, another schema version, or a field missing, unknown or unsafe.
        """
        try:
            data = json.loads(text)
            version = data.get("schema_version") if isinstance(data, dict) else None
            if version != SCHEMA_VERSION:
                raise DatasetError(
                    f"{where}: schema version {version}, this md2 reads {SCHEMA_VERSION}; use the md2 that packed it"
                )
            return cls.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            raise DatasetError(f"{where}: {field}: {first['msg']}; pack or pull the dataset again") from error
        except (
            ValueError,
            RecursionError,
        ) as error:  # also: not UTF-8, numbers of thousands of digits, nested too deep
            raise DatasetError(f"{where}: not JSON ({error}); pack or pull the dataset again") from error
