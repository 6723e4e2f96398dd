"""`md2 eval` of other projects' files: saved disparities, depth PNGs, ground truth without images."""

from __future__ import annotations

import csv
import io
import math
import os
import pickle
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluation_data import constant, measured, pack_truth, save_disparities
from PIL import Image

from md2.evaluation.metrics import EIGEN
from md2.evaluation.predictions import keys_file, read_ground_truth
from md2.train import _check_dataset
from md2.training.runlog import read_metrics
from shards.dataset import open_dataset
from shards.errors import InputError, UsageError


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images of constant true depth 4, 10, 20, of two native sizes."""
    maps = [constant(4), constant(10, 36, 110), constant(20)]
    return pack_truth(tmp_path_factory.mktemp("truth") / "eigen", maps)


def test_predictions_are_found_by_key_and_not_by_place(packed: Path, tmp_path: Path) -> None:
    """Rows in another order than the shards', and more of them: Eigen's 697 serve the 652."""
    names = ["drive_002", "elsewhere_000", "drive_000", "drive_001"]
    predictions = save_disparities(tmp_path / "d.npy", [20, 1, 4, 10], names)
    assert measured(packed, predictions=predictions, scale=1.0).evaluation.metrics["abs_rel"] == pytest.approx(
        0, abs=1e-6
    )
    listed = measured(packed, predictions=predictions, scale=1.0, order=names)
    assert listed.evaluation.metrics["a1"] == 1
    # Keys that were saved beside the file are believed before a split that says otherwise.
    assert measured(packed, predictions=predictions, scale=1.0, order=names[::-1]).evaluation.metrics["a1"] == 1
    keys_file(predictions).unlink()
    assert measured(packed, predictions=predictions, scale=1.0, order=names).evaluation.metrics["a1"] == 1
    with pytest.raises(InputError, match="4 predictions for 3 images"):
        measured(packed, predictions=predictions, order=names[:3])
    with pytest.raises(InputError, match="no prediction of sample drive_001; --split"):
        measured(packed, predictions=save_disparities(tmp_path / "less.npy", [20, 4], ["drive_002", "drive_000"]))


def test_predictions_without_keys_ask_for_the_split(packed: Path, tmp_path: Path) -> None:
    predictions = save_disparities(tmp_path / "d.npy", [4, 10, 20])
    keys_file(predictions).unlink()
    with pytest.raises(InputError, match="--split"):
        measured(packed, predictions=predictions)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.ones((3, 4), np.float32), r"\(N, H, W\) is needed"),
        (np.ones((3, 4, 5), np.int32), "floating-point"),
        (np.array([np.ones((2, 2)), np.ones((3, 3)), None], dtype=object), "plain numbers"),
    ],
)
def test_predictions_of_another_shape_or_kind_are_refused(
    packed: Path, tmp_path: Path, content: np.ndarray[Any, Any], message: str
) -> None:
    np.save(tmp_path / "d.npy", content, allow_pickle=True)
    with pytest.raises(InputError, match=message):
        measured(packed, predictions=tmp_path / "d.npy", order=["drive_000", "drive_001", "drive_002"])


def test_nan_predictions_are_named(packed: Path, tmp_path: Path) -> None:
    predictions = save_disparities(tmp_path / "d.npy", [4, float("nan"), 20])
    with pytest.raises(InputError, match=r"drive_001.*NaN"):
        measured(packed, predictions=predictions)


def test_predictions_that_are_mostly_infinitely_far_have_no_scale(packed: Path, tmp_path: Path) -> None:
    """Their median depth is infinite; in metres they are merely wrong, 80 m for 4 m."""
    predictions = save_disparities(tmp_path / "d.npy", [math.inf, 10, 20])
    with pytest.raises(InputError, match=r"drive_000: at least half .* no scale"):
        measured(packed, predictions=predictions)
    assert measured(packed, predictions=predictions, scale=1.0).evaluation.images[0].values[0] == pytest.approx(19)
    with pytest.raises(UsageError, match="positive"):
        measured(packed, predictions=predictions, scale=0.0)


def ramp(low: float, high: float) -> np.ndarray[Any, Any]:
    """16-bit ground truth that rises from left to right."""
    return np.broadcast_to((np.linspace(low, high, 120) * 256).astype(np.uint16), (40, 120)).copy()


def test_depth_that_was_saved_instead_of_disparity_is_noticed(tmp_path: Path) -> None:
    truth = [ramp(4, 30), ramp(10, 50)]
    packed = pack_truth(tmp_path / "eigen", truth)
    depth = np.stack(truth).astype(np.float32) / 256

    def warned(rows: np.ndarray[Any, Any]) -> bool:
        np.save(tmp_path / "p.npy", rows.astype(np.float32))
        keys_file(tmp_path / "p.npy").write_text("drive_000 drive_001")
        return any(
            "look like depth" in warning for warning in measured(packed, predictions=tmp_path / "p.npy").warnings
        )

    assert warned(depth)
    assert not warned(1 / depth)
    rng = np.random.default_rng(0)
    # A bad disparity, noise of a factor two in both directions; and one that says nothing at all.
    assert not warned(np.exp(rng.uniform(-0.7, 0.7, depth.shape)) / depth)
    assert not warned(np.ones_like(depth))


def save_ground_truth(path: Path, maps: list[np.ndarray[Any, Any]]) -> Path:
    """As the official export does: maps of several sizes become an array of objects."""
    ragged = np.empty(len(maps), dtype=object)
    for place, depth in enumerate(maps):
        ragged[place] = depth
    np.savez_compressed(path, data=ragged)
    return path


def test_the_official_codes_ground_truth_serves_predictions(tmp_path: Path) -> None:
    """The numbers of `test_saved_disparities_by_hand`, without a dataset."""
    maps = [
        np.full(size, depth, np.float32) for size, depth in (((40, 120), 4.0), ((36, 110), 10.0), ((40, 120), 20.0))
    ]
    truth = save_ground_truth(tmp_path / "gt_depths.npz", maps)
    np.save(tmp_path / "d.npy", np.stack([np.full((8, 24), 1 / depth, np.float32) for depth in (2, 10, 40)]))
    report = measured(truth, predictions=tmp_path / "d.npy", scale=1.0, csv_file=tmp_path / "e.csv")
    assert report.evaluation.metrics["abs_rel"] == pytest.approx((0.5 + 0 + 1) / 3, rel=1e-5)
    assert report.evaluation.metrics["sq_rel"] == pytest.approx((4 / 4 + 0 + 400 / 20) / 3, rel=1e-5)
    assert [row["key"] for row in csv.DictReader((tmp_path / "e.csv").read_text().splitlines())] == [
        "000000",
        "000001",
        "000002",
    ]
    assert report.evaluation.protocol == EIGEN
    equal = save_ground_truth(tmp_path / "equal.npz", [])
    np.savez(equal, data=np.stack([maps[0], maps[2]]))
    np.save(tmp_path / "two.npy", np.load(tmp_path / "d.npy")[[0, 2]])
    assert measured(equal, predictions=tmp_path / "two.npy", scale=1.0).evaluation.metrics["rmse"] == pytest.approx(11)
    with pytest.raises(InputError, match="3 predictions for 2 images"):
        measured(equal, predictions=tmp_path / "d.npy")
    with pytest.raises(UsageError, match="--sheet shows images"):
        measured(truth, predictions=tmp_path / "d.npy", sheet=tmp_path / "s.png")


def test_a_folder_of_pngs_is_ground_truth(tmp_path: Path) -> None:
    """True 4, 10, 20 and predicted 2, 10, 40 metres; PNGs in the order of their numbers, or by the split's keys."""
    np.save(tmp_path / "d.npy", np.stack([np.full((8, 24), 1 / depth, np.float32) for depth in (2, 10, 40)]))
    order = [f"drive_00{n}" for n in range(3)]
    for folder, names in (("numbers", ["1", "9", "10"]), ("keys", order)):
        (tmp_path / folder).mkdir()
        for name, metres, size in zip(names, (4, 10, 20), ((40, 120), (36, 110), (40, 120)), strict=True):
            Image.fromarray(constant(metres, *size)).save(tmp_path / folder / f"{name}.png")
    for folder, given in (
        ("numbers", None),
        ("numbers", order),
        ("keys", None),
        ("keys", ["drive_000", "x", "drive_002"]),
    ):
        report = measured(tmp_path / folder, predictions=tmp_path / "d.npy", scale=1.0, order=given)
        errors = (0.5, 1) if given and "x" in given else (0.5, 0, 1)  # key x has a prediction, and no ground truth
        assert report.evaluation.metrics["abs_rel"] == pytest.approx(sum(errors) / len(errors), rel=1e-5)
    first = measured(tmp_path / "numbers", predictions=tmp_path / "d.npy", scale=1.0, limit=2)
    assert first.evaluation.metrics["abs_rel"] == pytest.approx(0.25, rel=1e-5)
    same = measured(tmp_path / "keys", predictions=tmp_path / "keys")
    assert same.evaluation.metrics["abs_rel"] == pytest.approx(0, abs=1e-5)
    with pytest.raises(InputError, match="3 depth maps for 2 lines"):
        measured(tmp_path / "numbers", predictions=tmp_path / "d.npy", order=["a", "b"])


def test_disparities_where_depth_pngs_are_expected_are_noticed(tmp_path: Path) -> None:
    truth = [ramp(4, 30), ramp(10, 50)]
    packed = pack_truth(tmp_path / "eigen", truth)
    for name, values in (("depth", truth), ("disparity", [(256 * 256 * 8 / one).astype(np.uint16) for one in truth])):
        (tmp_path / name).mkdir()
        for number, value in enumerate(values):
            Image.fromarray(value).save(tmp_path / name / f"drive_00{number}.png")
        said = measured(packed, predictions=tmp_path / name).warnings
        assert any("look like disparities: depth (metres x 256)" in one for one in said) == (name == "disparity")


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("/tmp/md2_hostile_ground_truth"),)


def test_ground_truth_cannot_run_code_and_broken_files_are_one_line(tmp_path: Path) -> None:
    marker = Path("/tmp/md2_hostile_ground_truth")
    marker.unlink(missing_ok=True)
    np.save(tmp_path / "d.npy", np.ones((1, 4, 4), np.float32))
    hostile = save_ground_truth(tmp_path / "hostile.npz", [Hostile()])  # type: ignore[list-item]
    with pytest.raises(InputError, match=r"cannot be read \(it holds .*, which is not an array\)"):
        measured(hostile, predictions=tmp_path / "d.npy")
    assert not marker.exists()
    good = save_ground_truth(tmp_path / "good.npz", [np.ones((4, 4), np.float32)]).read_bytes()
    (tmp_path / "cut.npz").write_bytes(good[: len(good) // 2])
    (tmp_path / "text.npz").write_text("no archive")
    np.savez(tmp_path / "other.npz", depths=np.ones((1, 4, 4)))
    save_ground_truth(tmp_path / "flat.npz", [np.ones(4, np.float32)])
    for name, message in (
        ("cut", "not an .npz archive"),
        ("text", "not an .npz archive"),
        ("other", "no array 'data'"),
        ("flat", "an entry is not a floating-point depth map"),
        ("absent", "no such file"),
    ):
        with pytest.raises(InputError, match=message):
            measured(tmp_path / f"{name}.npz", predictions=tmp_path / "d.npy")


def test_a_folder_of_depth_pngs_is_a_prediction(packed: Path, tmp_path: Path) -> None:
    """Metres x 256 for true 4, 10, 20: predicted 2, 10, 40, by key, or in the split's order under other names."""
    for folder, names in (("keys", [f"drive_00{n}" for n in range(3)]), ("numbers", ["1", "9", "10"])):
        (tmp_path / folder).mkdir()
        for name, metres in zip(names, (2, 10, 40), strict=True):
            Image.fromarray(constant(metres, 30, 90)).save(tmp_path / folder / f"{name}.png")
    by_key = measured(packed, predictions=tmp_path / "keys").evaluation
    assert by_key.scaling == 1.0
    assert by_key.metrics["abs_rel"] == pytest.approx((0.5 + 0 + 1) / 3, rel=1e-4)
    order = [f"drive_00{n}" for n in range(3)]
    assert measured(packed, predictions=tmp_path / "numbers", order=order).evaluation.metrics == by_key.metrics
    with pytest.raises(InputError, match=r"no prediction of sample drive_000; --split"):
        measured(packed, predictions=tmp_path / "numbers")
    with pytest.raises(InputError, match="3 PNGs for 2 lines"):
        measured(packed, predictions=tmp_path / "numbers", order=order[:2])
    Image.new("RGB", (9, 9)).save(tmp_path / "keys" / "drive_001.png")
    with pytest.raises(InputError, match="16-bit grey"):
        measured(packed, predictions=tmp_path / "keys")


def test_a_gigabyte_beside_small_files_is_one_line(packed: Path, tmp_path: Path) -> None:
    """Sparse files of zeros: the keys of predictions, the environment of a run that is resumed, and its metrics."""
    predictions = save_disparities(tmp_path / "d.npy", [4, 10, 20], ["a", "b", "c"])
    for name in ("d.npy.keys.txt", "environment.json", "metrics.jsonl"):
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, 1 << 30)
    with pytest.raises(InputError, match=r"keys\.txt: cannot be read .*larger than 16 MiB"):
        measured(packed, predictions=predictions, scale=1.0)
    with pytest.raises(InputError, match=r"environment\.json: damaged"):
        _check_dataset(tmp_path, open_dataset(str(packed)))
    with pytest.raises(InputError, match=r"metrics\.jsonl: cannot be read \(larger than 128 MiB\)"):
        read_metrics(tmp_path)


def test_a_header_of_a_hundred_megabytes_is_not_parsed(tmp_path: Path) -> None:
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (3,), }" + b" " * (100 << 20)
    with zipfile.ZipFile(tmp_path / "gt_depths.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data.npy", b"\x93NUMPY\x02\x00" + len(header).to_bytes(4, "little") + header)
    with pytest.raises(InputError, match="its header is too long"):
        read_ground_truth(tmp_path / "gt_depths.npz")


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_ground_truth_of_gigabytes_is_read_map_by_map(tmp_path: Path, protocol: int) -> None:
    """As each protocol of pickle writes them: 32 MB of maps in one row after the other, of which little is kept."""
    rng = np.random.default_rng(0)
    maps = [np.where(rng.random((300, 400 + n)) < 0.05, 7.0 + n, 0).astype(np.float32) for n in range(60)]
    maps[0] = np.tile(maps[0], (2, 2))
    maps[1] = maps[1].astype(">f8")
    maps[2] = np.asfortranarray(maps[2])
    ragged = np.empty(len(maps), dtype=object)
    ragged[:] = maps
    content = io.BytesIO()
    np.lib.format.write_array_header_1_0(content, {"descr": "|O", "fortran_order": False, "shape": ragged.shape})
    content.write(pickle.dumps(ragged, protocol))
    with zipfile.ZipFile(tmp_path / "gt_depths.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("data.npy", content.getvalue())
    del content
    tracemalloc.start()
    try:
        stored = read_ground_truth(tmp_path / "gt_depths.npz")
        assert tracemalloc.get_traced_memory()[1] < 8e6
    finally:
        tracemalloc.stop()
    for depth, expected in zip(stored, maps, strict=True):
        np.testing.assert_array_equal(depth.read(), expected.astype(np.float32))


def test_a_pickle_that_never_ends_or_claims_gigabytes_is_one_line(tmp_path: Path) -> None:
    begin = io.BytesIO()
    np.lib.format.write_array_header_1_0(begin, {"descr": "|O", "fortran_order": False, "shape": (3,)})
    for what, rest in {
        "more than depth maps": b"\x80\x04" + b"]" * (4 << 20),
        "a part of it claims 1,073,741,824 bytes": b"\x80\x04\x8e" + (1 << 30).to_bytes(8, "little"),
    }.items():
        with zipfile.ZipFile(tmp_path / "gt_depths.npz", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("data.npy", begin.getvalue() + rest)
        with pytest.raises(InputError, match=f"cannot be read .*{what}"):
            read_ground_truth(tmp_path / "gt_depths.npz")
    begin = io.BytesIO()
    np.lib.format.write_array_header_1_0(begin, {"descr": "<f4", "fortran_order": False, "shape": (1 << 30, 1, 1)})
    with zipfile.ZipFile(tmp_path / "gt_depths.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data.npy", begin.getvalue())
    with pytest.raises(InputError, match="a list of depth maps"):
        read_ground_truth(tmp_path / "gt_depths.npz")
