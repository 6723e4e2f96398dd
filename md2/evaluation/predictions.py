"""Files of other projects: predicted disparities, depth PNGs, and the official code's ground truth."""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from md2.data.batch import Batch
from shards.errors import InputError, first_line
from shards.sample import DEPTH_SCALE

MOST_TRUTH_BYTES = 8 << 30
"""Size of the unpacked ground truth that is read at most; Eigen's 697 maps are 1.3 GB."""


def keys_file(predictions: Path) -> Path:
    """Path of the sample keys of saved predictions."""
    return predictions.with_name(predictions.name + ".keys.txt")


def open_predictions(path: Path, order: Sequence[str] | None) -> Callable[[Batch], Tensor]:
    """Open predictions that were saved: an `.npy` of disparities, or a folder of 16-bit depth PNGs.

    Args:
        order: sample key of each row; None, or where FILE.keys.txt lies beside an .npy: as that file says.

    Returns:
        Batch -> (B, 1, H, W) disparities, found by sample key.

    Raises:
        InputError: missing, damaged, of another shape or kind, or without an order.
    """
    if path.is_dir():
        return _from_pngs(path, order)
    rows = read_disparities(path)
    keys = keys_file(path)
    if order is not None and not keys.is_file():
        return saved_disparity(rows, order)
    try:
        if not keys.is_file():
            raise FileNotFoundError(keys)
        return saved_disparity(rows, keys.read_text(encoding="utf-8").split())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}: the order of its images is unknown: {keys.name} is not beside it; name the split whose lines "
            "they follow with --split"
        ) from error


def read_disparities(path: Path) -> NDArray[np.floating[Any]]:
    """Memory-map an `.npy` of disparities, (N, H, W) or (N, 1, H, W); object arrays, which run code, are refused.

    Raises:
        InputError: missing, damaged, of another shape or kind.
    """
    _require_file(path)
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError, SyntaxError, zipfile.BadZipFile) as error:
        # NumPy would advise to unpickle, which must not be done.
        reason = "it holds Python objects, or is not an .npy" if "pickle" in str(error) else first_line(error)
        raise InputError(f"{path}: not an .npy of plain numbers ({reason})") from error
    if not isinstance(rows, np.ndarray):
        raise InputError(f"{path}: an archive of arrays; one .npy with all disparities, (N, H, W), is needed")
    if rows.ndim == 4 and rows.shape[1] == 1:
        rows = rows[:, 0]
    if rows.ndim != 3 or not np.issubdtype(rows.dtype, np.floating):
        raise InputError(f"{path}: {rows.dtype} {rows.shape}; floating-point (N, H, W) is needed")
    disparities: NDArray[np.floating[Any]] = rows
    return disparities


def _require_file(path: Path) -> None:
    """Refuse what is missing, and pipes, which would be waited for."""
    if not path.is_file():
        raise InputError(f"{path}: {'not a file' if path.exists() else 'no such file'}")


def saved_disparity(rows: NDArray[np.floating[Any]], order: Sequence[str]) -> Callable[[Batch], Tensor]:
    """Look up saved disparities by sample key.

    Args:
        rows: (N, H, W).
        order: key of each row. May name more than the dataset has: disparities of Eigen's 697 images serve
            the 652 with improved ground truth.

    Raises:
        InputError: `rows` and `order` differ in length; when called, a sample that is not among them.
    """
    if len(rows) != len(order):
        raise InputError(f"{len(rows)} predictions for {len(order)} images: one for each line of the split is needed")
    row_of = {key: index for index, key in enumerate(order)}

    def find(batch: Batch) -> Tensor:
        missing = [key for key in batch.keys if key not in row_of]
        if missing:
            raise InputError(
                f"sample {missing[0]} is not in the list that orders the predictions: name the right split"
            )
        chosen = np.stack([np.asarray(rows[row_of[key]], dtype=np.float32) for key in batch.keys])
        return torch.from_numpy(chosen)[:, None].to(batch.intrinsics.device)

    return find


def _from_pngs(folder: Path, order: Sequence[str] | None) -> Callable[[Batch], Tensor]:
    """Depth PNGs of KITTI's benchmark (metres x 256), named after sample keys, or one a line of `order`."""
    files = depth_pngs(folder)
    if not files:
        raise InputError(f"{folder}: no .png in this folder of predictions")
    path_of = {path.stem: path for path in files}
    if order is not None and not path_of.keys() & set(order):
        if len(files) != len(order):
            raise InputError(
                f"{folder}: {len(files)} PNGs for {len(order)} lines of the split, and their names are no sample keys"
            )
        path_of = dict(zip(order, files, strict=True))

    def find(batch: Batch) -> Tensor:
        rows = []
        for key in batch.keys:
            if key not in path_of:
                raise InputError(
                    f"{folder}: no {key}.png, the prediction of that sample; --split names the images of a folder "
                    "whose files have other names"
                )
            rows.append(_read_disparity_png(path_of[key]))
        height, width = (max(row.shape[axis] for row in rows) for axis in (0, 1))
        sized = [torch.from_numpy(row)[None, None] for row in rows]
        resized = [torch.nn.functional.interpolate(row, (height, width), mode="bilinear") for row in sized]
        return torch.cat(resized).to(batch.intrinsics.device)

    return find


def depth_pngs(folder: Path) -> list[Path]:
    """The PNGs directly in a folder, `9.png` before `10.png`."""
    found = (path for path in folder.glob("*.png") if not path.name.startswith(".") and path.is_file())
    return sorted(found, key=_counting)


def _read_disparity_png(path: Path) -> NDArray[np.float32]:
    """Disparity of a 16-bit depth PNG; 0, infinitely far, where it has no depth."""
    depth = _read_depth_png(path)
    disparity: NDArray[np.float32] = np.divide(1, depth, out=np.zeros_like(depth), where=depth > 0)
    return disparity


def _read_depth_png(path: Path) -> NDArray[np.float32]:
    """Metres of a 16-bit depth PNG; 0 where it has no depth."""
    try:
        with Image.open(path) as image:
            mode, values = image.mode, np.asarray(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: cannot be read as a PNG ({first_line(error)})") from error
    if not mode.startswith("I"):
        raise InputError(f"{path}: mode {mode}; 16-bit grey depth (metres x 256) is needed")
    return values.astype(np.float32) / np.float32(DEPTH_SCALE)


def _counting(path: Path) -> list[tuple[str, int]]:
    pieces = re.split(r"(\d+)", path.stem)
    return [("", int(piece)) if piece.isdecimal() else (piece, -1) for piece in pieces]


# Ground truth without images


@dataclass(frozen=True)
class GroundTruth:
    """Depth maps (H, W) of several sizes, metres, 0 = no measurement; or the PNGs that hold them. One key each."""

    keys: list[str]
    maps: Sequence[NDArray[np.float32] | Path]

    def batches(self, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
        """Batches without images, of the first `limit` maps.

        Raises:
            InputError: a PNG cannot be read.
        """
        count = len(self.maps[:limit])
        for start in range(0, count, batch_size):
            stop = min(start + batch_size, count)
            chosen = [_read_depth_png(one) if isinstance(one, Path) else one for one in self.maps[start:stop]]
            sizes = torch.tensor([depth.shape for depth in chosen])
            height, width = sizes.max(0).values.tolist()
            padded = torch.zeros(len(chosen), 1, height, width)
            for row, depth in zip(padded, chosen, strict=True):
                row[0, : depth.shape[0], : depth.shape[1]] = torch.from_numpy(depth)
            yield Batch(
                images={},
                augmented={},
                intrinsics=torch.eye(3).repeat(len(chosen), 1, 1),
                stereo=None,
                metres_per_unit=1.0,
                depth=padded,
                depth_size=sizes,
                keys=self.keys[start:stop],
            )


def is_ground_truth(dataset: str) -> bool:
    """Whether it is a `gt_depths.npz`, or a folder of PNGs that is no packed dataset."""
    folder = Path(dataset)
    return dataset.endswith(".npz") or (
        folder.is_dir() and not (folder / "dataset.json").exists() and bool(depth_pngs(folder))
    )


def open_ground_truth(path: Path, order: Sequence[str] | None) -> GroundTruth:
    """Ground truth of `gt_depths.npz`, or of a folder of 16-bit PNGs (metres x 256, 0 = no measurement).

    Args:
        order: sample keys that a split gives the maps: all maps in this order, or PNGs that have these names.

    Raises:
        InputError: missing, damaged, or not one map for each line of the split.
    """
    maps: Sequence[NDArray[np.float32] | Path]
    if path.is_dir():
        maps = depth_pngs(path)
        keys = [one.stem for one in maps]
        if order is not None and not set(keys).isdisjoint(order):
            path_of = dict(zip(keys, maps, strict=True))
            keys = [key for key in order if key in path_of]
            maps, order = [path_of[key] for key in keys], None
    else:
        maps = read_ground_truth(path)
        keys = [f"{number:06d}" for number in range(len(maps))]
    if order is not None and len(order) != len(maps):
        raise InputError(f"{path}: {len(maps)} depth maps for {len(order)} lines of the split")
    return GroundTruth(list(order or keys), maps)


def read_ground_truth(path: Path) -> list[NDArray[np.float32]]:
    """Read `gt_depths.npz` of the official code: depth maps (H, W) of several sizes, metres, 0 = no measurement.

    The array in it is pickled, since its maps differ in size. Only what rebuilds a NumPy array is unpickled, so that
    the file cannot run code.

    Raises:
        InputError: missing, damaged, too large, or anything else than depth maps.
    """
    _require_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            names = [info for info in archive.infolist() if info.filename == "data.npy"]
            if len(names) != 1:
                raise InputError(f"{path}: no array 'data' in it; gt_depths.npz of the official code has one")
            if names[0].file_size > MOST_TRUTH_BYTES:
                raise InputError(f"{path}: unpacks to {names[0].file_size / 1e9:,.0f} GB; that is no gt_depths.npz")
            with archive.open(names[0]) as file:
                content = file.read(names[0].file_size)
    except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise InputError(f"{path}: not an .npz archive, or damaged ({first_line(error)})") from error
    try:
        maps = _load_maps(content)
    except Exception as error:  # a damaged pickle fails in any way
        raise InputError(f"{path}: its array cannot be read ({first_line(error)})") from error
    for number, depth in enumerate(maps):
        if not isinstance(depth, np.ndarray) or depth.ndim != 2 or not np.issubdtype(depth.dtype, np.floating):
            raise InputError(f"{path}: entry {number} is not a floating-point depth map (H, W)")
    if not maps:
        raise InputError(f"{path}: no depth maps in it")
    return [np.asarray(depth, dtype=np.float32) for depth in maps]


def _load_maps(content: bytes) -> list[Any]:
    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    if not dtype.hasobject:  # all maps of one size
        return list(np.load(io.BytesIO(content), allow_pickle=False))
    loaded = _ArraysOnly(file).load()
    if not isinstance(loaded, np.ndarray) or loaded.shape != shape or len(shape) != 1:
        raise ValueError("not a list of arrays")
    return list(loaded)


_ARRAY_PARTS = {
    *((module, "_reconstruct") for module in ("numpy.core.multiarray", "numpy._core.multiarray")),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


class _ArraysOnly(pickle.Unpickler):
    """Unpickles NumPy arrays and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ARRAY_PARTS:
            raise pickle.UnpicklingError(f"it holds {module}.{name}, which is no array")
        return super().find_class(module, name)
