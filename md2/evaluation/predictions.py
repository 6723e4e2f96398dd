"""Files of other projects: predicted disparities, depth PNGs, and the official code's ground truth."""

from __future__ import annotations

import io
import math
import os
import pickle
import tempfile
import weakref
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from md2.data.batch import Batch
from md2.inference.inputs import by_number
from md2.visualize import open_picture
from shards.errors import InputError, StorageError, first_line
from shards.files import BoundedReader, bounded_zip, disk_error, read_small
from shards.sample import DEPTH_SCALE

MOST_TRUTH_BYTES = 4 << 30
"""Largest size of unpacked ground truth that is read; Eigen's 697 maps are 1.3 GB."""
Floats = NDArray[np.floating[Any]]


class MapStore:
    """A temporary file of depth maps: for each a bit for every pixel, then the depths of those that have one."""

    def __init__(self) -> None:
        self.file = tempfile.TemporaryFile()  # noqa: SIM115 - the maps keep it
        weakref.finalize(self, self.file.close)

    def add(self, depth: Floats) -> StoredMap:
        """Store a map.

        Raises:
            StorageError: the disk is full.
        """
        with np.errstate(over="ignore"):
            depth = depth.astype(np.float32)
        known = depth != 0
        try:
            offset = self.file.seek(0, os.SEEK_END)
            self.file.write(np.packbits(known).tobytes() + depth[known].tobytes())
        except OSError as error:
            raise disk_error(Path(tempfile.gettempdir()), error) from error
        return StoredMap(self, offset, (depth.shape[0], depth.shape[1]), int(known.sum()))


@dataclass(frozen=True)
class StoredMap:
    """A depth map (H, W), metres, 0 = no measurement, at a place in a store."""

    store: MapStore
    offset: int
    shape: tuple[int, int]
    count: int

    def read(self) -> NDArray[np.float32]:
        """Return the map."""
        file, pixels = self.store.file, math.prod(self.shape)
        file.seek(self.offset)
        known = np.unpackbits(np.frombuffer(file.read(-(-pixels // 8)), np.uint8), count=pixels).astype(bool)
        depth = np.zeros(pixels, np.float32)
        depth[known] = np.frombuffer(file.read(4 * self.count), np.float32)
        return depth.reshape(self.shape)


DepthFile = tuple[str, StoredMap | Path]
"""A sample key with its depth map, or with the PNG that holds it."""


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
    with open_picture(path, str(path)) as image:
        mode, values = image.mode, np.asarray(image) if image.mode.startswith("I") else None
    if values is None:
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
    maps: Sequence[StoredMap | Path] = depth_pngs(path) if path.is_dir() else read_ground_truth(path)
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
        maps = [_read_depth_png(depth) if isinstance(depth, Path) else depth.read() for _, depth in chosen]
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


def read_ground_truth(path: Path) -> list[StoredMap]:
    """Read `gt_depths.npz` of the official code: depth maps (H, W) of several sizes, metres, 0 = no measurement.

    The array in it is pickled, since its maps differ in size. Only what rebuilds a NumPy array is unpickled, so that
    the file cannot run code; and one map after the other, since all together are gigabytes.

    Raises:
        InputError: missing, damaged, too large, or holds anything but depth maps.
        StorageError: no room for the maps among the temporary files.
    """
    _require_file(path)
    try:
        with bounded_zip(path) as archive:
            names = [info for info in archive.infolist() if info.filename == "data.npy"]
            if len(names) != 1:
                raise InputError(f"{path}: no array 'data' in it; gt_depths.npz of the official code has one")
            if names[0].file_size > MOST_TRUTH_BYTES:
                raise InputError(f"{path}: unpacks to {names[0].file_size / 1e9:,.0f} GB; too large for gt_depths.npz")
            if names[0].compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise InputError(f"{path}: packed in a way that np.savez_compressed does not know")
            with archive.open(names[0]) as content:
                maps = _store_maps(content)
    except (InputError, StorageError):
        raise
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise InputError(f"{path}: not an .npz archive, or damaged ({first_line(error)})") from error
    except Exception as error:  # a damaged pickle fails in any way
        raise InputError(f"{path}: its array cannot be read ({first_line(error)})") from error
    if not maps:
        raise InputError(f"{path}: no depth maps in it")
    return maps


_LONGEST_HEADER = 1 << 16
"""NumPy parses a header of any length as Python, and repeats it in its messages."""
_LARGEST_MAP = 64 << 20
"""Bytes of one map in the file."""
_MOST_MAPS = 50_000
_MOST_STEPS = 30 * _MOST_MAPS
"""Of unpickling; a map takes 25."""


def _store_maps(content: IO[bytes]) -> list[StoredMap]:
    version = np.lib.format.read_magic(content)
    if version == (1, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(content)
    else:
        size = content.read(4)
        if int.from_bytes(size, "little") > _LONGEST_HEADER:
            raise ValueError("its header is too long")
        header = io.BytesIO(size + content.read(int.from_bytes(size, "little")))
        shape, fortran, dtype = np.lib.format.read_array_header_2_0(header)
    reader, store = BoundedReader(content, _LARGEST_MAP), MapStore()
    if dtype.hasobject:
        found = _MapsOnly(reader, store).load()
        if not isinstance(found, _Pickled) or found.shape != shape or not isinstance(found.content, list):
            raise ValueError("not a list of arrays")
        maps = [one.content if isinstance(one, _Pickled) else None for one in found.content]
        for number, one in enumerate(maps):
            if not isinstance(one, StoredMap):
                raise ValueError(f"entry {number} is not a floating-point depth map (H, W)")
        return cast(list[StoredMap], maps)
    if len(shape) != 3 or fortran or shape[0] > _MOST_MAPS:  # all maps have one size
        raise ValueError(f"shape {shape}; a list of depth maps (H, W) is needed")
    bytes_each = dtype.itemsize * shape[1] * shape[2]
    return [_stored(store, shape[1:], dtype, False, reader.read(bytes_each)) for _ in range(shape[0])]


def _stored(store: MapStore, shape: Any, dtype: Any, fortran: Any, data: bytes) -> StoredMap:
    """Store a map that NumPy has written."""
    if len(shape) != 2 or 0 in shape or not np.issubdtype(dtype, np.floating):
        raise ValueError("an entry is not a floating-point depth map (H, W)")
    depth = np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")
    return store.add(depth)


class _Pickled:
    """An array of a pickle. Its content is a `StoredMap`, or the list of an array of arrays."""

    shape: tuple[int, ...] = ()
    content: StoredMap | list[Any] | None = None

    def __init__(self, store: MapStore) -> None:
        self._store = store

    def __setstate__(self, state: Any) -> None:
        _, self.shape, dtype, fortran, data = state
        if dtype.hasobject:
            self.content = data
        else:
            self.content = _stored(self._store, self.shape, dtype, fortran, data)


class _Forgetful(dict[int, Any]):
    """What a pickle refers to again, without the content of maps."""

    def __setitem__(self, key: int, value: Any) -> None:
        parts = value if isinstance(value, tuple) else (value,)
        large = any(isinstance(part, bytes | str) and len(part) > 256 for part in parts)
        super().__setitem__(key, None if large else value)


class _Steps(dict[int, Any]):
    """Functions by operation, up to a number of calls: a short file could make objects without an end."""

    def __init__(self, known: dict[int, Any]) -> None:
        super().__init__(known)
        self._left = _MOST_STEPS

    def __getitem__(self, key: int) -> Any:
        self._left -= 1
        if self._left < 0:
            raise pickle.UnpicklingError("it holds more than depth maps")
        return super().__getitem__(key)


class _MapsOnly(pickle._Unpickler):
    """Unpickles NumPy arrays and nothing else, each into the store. In Python, whose memory of bytes can be cut."""

    def __init__(self, file: BoundedReader, store: MapStore) -> None:
        super().__init__(file)
        self.memo = _Forgetful()
        self.dispatch = _Steps(self.dispatch)  # type: ignore[misc]
        self._store = store

    def find_class(self, module: str, name: str) -> Any:
        known = {
            "numpy.core.multiarray _reconstruct": self._array,
            "numpy._core.multiarray _reconstruct": self._array,
            "numpy ndarray": None,
            "numpy dtype": np.dtype,
            "_codecs encode": self._bytes,
        }
        if f"{module} {name}" not in known:
            raise pickle.UnpicklingError(f"it holds {module}.{name}, which is not an array")
        return known[f"{module} {name}"]

    def _array(self, *_: Any) -> _Pickled:
        return _Pickled(self._store)

    def _bytes(self, text: str, _: str) -> bytes:
        """Bytes as protocol 2 writes them."""
        return text.encode("latin1")
