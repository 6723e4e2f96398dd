"""Evaluation straight from raw drives, and the commands from outside: what they print, write and end with."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluation_data import ROOT, constant, pack_truth, tiny_checkpoint, tiny_config
from PIL import Image
from pipeline_data import smooth
from prep_data import DATE, DRIVE
from typer.testing import CliRunner

from cli.main import app
from md2.inference.inputs import require_model
from prep.evaluation import evaluation_part, find_evaluation_data, is_packed, line_keys, pack_for_evaluation
from prep.raw.splits import read_split
from shards.errors import INCOMPLETE, InputError, UsageError


@pytest.fixture(scope="module")
def mono(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("c") / "mono.pt")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packing for evaluation goes into the user's cache; not into the real one here."""
    monkeypatch.setenv("MD2_CACHE", str(tmp_path / "cache"))


def md2(*arguments: str | Path) -> tuple[int, str, BaseException | None]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    return result.exit_code, result.output, result.exception


def test_keys_of_split_lines_are_the_packed_samples(drive: Path, tmp_path: Path) -> None:
    lists = read_split(str(drive / "splits" / "sample"))
    packed = pack_for_evaluation([str(drive)], lists, "val", (96, 64), cache=tmp_path, workers=1)
    with tarfile.open(Path(packed.url) / "val" / "000000.tar") as tar:
        stored = {name.partition(".")[0] for name in tar.getnames()}
    keys = line_keys(lists, "val")
    assert keys
    assert stored == set(keys)
    assert packed.manifest.codec == "png"
    assert packed.manifest.frames == [0]
    assert packed.manifest.size == (96, 64)


def test_the_packing_is_found_again_until_something_changes(drive: Path, tmp_path: Path) -> None:
    lists = read_split(str(drive / "splits" / "sample"))
    first = pack_for_evaluation([str(drive)], lists, "val", (96, 64), cache=tmp_path, workers=1)
    again = pack_for_evaluation([str(drive)], lists, "val", (96, 64), cache=tmp_path, workers=1)
    assert (first.already, again.already, again.url) == (False, True, first.url)
    other = pack_for_evaluation([str(drive)], lists, "val", (64, 64), cache=tmp_path, workers=1)
    assert other.url != first.url
    with pytest.raises(InputError, match="none of the split's"):
        pack_for_evaluation([str(tmp_path)], lists, "val", (96, 64), cache=tmp_path, workers=1)


def test_parts_of_a_split(drive: Path) -> None:
    lists = read_split(str(drive / "splits" / "sample"))
    assert evaluation_part(lists, None) in ("test", "val")
    assert evaluation_part(lists, "train") == "train"
    with pytest.raises(UsageError, match="--part"):
        evaluation_part(lists, "night")


def test_raw_and_packed_are_told_apart(drive: Path, dataset: Path) -> None:
    assert is_packed(str(dataset))
    assert not is_packed(str(drive))


def test_eval_straight_from_raw_prints_a_table(drive: Path, mono: Path, tmp_path: Path) -> None:
    code, output, error = md2(
        "eval", mono, drive, "--split", drive / "splits" / "sample", "--part", "val", "--json", tmp_path / "e.json"
    )
    assert (code, error) == (0, None), output
    for name in ("abs_rel", "rmse_log", "a3", "scale factors: median"):
        assert name in output
    found = json.loads((tmp_path / "e.json").read_text())
    assert f"{found['metrics']['abs_rel']:.3f}" in output
    assert found["images"] == len(line_keys(read_split(str(drive / "splits" / "sample")), "val"))
    assert list((tmp_path / "cache" / "evaluation").glob("*/dataset.json")), "packed where MD2_CACHE says"


def test_predictions_in_the_splits_order_belong_to_its_lines(drive: Path, tmp_path: Path) -> None:
    """A disparity of 1 / (line number + 1) everywhere: each image's scale factor tells which row it got."""
    lists = read_split(str(drive / "splits" / "sample"))
    keys = line_keys(lists, "val")
    rows = np.stack([np.full((4, 12), 1 / (number + 1), np.float32) for number in range(len(keys))])
    np.save(tmp_path / "d.npy", rows)
    options = ["--split", drive / "splits" / "sample", "--part", "val", "--csv", tmp_path / "e.csv"]
    code, output, error = md2("eval", drive, "--predictions", tmp_path / "d.npy", *options)
    assert (code, error) == (0, None), output
    np.save(tmp_path / "one.npy", np.ones_like(rows))
    code, output, _ = md2("eval", drive, "--predictions", tmp_path / "one.npy", *options[:-1], tmp_path / "one.csv")
    assert code == 0, output
    scaled, plain = (_ratios(tmp_path / name) for name in ("e.csv", "one.csv"))
    for number, key in enumerate(keys):
        assert plain[key] / scaled[key] == pytest.approx(number + 1, rel=1e-4)


def _ratios(path: Path) -> dict[str, float]:
    return {row["key"]: float(row["scale_ratio"]) for row in csv.DictReader(path.read_text().splitlines())}


def test_eval_warns_and_prints_latex_and_baselines(tmp_path: Path) -> None:
    stereo = tiny_checkpoint(tmp_path / "stereo.pt", tiny_config(stereo=True))
    packed = pack_truth(tmp_path / "eigen", [constant(5), constant(20)])
    code, output, error = md2("eval", stereo, packed, "--scaling", "median", "--latex", "--baselines")
    assert (code, error) == (0, None), output
    assert "warning: this checkpoint learned from stereo" in output
    assert "constant depth" in output
    assert "published M 640x192" in output
    assert " & " in output
    assert r"\\" in output


def test_eval_mistakes(mono: Path, dataset: Path, tmp_path: Path) -> None:
    _, _, error = md2("eval", mono, dataset, "--raw", tmp_path)
    assert isinstance(error, UsageError)
    assert "packed already" in str(error)
    _, _, error = md2("eval", mono)
    assert isinstance(error, UsageError)
    _, _, error = md2("eval", mono, tmp_path / "nothing")
    assert error is not None
    assert "no dataset there" in str(error)
    _, _, error = md2("eval", mono, tmp_path)
    assert isinstance(error, UsageError)
    assert "--split eigen" in str(error)


def test_predict_odometry_export_report_from_outside(mono: Path, tmp_path: Path) -> None:
    for number in range(3):
        image = Image.fromarray(smooth(np.random.default_rng(number), 120, 60))
        (tmp_path / "frames").mkdir(exist_ok=True)
        image.save(tmp_path / "frames" / f"{number}.png")
    code, output, _ = md2("predict", mono, tmp_path / "frames", "--out", tmp_path / "p")
    assert code == 0, output
    assert "3 images, 9 files" in output
    assert "scale unknown" in output
    assert "KITTI's camera" not in output
    for words, noted in (([], True), (["--intrinsics", "60,60,59.5,29.5"], False)):
        _, output, _ = md2("predict", mono, tmp_path / "frames/0.png", "--out", tmp_path / "c", "--save", "ply", *words)
        assert ("point clouds are those of KITTI's camera" in output) == noted
    (tmp_path / "frames" / "broken.png").write_bytes(b"\x89PNG")
    code, output, _ = md2("predict", mono, tmp_path / "frames", "--out", tmp_path / "p", "--save", "npy")
    assert code == INCOMPLETE
    assert "skipped" in output
    (tmp_path / "frames" / "broken.png").unlink()
    code, output, _ = md2("odometry", mono, tmp_path / "frames", "--out", tmp_path / "o")
    assert code == 0, output
    assert "3 frames; no ground truth" in output
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == [
        "frames.json",
        "frames.png",
        "frames.tum",
        "frames_poses.txt",
    ]
    assert md2("odometry", mono, tmp_path / "frames" / "*.png", "--out", tmp_path / "o")[0] == 0
    assert len(list((tmp_path / "o").iterdir())) == 4, "a glob is named after its folder"
    code, output, _ = md2("export", mono, "--to", "monodepth2", "--out", tmp_path / "official")
    assert code == 0, output
    _, _, error = md2("export", mono, "--to", "monodepth2", "--dynamic-batch")
    assert isinstance(error, UsageError)
    _, _, error = md2("report", tmp_path)
    assert isinstance(error, InputError)


def test_improved_ground_truth_may_lie_elsewhere(drive: Path, mono: Path, tmp_path: Path) -> None:
    """As KITTI delivers it: a zip of its own. Without it, one line says what is missing and how to name it."""
    (tmp_path / "eigen_benchmark").mkdir()
    (tmp_path / "eigen_benchmark/test_files.txt").write_text(f"{DATE}/{DRIVE} 3 l\n")
    arguments = ("eval", mono, drive, "--split", tmp_path / "eigen_benchmark", "--csv", tmp_path / "e.csv")
    code, _, error = md2(*arguments)
    assert isinstance(error, InputError)
    assert "no ground truth for any image of eigen_benchmark there; expected: data_depth_annotated.zip" in str(error)
    assert "--raw" in str(error)
    truth = np.zeros((64, 192), np.uint16)
    truth[40:50, 50:80] = 10 * 256
    buffer = io.BytesIO()
    Image.fromarray(truth).save(buffer, "PNG")
    (tmp_path / "annotated").mkdir()
    with zipfile.ZipFile(tmp_path / "annotated/data_depth_annotated.zip", "w") as archive:
        archive.writestr(f"val/{DRIVE}/proj_depth/groundtruth/image_02/0000000003.png", buffer.getvalue())
    code, output, _ = md2(*arguments, "--raw", tmp_path / "annotated")
    assert code == 0, output
    (line,) = (tmp_path / "e.csv").read_text().splitlines()[1:]
    assert line.rpartition(",")[2] == "300"


# Real KITTI


def test_eigens_rows_serve_the_652_with_improved_ground_truth(kitti: Path) -> None:
    """Looking keys up gives the published list of row numbers."""
    eigen = line_keys(read_split("eigen", kitti / "splits"), "test")
    benchmark = line_keys(read_split("eigen_benchmark", kitti / "splits"), "test")
    assert (len(eigen), len(benchmark)) == (697, 652)
    row_of = {key: row for row, key in enumerate(eigen)}
    published = np.load(kitti / "splits" / "benchmark" / "eigen_to_benchmark_ids.npy")
    assert [row_of[key] for key in benchmark] == published.tolist()


def test_real_frames_of_eigens_test(kitti: Path, mono: Path, tmp_path: Path) -> None:
    """Frames 0, 3, 6 and 9 of drive 0002; the other 693 lines have no data here, which the exit code says."""
    code, output, _ = md2(
        *("eval", mono, kitti / "raw", "--split", "eigen", "--splits", kitti / "splits"),
        *("--csv", tmp_path / "e.csv", "--sheet", tmp_path / "sheet.png"),
    )
    assert code == INCOMPLETE, output
    assert "693 lines of split eigen are not in the dataset" in output
    ratios = _ratios(tmp_path / "e.csv")
    assert sorted(ratios) == [f"2011_09_26_drive_0002_sync_l_{frame:010d}" for frame in (0, 3, 6, 9)]
    # About 17,000 velodyne points lie inside Garg's crop of such an image.
    pixels = [int(line.rpartition(",")[2]) for line in (tmp_path / "e.csv").read_text().splitlines()[1:]]
    assert all(14_000 < count < 20_000 for count in pixels)


def _numbers(path: Path, name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    line = next(line for line in path.read_text().splitlines() if line.startswith(f"{name}:"))
    return np.array([float(word) for word in line.split()[1:]])


def _lidar_depth(date: Path, frame: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The published ground truth from the raw scan: forward x, nearest point, rounded pixel minus one."""
    cameras, lidar = date / "calib_cam_to_cam.txt", date / "calib_velo_to_cam.txt"
    to_camera, rectify = np.eye(4), np.eye(4)
    to_camera[:3] = np.column_stack([_numbers(lidar, "R").reshape(3, 3), _numbers(lidar, "T")])
    rectify[:3, :3] = _numbers(cameras, "R_rect_00").reshape(3, 3)
    width, height = _numbers(cameras, "S_rect_02").astype(int)
    scan = date / "2011_09_26_drive_0002_sync" / "velodyne_points" / "data" / f"{frame:010d}.bin"
    points = np.fromfile(scan, np.float32).reshape(-1, 4).astype(np.float64)
    points = points[points[:, 0] >= 0]
    points[:, 3] = 1
    x, y, z = (_numbers(cameras, "P_rect_02").reshape(3, 4) @ rectify @ to_camera) @ points.T
    column, row = (np.round(x / z) - 1).astype(int), (np.round(y / z) - 1).astype(int)
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    depth = np.full((height, width), np.inf)
    np.minimum.at(depth, (row[inside], column[inside]), points[inside, 0])
    return np.where(np.isinf(depth), 0, depth)


def _stretch(line: np.ndarray[Any, np.dtype[np.float64]], size: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Linear interpolation at half-pixel positions (NumPy's holds the ends)."""
    return np.interp((np.arange(size) + 0.5) * len(line) / size - 0.5, np.arange(len(line)), line)


def test_the_whole_chain_against_the_published_formulas_from_raw_files(kitti: Path, mono: Path, tmp_path: Path) -> None:
    """Nothing of md2 but the saved disparities enters the other side: lidar, resize, crop, median, metrics."""
    md2(
        *("eval", mono, kitti / "raw", "--split", "eigen", "--splits", kitti / "splits"),
        *("--csv", tmp_path / "e.csv", "--save-predictions", tmp_path / "p.npy"),
    )
    rows = {row["key"]: row for row in csv.DictReader((tmp_path / "e.csv").read_text().splitlines())}
    keys = (tmp_path / "p.npy.keys.txt").read_text().split()
    assert len(keys) == len(rows) == 4
    for key, disparity in zip(keys, np.load(tmp_path / "p.npy").astype(np.float64), strict=True):
        true = _lidar_depth(kitti / "raw" / "2011_09_26", int(key[-10:]))
        height, width = true.shape
        tall = np.apply_along_axis(_stretch, 0, disparity, height)
        resized = np.apply_along_axis(_stretch, 1, tall, width)
        counted = (true > 1e-3) & (true < 80)
        counted[: int(0.40810811 * height)] = counted[int(0.99189189 * height) :] = False
        counted[:, : int(0.03594771 * width)] = counted[:, int(0.96405229 * width) :] = False
        true, depth = true[counted], 1 / resized[counted]
        ratio = np.median(true) / np.median(depth)
        depth = np.clip(depth * ratio, 1e-3, 80)
        row = {name: float(value) for name, value in rows[key].items() if name != "key"}
        assert row["pixels"] == counted.sum()
        # The packed ground truth is rounded to 1/256 m.
        assert row["scale_ratio"] == pytest.approx(ratio, rel=1e-3)
        assert row["abs_rel"] == pytest.approx(np.mean(np.abs(true - depth) / true), rel=1e-3)
        assert row["rmse"] == pytest.approx(np.sqrt(np.mean((true - depth) ** 2)), rel=1e-3)
        assert row["a1"] == pytest.approx(np.mean(np.maximum(true / depth, depth / true) < 1.25), abs=1e-3)


def test_a_split_with_a_packed_dataset_is_refused_where_it_would_be_ignored(
    drive: Path, mono: Path, dataset: Path, tmp_path: Path
) -> None:
    lists = read_split(str(drive / "splits" / "sample"))
    _, _, error = md2("eval", mono, dataset, "--split", drive / "splits" / "sample")
    assert isinstance(error, UsageError)
    assert "packed already: --split chooses lines of raw KITTI" in str(error)
    # With predictions it is their order.
    found = find_evaluation_data(str(dataset), lists, "val", [], (96, 32), for_predictions=True)
    assert (found.url, found.part, found.order) == (str(dataset), "val", line_keys(lists, "val"))
    with pytest.raises(UsageError, match="--raw goes with raw KITTI"):
        find_evaluation_data(str(dataset), None, None, [str(tmp_path)], (96, 32), for_predictions=False)


def test_a_list_of_any_name_is_evaluated_as_the_part_that_it_makes(drive: Path, mono: Path, tmp_path: Path) -> None:
    line = (drive / "splits" / "sample" / "val_files.txt").read_text().splitlines()[0]
    (tmp_path / "frames.txt").write_text(f"{line}\n")
    code, output, error = md2("eval", mono, drive, "--split", tmp_path / "frames.txt", "--csv", tmp_path / "e.csv")
    assert (code, error) == (0, None), output
    assert len((tmp_path / "e.csv").read_text().splitlines()) == 2


def test_the_table_is_printed_when_a_file_cannot_be_written_in_the_end(
    drive: Path, mono: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise InputError(f"cannot write {path}: No space left on device")

    monkeypatch.setattr("md2.evaluation.run.write_file", full)
    packed = pack_truth(tmp_path / "eigen", [constant(5)])
    _, output, error = md2("eval", mono, packed, "--json", tmp_path / "e.json")
    assert isinstance(error, InputError)
    assert "abs_rel" in output and "published M 640x192" in output


def test_names_that_cannot_be_models_are_named_before_pytorch_is_imported(tmp_path: Path, dataset: Path) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    for name, message in (
        ("monodepth2_resnet18_kitti_mono_640x192", "is a recipe, not a trained model: train it first"),
        ("nowhere", "no such run, checkpoint or folder of Monodepth2 weights"),
        (str(tmp_path / "a.png"), "the model comes first"),
        (str(dataset), "the model comes first"),
    ):
        with pytest.raises(InputError, match=message):
            require_model(name)
    script = (
        "import sys; from cli.main import app; from cli.console import run\n"
        "code = run(app, sys.argv[1:]); print(code, [m for m in ('torch', 'nvidia.dali') if m in sys.modules])"
    )
    for words in (["predict", "nope", "x"], ["eval", "nope", "x"], ["export", "nope", "--to", "onnx"]):
        done = subprocess.run(
            [sys.executable, "-c", script, *words], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
        )
        assert done.stdout == "3 []\n", done
        assert done.stderr.startswith("md2: nope: no such run")
