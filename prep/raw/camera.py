"""`camera.yaml`: the camera of your own drives."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from prep.raw.calibration import StereoCalibration, check_intrinsics
from prep.raw.text import decode_text
from shards.errors import InputError

CAMERA_FILE = "camera.yaml"
_NEEDED = "needed are width, height, fx, fy, cx, cy"
_DISTORTION = re.compile(r"k[1-6]|p[12]|d|dist\w*|distortion\w*|xi|camera_model|model", re.IGNORECASE)
_OPENCV_HEADER = re.compile(r"%YAML[: ][\d.]+\s*(---)?\s*\n")


class Camera(BaseModel):
    """`camera.yaml`, in pixels of the frames as they are, pixel centres at integers.

    Folders are relative to a drive's; `left: .` if frames lie in the drive's folder itself. `numbering` says what makes
    two frames neighbours: `order`, that their names follow each other (timestamps do); `names`, that the number in
    their names does, so that a dropped frame is a gap.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    width: int = Field(gt=0, le=65_536)
    height: int = Field(gt=0, le=65_536)
    fx: float = Field(gt=0)
    fy: float = Field(gt=0)
    cx: float
    cy: float
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

    def calibration(self, where: str) -> StereoCalibration:
        """A rectified pair: the right camera is `baseline` metres to the right, with the same intrinsics."""
        left = np.array([[self.fx, 0, self.cx, 0], [0, self.fy, self.cy, 0], [0, 0, 1, 0]], dtype=np.float64)
        right = left.copy()
        right[0, 3] = -self.fx * (self.baseline or 0.0)
        return StereoCalibration({"l": left, "r": right}, (self.width, self.height), None, where)


def parse_camera(content: bytes, where: str) -> Camera:
    """A camera file's content.

    Args:
        where: the file, for messages.

    Raises:
        InputError: not YAML; or a field is missing, unknown, or impossible for pixels of the image; names it.
    """
    text = _OPENCV_HEADER.sub("", decode_text(content), count=1)
    try:
        data = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:  # also: bytes that are no text, or an impossible date
        raise InputError(f"{where}: not YAML ({' '.join(str(error).split())[:200]})") from error
    except RecursionError:
        raise InputError(f"{where}: nested too deeply for a camera file; {_NEEDED}") from None
    if isinstance(data, Mapping) and not {"fx", "fy"} <= set(data):
        _refuse_foreign(data, where)
    try:
        camera = Camera.model_validate(data if data is not None else {})
    except ValidationError as error:
        raise InputError(f"{where}: {_describe(error)}; {_NEEDED}") from error
    size = (camera.width, camera.height)
    check_intrinsics(camera.fx, camera.fy, camera.cx, camera.cy, size, where, "values are in pixels of the frames")
    return camera


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
    field = ".".join(map(str, first["loc"]))[:60] or "file"
    if first["type"] == "extra_forbidden":
        if _DISTORTION.fullmatch(field):
            return (
                f"{field} describes a lens distortion, and frames must be undistorted; undistort them first "
                "(cv2.undistort), give the new intrinsics, and remove it"
            )
        return f"{field}: no such field"
    value = first.get("input")
    shown = f" (it is {str(value)[:40]!r})" if isinstance(value, str | int | float) else ""
    return f"{field}: {first['msg']}{shown}"


def _refuse_foreign(data: Mapping[Any, Any], where: str) -> None:
    """Say what to write if the file is another tool's calibration.

    Raises:
        InputError: it is OpenCV's, ROS's or a bare matrix K, with the values to write.
    """
    for name in ("camera_matrix", "cameraMatrix", "K", "k", "intrinsics", "camera_matrix_left", "M1"):
        try:
            matrix = data.get(name)
            values = matrix.get("data") if isinstance(matrix, Mapping) else matrix
            k = np.array(values, dtype=np.float64).ravel()
        except (TypeError, ValueError, RecursionError):
            continue
        if k.size in (4, 9) and np.isfinite(k).all():
            fx, fy, cx, cy = k if k.size == 4 else k[[0, 4, 2, 5]]
            size = {key: data.get(f"image_{key}", data.get(key)) for key in ("width", "height")}
            lines = ", ".join(f"{key}: {value if isinstance(value, int) else '…'}" for key, value in size.items())
            raise InputError(
                f"{where}: another tool's calibration (its {name}); undistort the frames, then write {lines}, "
                f"fx: {fx:g}, fy: {fy:g}, cx: {cx:g}, cy: {cy:g}"
            )
