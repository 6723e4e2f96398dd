"""Depth PNGs written bit by bit: other libraries must read exactly the map back, whatever it looks like."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from prep.raw.calibration import read_raw_rig
from prep.raw.depth_png import canonical, code_lengths, encode_sparse, length_symbol, road_code
from prep.raw.velodyne import points_in_view, project, read_scan


def encode(depth: np.ndarray) -> bytes:
    pixels = np.flatnonzero(depth)
    return encode_sparse(pixels, depth.reshape(-1)[pixels], (depth.shape[1], depth.shape[0]))


def check(depth: np.ndarray) -> bytes:
    """Pillow reads the map; zlib reads the rows and agrees with the checksum; chunks are whole."""
    data = encode(depth)
    with Image.open(io.BytesIO(data)) as image:
        image.verify()  # the chunks' CRCs
    with Image.open(io.BytesIO(data)) as image:
        assert (image.format, image.mode) == ("PNG", "I;16")
        np.testing.assert_array_equal(np.asarray(image), depth)
    (size,) = struct.unpack(">I", data[33:37])
    rows = zlib.decompress(data[41 : 41 + size])  # raises where the Adler-32 differs
    plain = np.zeros((depth.shape[0], 1 + 2 * depth.shape[1]), np.uint8)
    plain[:, 1:] = depth.astype(">u2").view(np.uint8)
    assert rows == plain.tobytes()
    return data


@settings(max_examples=100, deadline=None)
@given(hnp.arrays(np.uint16, st.tuples(st.integers(1, 40), st.integers(1, 700)), fill=st.just(np.uint16(0))))
def test_any_sparse_map(depth: np.ndarray) -> None:
    check(depth)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.001, 0.05, 0.5, 1.0]))
def test_any_density(seed: int, density: float) -> None:
    random = np.random.default_rng(seed)
    shape = tuple(random.integers(1, 120, 2))
    check(np.where(random.random(shape) < density, random.integers(0, 1 << 16, shape), 0).astype(np.uint16))


def test_every_length_of_a_run() -> None:
    """One pixel, n empty bytes, one pixel: through one, two, eight, nine longest matches and all that is between."""
    for gap in [*range(600), 258 * 8, 258 * 8 + 1, 258 * 9, 258 * 16 + 3, 5000]:
        depth = np.zeros((1, gap + 2), np.uint16)
        depth[0, 0], depth[0, -1] = 0x1234, 0x00FF
        check(depth)
    for width in range(1, 300):  # odd runs, over a row's end
        depth = np.zeros((3, width), np.uint16)
        depth[0, 0] = depth[2, width - 1] = 7
        check(depth)


def test_every_value() -> None:
    check(np.arange(1 << 16, dtype=np.uint16).reshape(256, 256))


@pytest.mark.parametrize("shape", [(1, 1), (375, 1242)])
def test_an_empty_map(shape: tuple[int, int]) -> None:
    assert len(check(np.zeros(shape, np.uint16))) < 4000


@pytest.mark.kitti
def test_real_maps_are_as_small_as_zlib_makes_them(kitti: Path) -> None:
    raw = kitti / "raw"
    rig = read_raw_rig("2011_09_26", lambda path: (raw / path).read_bytes(), depth=True)
    matrix = rig.lidar_projection("l")
    folder = raw / "2011_09_26" / "2011_09_26_drive_0002_sync" / "velodyne_points" / "data"
    for path in sorted(folder.glob("*.bin"))[::4]:
        points = points_in_view(read_scan(path.read_bytes(), "scan"), [matrix], 1242)
        sparse = project(points, matrix, (1242, 375))
        rows = np.zeros((375, 1 + 2 * 1242), np.uint8)
        rows[:, 1:] = sparse.dense().astype(">u2").view(np.uint8)
        deflate = zlib.compressobj(9, zlib.DEFLATED, 15, 9, zlib.Z_RLE)
        assert sparse.png() == check(sparse.dense())
        assert len(sparse.png()) < 1.07 * len(deflate.compress(rows.tobytes()) + deflate.flush())


def test_length_symbols_against_the_standards_table() -> None:
    """RFC 1951, 3.2.5: first length and number of extra bits of each symbol."""
    bases = [
        3,
        4,
        5,
        6,
        7,
        8,
        9,
        10,
        11,
        13,
        15,
        17,
        19,
        23,
        27,
        31,
        35,
        43,
        51,
        59,
        67,
        83,
        99,
        115,
        131,
        163,
        195,
        227,
    ]
    extra_bits = [0] * 8 + [n for n in range(1, 6) for _ in range(4)]
    for length in range(3, 258):
        index = max(i for i, base in enumerate(bases) if base <= length)
        assert length_symbol(length) == (257 + index, length - bases[index], extra_bits[index])
    assert length_symbol(258) == (285, 0, 0)


@given(st.lists(st.floats(1e-9, 1), min_size=2, max_size=286))
def test_code_lengths_are_a_whole_prefix_code(weights: list[float]) -> None:
    lengths = code_lengths(weights, 12)
    assert max(lengths) <= 12
    assert sum(2.0**-size for size in lengths) == 1  # Kraft: nothing wasted, nothing ambiguous


@given(st.lists(st.floats(0.05, 1), min_size=2, max_size=100))
def test_code_lengths_are_within_a_bit_of_the_entropy(weights: list[float]) -> None:
    shares = np.array(weights) / sum(weights)
    mean = float(np.dot(shares, code_lengths(weights, 15)))
    entropy = float(-np.dot(shares, np.log2(shares)))
    assert entropy - 1e-9 <= mean < entropy + 1


def test_canonical_codes_as_in_the_standards_example() -> None:
    """RFC 1951, 3.2.2: lengths (3, 3, 3, 3, 3, 2, 4, 4) give 010 011 100 101 110 00 1110 1111."""
    expected = ["010", "011", "100", "101", "110", "00", "1110", "1111"]
    lengths = [3, 3, 3, 3, 3, 2, 4, 4]
    assert [f"{c:0{n}b}"[::-1] for c, n in zip(canonical(lengths), lengths, strict=True)] == expected


def test_a_pixel_and_its_run_fit_a_word() -> None:
    sizes = road_code().pixels(np.arange(1, 1 << 16, dtype=np.uint16), np.full((1 << 16) - 1, 259))[1]
    assert sizes.max() <= 64
