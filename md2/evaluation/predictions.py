"""Files of other projects: predicted disparities, depth PNGs, and the official code's ground truth."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from md2.data.batch import Batch
from md2.inference.inputs import by_number
from shards.errors import InputError, first_line
from shards.files import read_small
from shards.sample import DEPTH_SCALE

MOST_TRUTH_BYTES = 8 << 30
"""Largest size of unpacked ground truth that is read; Eigen's 697 maps are 1.3 GB."""
Floats = NDArray[np.floating[Any]]
DepthFile = tuple[str, NDArray[np.float32] | Path]
"""A sample key with its depth map (H, W), metres, 0 = no measurement; or with the PNG that holds it."""


def keys_file(predictions: Path) -> Path:
    """Path of the sample keys of saved predictions."""
    return predictions.with_name(predictions.name + ".keys.txt")


def open_predictions(path: Path, order: Sequence[str] | None) -> Callable[[Batch], Tensor]:
    """Open saved predictions: an `.npy` of disparities, or a folder of 16-bit depth PNGs (metres x 256).

    Args:
        order: sample key of each row, or of each PNG unless their names are keys. It may name more than the dataset
            has: disparities of Eigen's 697 images serve the 652 with improved ground truth. FILE.keys.txt beside an
            `.npy` overrides it.

    Returns:
        Batch -> (B, 1, H, W) disparities by sample key. It raises InputError for a sample without a prediction.

    Raises:
        InputError: missing, damaged, of another shape or kind, or the order is unknown.
    """
    stored = _pngs_by_key(path, order) if path.is_dir() else _rows_by_key(path, order)

    def find(batch: Batch) -> Tensor:
        rows = []
        for key in batch.keys:
            if key not in stored:
                raise InputError(f"{path}: no prediction of sample {key}; --split names the images in their order")
            found = stored[key]
            row = _read_disparity_png(found) if isinstance(found, Path) else np.array(found, dtype=np.float32)
            rows.append(torch.from_numpy(row)[None, None])
        size = (max(row.shape[2] for row in rows), max(row.shape[3] for row in rows))
        resized = [torch.nn.functional.interpolate(row, size, mode="bilinear") for row in rows]
        return torch.cat(resized).to(batch.intrinsics.device)

    return find


def _rows_by_key(path: Path, order: Sequence[str] | None) -> Mapping[str, Floats]:
    rows, keys = read_disparities(path), keys_file(path)
    try:
        if keys.is_file():
            order = read_small(keys).decode().split()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{keys}: cannot be read ({first_line(error)})") from error
    if order is None:
        raise InputError(
            f"{path}: the order of its images is unknown, since {keys.name} is not beside it; name the split whose "
            "lines they follow with --split"
        )
    if len(rows) != len(order):
        raise InputError(f"{path}: {len(rows)} predictions for {len(order)} images; one for each line is needed")
    return dict(zip(order, rows, strict=True))


def _pngs_by_key(folder: Path, order: Sequence[str] | None) -> Mapping[str, Path]:
    files = depth_pngs(folder)
    if not files:
        raise InputError(f"{folder}: no .png in this folder of predictions")
    path_of = {path.stem: path for path in files}
    if order is None or path_of.keys() & set(order):
        return path_of
    if len(files) != len(order):
        raise InputError(
            f"{folder}: {len(files)} PNGs for {len(order)} lines of the split, and their names are not sample keys"
        )
    return dict(zip(order, files, strict=True))


def read_disparities(path: Path) -> Floats:
    """Memory-map an `.npy` of disparities, (N, H, W) or (N, 1, H, W). Object arrays, which run code, are refused.

    Raises:
        InputError: missing, damaged, of another shape or kind.
    """
    _require_file(path)
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError, SyntaxError, zipfile.BadZipFile) as error:
        # NumPy's message advises to unpickle, which must not be done.
        reason = "it holds Python objects, or is not an .npy" if "pickle" in str(error) else first_line(error)
        raise InputError(f"{path}: not an .npy of plain numbers ({reason})") from error
    if not isinstance(rows, np.ndarray):
        raise InputError(f"{path}: an archive of arrays; one .npy with all disparities, (N, H, W), is needed")
    if rows.ndim == 4 and rows.shape[1] == 1:
        rows = rows[:, 0]
    if rows.ndim != 3 or not np.issubdtype(rows.dtype, np.floating):
        raise InputError(f"{path}: {rows.dtype} {rows.shape}; floating-point (N, H, W) is needed")
    disparities: Floats = rows
    return disparities


def _require_file(path: Path) -> None:
    """Refuse what is missing, and pipes, whose reader would wait."""
    if not path.is_file():
        raise InputError(f"{path}: {'not a file' if path.exists() else 'no such file'}")


def depth_pngs(folder: Path) -> list[Path]:
    """List the PNGs directly in a folder, `9.png` before `10.png`."""
    found = (path for path in folder.glob("*.png") if not path.name.startswith(".") and path.is_file())
    return sorted(found, key=by_number)


def _read_disparity_png(path: Path) -> NDArray[np.float32]:
    """Read a 16-bit depth PNG as disparity; 0, infinitely far, where it has no depth."""
    depth = _read_depth_png(path)
    disparity: NDArray[np.float32] = np.divide(1, depth, out=np.zeros_like(depth), where=depth > 0)
    return disparity


def _read_depth_png(path: Path) -> NDArray[np.float32]:
    """Read a 16-bit depth PNG as metres; 0 where it has no depth."""
    try:
        with Image.open(path) as image:
            mode, values = image.mode, np.asarray(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: cannot be read as a PNG ({first_line(error)})") from error
    if not mode.startswith("I"):
        raise InputError(f"{path}: mode {mode}; 16-bit grey depth (metres x 256) is needed")
    return values.astype(np.float32) / np.float32(DEPTH_SCALE)


# Ground truth without images


def is_ground_truth(dataset: str) -> bool:
    """Whether it is a `gt_depths.npz`, or a folder of PNGs that is not a packed dataset."""
    folder = Path(dataset)
    return dataset.endswith(".npz") or (
        folder.is_dir() and not (folder / "dataset.json").exists() and bool(depth_pngs(folder))
    )


def open_ground_truth(path: Path, order: Sequence[str] | None) -> list[DepthFile]:
    """Open the ground truth in `gt_depths.npz`, or in a folder of 16-bit PNGs (metres x 256, 0 = no measurement).

    Args:
        order: sample keys that a split gives the maps: all maps in this order, or PNGs that have these names.

    Raises:
        InputError: missing, damaged, or not one map for each line of the split.
    """
    maps: Sequence[NDArray[np.float32] | Path] = depth_pngs(path) if path.is_dir() else read_ground_truth(path)
    names = [one.stem if isinstance(one, Path) else f"{number:06d}" for number, one in enumerate(maps)]
    if path.is_dir() and order is not None and not set(names).isdisjoint(order):
        map_of = dict(zip(names, maps, strict=True))
        return [(key, map_of[key]) for key in order if key in map_of]
    if order is not None and len(order) != len(maps):
        raise InputError(f"{path}: {len(maps)} depth maps for {len(order)} lines of the split")
    return list(zip(order or names, maps, strict=True))


def truth_batches(files: Sequence[DepthFile], batch_size: int) -> Iterator[Batch]:
    """Yield batches without images.

    Raises:
        InputError: a PNG cannot be read.
    """
    for start in range(0, len(files), batch_size):
        chosen = files[start : start + batch_size]
        maps = [_read_depth_png(depth) if isinstance(depth, Path) else depth for _, depth in chosen]
        sizes = torch.tensor([depth.shape for depth in maps])
        height, width = sizes.max(0).values.tolist()
        padded = torch.zeros(len(maps), 1, height, width)
        for row, depth in zip(padded, maps, strict=True):
            row[0, : depth.shape[0], : depth.shape[1]] = torch.from_numpy(depth)
        yield Batch(
            images={},
            augmented={},
            intrinsics=torch.eye(3).repeat(len(maps), 1, 1),
            stereo=None,
            metres_per_unit=1.0,
            depth=padded,
            depth_size=sizes,
            keys=[key for key, _ in chosen],
        )


def read_ground_truth(path: Path) -> list[NDArray[np.float32]]:
    """Read `gt_depths.npz` of the official code: depth maps (H, W) of several sizes, metres, 0 = no measurement.

    The array in it is pickled, since its maps differ in size. Only what rebuilds a NumPy array is unpickled, so that
    the file cannot run code.

    Raises:
        InputError: missing, damaged, too large, or holds anything but depth maps.
    """
    _require_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            names = [info for info in archive.infolist() if info.filename == "data.npy"]
            if len(names) != 1:
                raise InputError(f"{path}: no array 'data' in it; gt_depths.npz of the official code has one")
            if names[0].file_size > MOST_TRUTH_BYTES:
                raise InputError(f"{path}: unpacks to {names[0].file_size / 1e9:,.0f} GB; too large for gt_depths.npz")
            content = archive.read(names[0])
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


_LONGEST_HEADER = 1 << 16
"""NumPy parses a header of any length as Python, and repeats it in its messages."""


def _load_maps(content: bytes) -> list[Any]:
    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    if version != (1, 0) and int.from_bytes(content[8:12], "little") > _LONGEST_HEADER:
        raise ValueError("its header is too long")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    if not dtype.hasobject:  # all maps have one size
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
            raise pickle.UnpicklingError(f"it holds {module}.{name}, which is not an array")
        return super().find_class(module, name)
