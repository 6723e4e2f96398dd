"""A page that shows predictions in a browser, without a server: image, disparity, depth under the pointer, point cloud.

Everything is in one file. `viewer.html` beside this module is its template, `viewer.js` its script.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from md2.inference.inputs import Intrinsics
from md2.inference.predictor import DepthMap
from md2.visualize import Map, color_ends, colorize, write_file
from shards.errors import visible

MOST_SAMPLES = 12
"""More would make the page slow to load; these are spread evenly over all predictions."""
IMAGE_WIDTH, DEPTH_WIDTH = 1024, 512
"""Larger images and depth maps are scaled down: the networks' own depth maps are about as fine."""
_LEVELS = 65535


class Viewer:
    """Collects predictions and writes the page.

    Args:
        path: the page.
        cmap: matplotlib's name of the colour map.
        max_depth: the point clouds leave farther points out; in depth's unit.
        most: predictions that are shown.
    """

    def __init__(self, path: Path, cmap: str, max_depth: float, most: int = MOST_SAMPLES) -> None:
        self.path, self._cmap, self._max_depth, self._most = path, cmap, max_depth, most
        self._kept: list[dict[str, Any]] = []
        self._every, self._seen = 1, 0

    def add(self, name: str, result: DepthMap, camera: Intrinsics) -> None:
        """Show a prediction, if it is one of the evenly spread ones.

        Args:
            camera: fx, fy, cx, cy in pixels of the image.
        """
        number, self._seen = self._seen, self._seen + 1
        if number % self._every:
            return
        if len(self._kept) == self._most:
            self._kept, self._every = self._kept[::2], 2 * self._every
            if number % self._every:
                return
        self._kept.append(_sample(name, result, camera))

    def write(self) -> None:
        """Write the page.

        Raises:
            InputError: it cannot be written.
        """
        write_file(self.path, self.html().encode())

    def html(self) -> str:
        """The page."""
        table = colorize(np.linspace(0, 1, 256, dtype=np.float32)[None], cmap=self._cmap, low=0, high=1)
        data = {"samples": self._kept, "colours": _base64(table.tobytes()), "maxDepth": self._max_depth}
        shown = "1 image" if self._seen == 1 else f"{self._seen} images"
        if self._seen > len(self._kept):
            shown = f"{len(self._kept)} of {shown}"
        return _page(f"Depth of {shown}", data)


def script() -> tuple[str, str]:
    """The page's script, and what a policy calls it."""
    text = (files("md2.inference") / "viewer.js").read_text("utf-8")
    return text, f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _page(title: str, data: dict[str, Any]) -> str:
    """Fill the template. The policy lets the page's own script run and nothing else, and fetch nothing."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    code, digest = script()
    # A name with </script> in it must not end the data.
    text = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    environment = Environment(loader=PackageLoader("md2.inference", ""), autoescape=True, undefined=StrictUndefined)
    template = environment.get_template("viewer.html")
    return template.render(title=title, digest=digest, script=Markup(code), data=Markup(text))


def _sample(name: str, result: DepthMap, camera: Intrinsics) -> dict[str, Any]:
    height, width = result.depth.shape
    picture = Image.fromarray(result.image)
    picture.thumbnail((IMAGE_WIDTH, IMAGE_WIDTH), Image.Resampling.LANCZOS)
    jpeg = io.BytesIO()
    picture.save(jpeg, "JPEG", quality=88)
    depth, camera = _reduced(result.depth, camera)
    low, high = color_ends(1 / depth)
    return {
        "name": visible(name),
        "unit": "m" if result.metric else "",
        "image": f"data:image/jpeg;base64,{_base64(jpeg.getvalue())}",
        "size": [width, height],
        "width": depth.shape[1],
        "height": depth.shape[0],
        "camera": list(camera),
        "ends": [low, high],
        **_encode(depth),
    }


def _reduced(depth: Map, camera: Intrinsics) -> tuple[Map, Intrinsics]:
    """Every n-th row and column of a depth map, and the camera of what remains."""
    step = -(-max(depth.shape) // DEPTH_WIDTH)
    first = (step - 1) // 2
    fx, fy, cx, cy = camera
    reduced = np.ascontiguousarray(depth[first::step, first::step])
    return reduced, (fx / step, fy / step, (cx - first) / step, (cy - first) / step)


def _encode(depth: Map) -> dict[str, Any]:
    """Depth as 16-bit steps of its logarithm: depth = first · exp(step · value), which is exact to 0.02 % or better."""
    logs = np.log(depth.astype(np.float64))
    first, last = float(logs.min()), float(logs.max())
    step = max(last - first, 1e-9) / _LEVELS
    values = np.rint((logs - first) / step).astype("<u2")
    return {"first": float(np.exp(first)), "step": step, "depth": _base64(values.tobytes())}


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
