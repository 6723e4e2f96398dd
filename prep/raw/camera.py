"""`camera.yaml`: the camera of your own drives."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from prep.raw.calibration import StereoCalibration, check_intrinsics
from prep.raw.files import MAX_TEXT_BYTES
from prep.raw.text import decode_text
from prep.raw.view import Lens, View
from shards.errors import InputError
from shards.files import open_regular
from shards.yaml_text import load_yaml

CAMERA_FILE = "camera.yaml"
_NEEDED = "needed are width, height, fx, fy, cx, cy; or fov alone (docs/camera.md)"
_INTRINSICS = ("fx", "fy", "cx", "cy")
_DISTORTION = re.compile(r"k[1-6]|p[12]|d|dist\w*|distortion\w*|xi|camera_model|model", re.IGNORECASE)
_OPENCV_HEADER = re.compile(r"%YAML[: ][\d.]+\s*(---)?\s*\n")
_MATRICES = ("camera_matrix", "cameraMatrix", "K", "k", "intrinsics", "camera_matrix_left", "M1")
_COEFFICIENTS = ("distortion_coefficients", "distortion_coeffs", "dist_coeffs", "distCoeffs", "D", "d", "D1")
_PINHOLE = ("", "none", "pinhole")
_BROWN = ("plumb_bob", "radtan", "rational_polynomial", "opencv", "brown")
_FISHEYE = ("equidistant", "fisheye", "kannala_brandt")


class Crop(BaseModel):
    """Pixels to leave out at each side of the frames."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    left: int = Field(0, ge=0)
    top: int = Field(0, ge=0)
    right: int = Field(0, ge=0)
    bottom: int = Field(0, ge=0)


class Camera(BaseModel):
    """`camera.yaml`, in pixels of the frames as they are, upright, pixel centres at integers.

    Folders are relative to a drive's; `left: .` if frames lie in the drive's folder itself. `numbering` says what makes
    two frames neighbours: `order`, that their names follow each other (timestamps do); `names`, that the number in
    their names does, so that a dropped frame is a gap. `rate` is the most frames a second that are taken of a video.

    `distortion` (k1, k2, p1, p2, and k3, k4, k5, k6 if known) or `fisheye` (k1 to k4) are OpenCV's; see `View`.
    `fov`, the horizontal field of view in degrees, stands for intrinsics that are not known.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    width: int | None = Field(None, gt=0, le=65_536)
    height: int | None = Field(None, gt=0, le=65_536)
    fx: float | None = Field(None, gt=0)
    fy: float | None = Field(None, gt=0)
    cx: float | None = None
    cy: float | None = None
    fov: float | None = Field(None, ge=5, le=150)
    distortion: tuple[float, ...] | None = None
    fisheye: tuple[float, float, float, float] | None = None
    crop: Crop = Crop()
    rate: float = Field(10.0, gt=0, le=1000)
    baseline: float | None = Field(None, gt=1e-6, lt=1000)
    left: str = "left"
    right: str = "right"
    depth: str = "depth"
    numbering: Literal["order", "names"] = "order"

    @field_validator("left", "right", "depth")
    @classmethod
    def _inside(cls, folder: str) -> str:
        if folder.startswith(("/", "~")) or ".." in folder.split("/") or "\0" in folder:
            raise ValueError("a folder inside the drive's, without ..")
        return folder.strip("/")

    @field_validator("distortion")
    @classmethod
    def _five(cls, values: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if values is None:
            return None
        if len(values) not in (4, 5, 8, 12, 14) or any(values[8:]):
            raise ValueError("k1, k2, p1, p2, k3 are needed, in this order (or 4 or 8 numbers, as OpenCV has them)")
        return (*values[:8], *[0.0] * (8 - len(values)))

    @model_validator(mode="after")
    def _complete(self) -> Camera:
        missing = [name for name in ("width", "height", *_INTRINSICS) if getattr(self, name) is None]
        if self.fov is None and missing:
            raise ValueError(f"{missing[0]} is missing")
        if self.fov is not None and not {*_INTRINSICS} <= {*missing}:
            raise ValueError("fov stands for fx, fy, cx and cy; leave out the one or the others")
        if self.fov is not None and (self.width is None) != (self.height is None):
            raise ValueError("width and height go together")
        if self.lens is not None and self.fov is not None:
            raise ValueError("distortion goes with the fx, fy, cx, cy that it was measured with, not with fov")
        if self.distortion is not None and self.fisheye is not None:
            raise ValueError("distortion or fisheye, not both")
        return self

    @property
    def lens(self) -> Lens | None:
        """The lens; None if it does not distort."""
        if self.fisheye is not None:
            return Lens("fisheye", self.fisheye)
        return Lens("distortion", self.distortion) if self.distortion is not None and any(self.distortion) else None

    def view(self, frame: tuple[int, int], where: str) -> View:
        """What is packed of frames of this size.

        Args:
            frame: (width, height), for a camera file that has none.

        Raises:
            InputError: the crop leaves nothing, or intrinsics that cannot be pixels of the frames.
        """
        width, height = size = (self.width or frame[0], self.height or frame[1])
        if self.fov is not None:
            focal = width / (2 * math.tan(math.radians(self.fov) / 2))
            k = (focal, focal, (width - 1) / 2, (height - 1) / 2)
        else:
            assert self.fx and self.fy and self.cx is not None and self.cy is not None
            k = (self.fx, self.fy, self.cx, self.cy)
            check_intrinsics(*k, size, where, "values are in pixels of the frames")
        box = (self.crop.left, self.crop.top, width - self.crop.right, height - self.crop.bottom)
        if box[2] - box[0] < _LEAST or box[3] - box[1] < _LEAST:
            raise InputError(f"{where}: crop leaves less than {_LEAST} pixels of frames of {width}x{height}")
        return View(size, k, box, self.lens, where)

    def calibration(self, view: View, where: str) -> StereoCalibration:
        """A rectified pair: the right camera is `baseline` metres to the right, with the same intrinsics."""
        fx, fy, cx, cy = view.intrinsics
        left = np.array([[fx, 0, cx, 0], [0, fy, cy, 0], [0, 0, 1, 0]], dtype=np.float64)
        right = left.copy()
        right[0, 3] = -fx * (self.baseline or 0.0)
        return StereoCalibration({"l": left, "r": right}, view.size, None, where, guessed=self.fov is not None)


_LEAST = 8
"""Pixels of a side."""


def parse_camera(content: bytes, where: str) -> Camera:
    """A camera file's content: md2's own, or a calibration of OpenCV, ROS or Kalibr, to which md2's keys may be added.

    Args:
        where: the file, for messages.

    Raises:
        InputError: not YAML; or a field is missing, unknown, or impossible; names it.
    """
    text = _OPENCV_HEADER.sub("", decode_text(content), count=1)
    try:
        data = load_yaml(text, _Loader)
    except (yaml.YAMLError, ValueError) as error:  # also: bytes that are no text, or an impossible date
        raise InputError(f"{where}: not YAML ({' '.join(str(error).split())[:200]})") from error
    except RecursionError:
        raise InputError(f"{where}: nested too deeply for a camera file; {_NEEDED}") from None
    if data is not None and not isinstance(data, Mapping):
        raise InputError(f"{where}: not lines of the form fov: 90; {_NEEDED}")
    if data and not {*_INTRINSICS, "fov"} & set(data):
        data = _from_other_tool(data, where) or data
    try:
        camera = Camera.model_validate(data or {})
    except ValidationError as error:
        raise InputError(f"{where}: {_describe(error)}; {_NEEDED}") from error
    if camera.width is not None and camera.height is not None:
        _ = camera.view((camera.width, camera.height), where).intrinsics
    return camera


def read_view(path: Path) -> Callable[[Image.Image], tuple[Image.Image, tuple[float, float, float, float]]]:
    """What prep makes of frames by this camera file: a function that gives a frame's picture and its intrinsics.

    Raises:
        InputError: as `parse_camera`; or no such file. The function: a frame of another size than the file's.
    """
    try:
        with open_regular(path) as file:
            camera = parse_camera(file.read(MAX_TEXT_BYTES), str(path))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    views = lru_cache(maxsize=1)(lambda size: camera.view(size, str(path)))

    def picture(frame: Image.Image) -> tuple[Image.Image, tuple[float, float, float, float]]:
        view = views(frame.size)
        if view.frame != frame.size:
            size = f"{frame.width}x{frame.height}"
            raise InputError(f"a frame of {size}, but {path} is for {view.frame[0]}x{view.frame[1]}")
        return view.apply(frame), view.intrinsics

    return picture


class _Loader(yaml.SafeLoader):
    """As SafeLoader, but OpenCV's `!!opencv-matrix` is a mapping like any other."""


def _untagged(loader: yaml.SafeLoader, suffix: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    return loader.construct_scalar(node)  # type: ignore[arg-type]


_Loader.add_multi_constructor("tag:yaml.org,2002:opencv", _untagged)


def _describe(error: ValidationError) -> str:
    first = error.errors()[0]
    field = ".".join(map(str, first["loc"]))[:60]
    if first["type"] == "extra_forbidden":
        if _DISTORTION.fullmatch(field):
            return f"{field}: a lens is written as distortion: [k1, k2, p1, p2, k3] or fisheye: [k1, k2, k3, k4]"
        return f"{field}: no such field"
    value = first.get("input")
    shown = f" (it is {str(value)[:40]!r})" if isinstance(value, str | int | float) else ""
    return f"{field or 'file'}: {first['msg'].removeprefix('Value error, ')}{shown}".removeprefix("file: ")


def _numbers(data: Mapping[Any, Any], names: tuple[str, ...]) -> tuple[str, list[float]] | None:
    """The first of these entries that holds numbers, as a list or as a matrix of OpenCV's; with its name."""
    for name in names:
        value = data.get(name)
        try:
            numbers = np.array(value.get("data") if isinstance(value, Mapping) else value, dtype=np.float64).ravel()
        except (TypeError, ValueError, RecursionError):
            continue
        if value is not None and np.isfinite(numbers).all():
            return name, numbers.tolist()
    return None


def _from_other_tool(file: Mapping[Any, Any], where: str) -> dict[str, Any] | None:
    """Fields of a calibration by OpenCV, ROS or Kalibr (of its first camera); None if it is neither.

    Raises:
        InputError: its lens is of a kind that is not known here, or the size of its frames is missing.
    """
    data = file["cam0"] if isinstance(file.get("cam0"), Mapping) else file
    matrix = _numbers(data, _MATRICES)
    if matrix is None or len(matrix[1]) not in (4, 9):
        return None
    name, k = matrix
    fx, fy, cx, cy = k if len(k) == 4 else (k[0], k[4], k[2], k[5])
    sizes = _numbers(data, ("resolution", "image_size"))
    width, height = (data.get(f"image_{side}", data.get(side)) for side in ("width", "height"))
    if sizes is not None and len(sizes[1]) == 2:
        width, height = map(int, sizes[1])
    if width is None or height is None:
        raise InputError(
            f"{where}: another tool's calibration (its {name}) without the frames' size; add width: and height:"
        )
    found = {"width": width, "height": height, "fx": fx, "fy": fy, "cx": cx, "cy": cy}
    coefficients = _numbers(data, _COEFFICIENTS)
    kind = str(data.get("distortion_model") or ("fisheye" if data.get("fisheye_model") in (1, True) else "")).lower()
    lens = str(data.get("camera_model") or "").lower()
    if lens not in (*_PINHOLE, *_FISHEYE) or kind not in (*_PINHOLE, *_BROWN, *_FISHEYE):
        raise InputError(
            f"{where}: a lens of the kind {lens if lens not in _PINHOLE else kind}; plumb_bob (radtan), "
            "rational_polynomial and equidistant are read: calibrate with one of them, or undistort the frames first"
        )
    if coefficients is not None and any(coefficients[1]):
        found["fisheye" if {lens, kind} & {*_FISHEYE} else "distortion"] = coefficients[1]
    own = {*Camera.model_fields} - {*found}
    return found | {key: file[key] for key in own & {*file}}
