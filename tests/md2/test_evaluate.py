"""`md2 eval`: whole evaluations of packed data against numbers worked out by hand; options, warnings, files."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_data import (
    HEIGHT,
    WIDTH,
    constant,
    documented,
    measured,
    pack_truth,
    run_lines,
    save_disparities,
    tiny_checkpoint,
    tiny_config,
)
from PIL import Image

from md2.evaluation.evaluate import (
    Evaluation,
    ImageScore,
    choose_part,
    choose_protocol,
    choose_scaling,
    evaluation_batches,
)
from md2.evaluation.metrics import EIGEN, EIGEN_BENCHMARK, METRICS, Protocol
from md2.evaluation.run import EvalOptions, measure, model_name, to_latex
from md2.inference.predictor import load
from md2.visualize import Tile, depth_to_uint16, sheet
from shards.dataset import open_dataset
from shards.errors import DatasetError, InputError, UsageError
from shards.files import sha256_file
from shards.manifest import Manifest, Shard

TRUTH = (4.0, 10.0, 20.0)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images of constant true depth, of two native sizes."""
    maps = [constant(TRUTH[0]), constant(TRUTH[1], 36, 110), constant(TRUTH[2])]
    return pack_truth(tmp_path_factory.mktemp("truth") / "eigen", maps)


@pytest.fixture(scope="module")
def mono(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoints") / "mono.pt")


@pytest.fixture(scope="module")
def stereo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoints") / "stereo.pt", tiny_config(stereo=True))


def test_saved_disparities_by_hand(packed: Path, tmp_path: Path) -> None:
    """Depths 2, 10, 40 for true 4, 10, 20, with 1 m per unit: errors 1/2, 0, 1 of the truth."""
    report = measured(packed, predictions=save_disparities(tmp_path / "d.npy", [2, 10, 40]), scale=1.0)
    assert report.evaluation.metrics == pytest.approx(
        {
            "abs_rel": (0.5 + 0 + 1) / 3,
            "sq_rel": (4 / 4 + 0 + 400 / 20) / 3,
            "rmse": (2 + 0 + 20) / 3,
            "rmse_log": (math.log(2) + 0 + math.log(2)) / 3,
            "a1": 1 / 3,
            "a2": 1 / 3,
            "a3": 1 / 3,
        },
        rel=1e-5,
        abs=1e-6,
    )


def test_median_scaling_and_the_spread_of_its_factors(packed: Path, tmp_path: Path) -> None:
    """Factors 2, 1, 0.5: median 1, standard deviation of (2, 1, 0.5) about their mean 7/6."""
    report = measured(packed, predictions=save_disparities(tmp_path / "d.npy", [2, 10, 40]))
    assert report.evaluation.metrics["abs_rel"] == pytest.approx(0, abs=1e-6)
    assert report.evaluation.ratio_median == pytest.approx(1)
    mean = 3.5 / 3
    deviations = ((2 - mean) ** 2 + (1 - mean) ** 2 + (0.5 - mean) ** 2) / 3
    assert report.evaluation.ratio_spread == pytest.approx(math.sqrt(deviations))


def test_the_network_is_measured_in_its_own_unit(packed: Path, stereo: Path) -> None:
    """abs_rel of the paper's unit, 5.4 m, recomputed from the network's output image by image."""
    report = measured(packed, model=str(stereo), batch_size=2)
    predictor = load(stereo, "cpu")
    errors = []
    for number, true in enumerate(TRUTH):
        disparity = predictor.disparity(_image(packed, number))
        height, width = (36, 110) if number == 1 else (40, 120)
        resized = torch.nn.functional.interpolate(disparity, (height, width), mode="bilinear")[0, 0].numpy()
        depth = np.clip(5.4 / resized, 1e-3, 80)
        inner = depth[int(0.40810811 * height) : int(0.99189189 * height)]
        inner = inner[:, int(0.03594771 * width) : int(0.96405229 * width)]
        errors.append(np.mean(np.abs(inner - true) / true))
    assert report.evaluation.scaling == 5.4
    assert report.warnings == []
    assert [image.values[0] for image in report.evaluation.images] == pytest.approx(errors, rel=1e-4)


def _image(packed: Path, number: int) -> torch.Tensor:
    """Its pixels straight from the tar."""
    import io
    import tarfile

    with tarfile.open(packed / "test" / "000000.tar") as tar:
        file = tar.extractfile(f"drive_{number:03d}.0.png")
        assert file is not None
        pixels = np.array(Image.open(io.BytesIO(file.read())))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255


def test_wrong_combinations_are_warned_of_with_the_reason() -> None:
    assert choose_scaling(None) == ("median", [])
    assert choose_scaling(5.4) == (5.4, [])
    scaling, warnings = choose_scaling(None, "metric")
    assert scaling == 1.0
    assert "no unit" in warnings[0]
    scaling, warnings = choose_scaling(5.4, "median")
    assert scaling == "median"
    assert "hides errors of scale" in warnings[0]
    assert choose_scaling(5.4, "auto", 2.0) == (2.0, [])
    with pytest.raises(UsageError, match="exclude"):
        choose_scaling(None, "median", 5.4)


def test_camera_z_for_eigen_and_raw_points_for_the_benchmark_are_warned_of(tmp_path: Path, mono: Path) -> None:
    camera = pack_truth(tmp_path / "camera", [constant(5)], convention="camera_z")
    assert "lidar" in measured(camera, model=str(mono)).warnings[0]
    improved = pack_truth(tmp_path / "improved", [constant(5)], split="eigen_benchmark", source="improved")
    report = measured(improved, model=str(mono))
    assert report.evaluation.protocol == EIGEN_BENCHMARK
    assert report.warnings == []
    assert report.evaluation.images[0].pixels == 40 * 120
    assert "no crop" in measured(improved, model=str(mono), crop="garg").warnings[0]


def test_images_stored_smaller_than_the_networks_input_are_warned_of(packed: Path, tmp_path: Path) -> None:
    larger = tiny_config(data={"width": WIDTH + 32})
    report = measured(packed, model=str(tiny_checkpoint(tmp_path / "large.pt", larger)))
    assert report.warnings == [
        "the images are stored at 96x64 and enlarged to the networks' 128x64, which costs accuracy: pack them with "
        "--size 128x64"
    ]
    smaller = tiny_config(data={"width": WIDTH - 32})
    assert measured(packed, model=str(tiny_checkpoint(tmp_path / "small.pt", smaller))).warnings == []


def test_protocol_of_the_ground_truth_with_options_on_top() -> None:
    manifest = Manifest.model_construct(depth=None)
    assert choose_protocol(manifest) == EIGEN
    assert choose_protocol(manifest, "eigen_benchmark") == EIGEN_BENCHMARK
    assert choose_protocol(manifest, crop="eigen", max_depth=50.0) == Protocol("eigen", 1e-3, 50.0)
    with pytest.raises(UsageError, match="min < max"):
        choose_protocol(manifest, min_depth=80.0)


def test_depth_beyond_the_cap_does_not_count(tmp_path: Path, mono: Path) -> None:
    mixed = constant(60)
    mixed[:, :60] = 30 * 256
    packed = pack_truth(tmp_path / "mixed", [mixed])
    half = measured(packed, model=str(mono), crop="none", max_depth=50.0)
    assert half.evaluation.images[0].pixels == 40 * 60
    # Of improved ground truth every measurement counts.
    whole = measured(packed, model=str(mono), protocol="eigen_benchmark", max_depth=50.0)
    assert whole.evaluation.images[0].pixels == 40 * 120


def test_images_without_ground_truth_are_counted_and_left_out(tmp_path: Path, mono: Path) -> None:
    packed = pack_truth(tmp_path / "some", [constant(5), None, np.zeros((40, 120), np.uint16)])
    evaluation = measured(packed, model=str(mono)).evaluation
    assert [image.pixels > 0 for image in evaluation.images] == [True, False, False]
    assert evaluation.metrics["abs_rel"] == pytest.approx(evaluation.images[0].values[0])
    report = measured(packed, model=str(mono), save_png=tmp_path / "png")
    assert [path.name for path in (tmp_path / "png").iterdir()] == ["drive_000.png"]
    assert "2 images have no ground truth" in report.warnings[-1]
    empty = pack_truth(tmp_path / "none", [np.zeros((40, 120), np.uint16)])
    with pytest.raises(DatasetError, match="no measurement counts in any of 1 images"):
        measured(empty, model=str(mono))


def test_post_processing_changes_the_result_of_an_asymmetric_network(packed: Path, mono: Path) -> None:
    plain = measured(packed, model=str(mono)).evaluation
    merged = measured(packed, model=str(mono), post_process=True).evaluation
    assert merged.metrics["abs_rel"] != plain.metrics["abs_rel"]
    predictor = load(mono, "cpu")
    image = _image(packed, 0)
    merged_map = predictor.disparity(image, flip=True)
    # The far left is the mirror image's prediction alone.
    mirrored = predictor.disparity(image.flip(-1)).flip(-1)
    torch.testing.assert_close(merged_map[..., :3], mirrored[..., :3])
    torch.testing.assert_close(merged_map[..., 45], (predictor.disparity(image) + mirrored)[..., 45] / 2)


def test_saved_predictions_evaluate_to_the_same_numbers(packed: Path, mono: Path, tmp_path: Path) -> None:
    first = measured(packed, model=str(mono), save_predictions=tmp_path / "out.npy")
    again = measured(packed, predictions=tmp_path / "out.npy")
    assert again.evaluation.metrics == pytest.approx(first.evaluation.metrics, rel=1e-6)
    assert np.load(tmp_path / "out.npy").shape == (3, HEIGHT, WIDTH)


def test_files_hold_what_the_table_says(packed: Path, stereo: Path, tmp_path: Path) -> None:
    report = measured(
        packed,
        model=str(stereo),
        json_file=tmp_path / "e.json",
        csv_file=tmp_path / "e.csv",
        sheet=tmp_path / "e.png",
        save_png=tmp_path / "png",
    )
    data = json.loads((tmp_path / "e.json").read_text())
    assert data["metrics"] == report.evaluation.metrics
    assert data["images"] == 3
    assert data["scaling"] == 5.4
    rows = list(csv.DictReader((tmp_path / "e.csv").read_text().splitlines()))
    assert [row["key"] for row in rows] == ["drive_000", "drive_001", "drive_002"]
    mean = sum(float(row["rmse"]) for row in rows) / 3
    assert mean == pytest.approx(report.evaluation.metrics["rmse"], rel=1e-4)
    with Image.open(tmp_path / "e.png") as sheet:
        assert sheet.width == 3 * 480
    depth = np.asarray(Image.open(tmp_path / "png" / "drive_001.png"))
    assert depth.dtype == np.uint16
    assert depth.shape == (36, 110)
    disparity = load(stereo, "cpu").disparity(_image(packed, 1))
    expected = 5.4 / torch.nn.functional.interpolate(disparity, (36, 110), mode="bilinear")[0, 0].numpy()
    assert np.abs(depth / 256 - np.minimum(expected, 80)).max() <= 0.5 / 256 + 1e-3


def test_baselines_stand_beside_the_model(packed: Path, mono: Path) -> None:
    """True depth is constant in each image, so the constant guess, median-scaled, is exact."""
    counted: list[tuple[int, int]] = []
    options = EvalOptions(model=str(mono), dataset=str(packed), baselines=True, batch_size=2)
    rows = measure(options, load(mono, "cpu"), lambda done, total: counted.append((done, total))).rows
    # Three passes of three images, two at a time.
    assert counted == [(done, 9) for done in (2, 3, 5, 6, 8, 9)]
    assert rows["constant depth, median"]["abs_rel"] == pytest.approx(0, abs=1e-9)
    assert rows["untrained net, median"]["abs_rel"] > 0
    assert rows["published M 640x192"]["abs_rel"] == 0.115


def test_limit_and_batch_size_do_not_change_an_images_score(packed: Path, mono: Path) -> None:
    whole = measured(packed, model=str(mono), batch_size=3).evaluation.images
    for alone in (
        measured(packed, model=str(mono), batch_size=1).evaluation.images,
        measured(packed, model=str(mono), batch_size=2, limit=2).evaluation.images,
    ):
        # The second image is the smallest: in a batch it is padded, and its crop is still of its own size.
        assert len(alone) == (3 if alone[-1].key == whole[-1].key else 2)
        for one, other in zip(alone, whole, strict=False):
            assert (one.key, one.pixels) == (other.key, other.pixels)
            assert one.values == pytest.approx(other.values, rel=1e-5)
    opened = open_dataset(str(packed))
    for limit, sizes in ((None, [2, 1]), (3, [2, 1]), (2, [2]), (1, [1])):
        batches = evaluation_batches(opened, "test", None, batch_size=2, limit=limit)
        assert [batch.size for batch in batches] == sizes


def test_parts_and_missing_ground_truth(tmp_path: Path, mono: Path) -> None:
    train = pack_truth(tmp_path / "train", [constant(5)], part="train", split="own")
    with pytest.raises(UsageError, match="--part"):
        measured(train, model=str(mono))
    assert len(measured(train, model=str(mono), part="train").evaluation.images) == 1
    with pytest.raises(DatasetError, match="no part 'val'"):
        measured(train, model=str(mono), part="val")
    shards = [Shard.model_construct(name=f"{part}/000000.tar") for part in ("train", "val", "test")]
    for count, part in ((3, "test"), (2, "val")):
        assert choose_part(Manifest.model_construct(shards=shards[:count]), None) == part


def test_options_that_exclude_each_other(packed: Path, mono: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="one of the two"):
        measured(packed)
    with pytest.raises(UsageError, match="saved predictions"):
        measured(packed, predictions=tmp_path / "d.npy", post_process=True)


def test_names_of_models_in_tables() -> None:
    names = {
        "runs/night.v2": "night.v2",
        "runs/night/checkpoints/best.pt": "night",
        "runs/night/checkpoints/last.pt": "night last",
        "copies/mono.pt": "mono",
        "mono_640x192/": "mono_640x192",
        "saved/disparities.npy": "disparities",
    }
    assert {path: model_name(path) for path in names} == names


def test_the_names_in_an_index_are_no_paths(mono: Path, tmp_path: Path) -> None:
    """DALI names a sample as the dataset's index does, and --save-png names its file after the sample."""
    folder = pack_truth(tmp_path / "d", [constant(10.0)])
    index, manifest = folder / "test" / "000000.idx", folder / "dataset.json"
    index.write_text(index.read_text().replace(" drive_000.", f" {tmp_path}/elsewhere."))
    data = json.loads(manifest.read_text())
    data["shards"][0] |= {"index_bytes": index.stat().st_size, "index_sha256": sha256_file(index)}
    manifest.write_text(json.dumps(data))
    options = EvalOptions(model="mono", dataset=str(folder), save_png=tmp_path / "pngs")
    with pytest.raises(DatasetError, match=r"000000\.idx: .*elsewhere"):
        measure(options, load(mono, "cpu"))
    assert not (tmp_path / "elsewhere.png").exists()


def test_the_sheet_shows_each_image_once(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors 1/2, 0 and 1 of the truth: two worst ones above, the best below."""
    captions: list[str] = []

    def keep(title: str, tiles: Sequence[Tile], **options: Any) -> Any:
        captions.extend(tile.caption for tile in tiles)
        return sheet(title, tiles, **options)

    monkeypatch.setattr("md2.evaluation.collectors.sheet", keep)
    measured(packed, predictions=save_disparities(tmp_path / "d.npy", [2, 10, 40]), scale=1.0, sheet=tmp_path / "s.png")
    shown = [caption.split("   ")[0] for caption in captions]
    assert shown == ["worst 1:  drive_002", "worst 2:  drive_000", "best 1:  drive_001"]


def test_the_documented_lines_measure_what_the_command_measures(packed: Path, mono: Path, tmp_path: Path) -> None:
    """As they stand in docs/evaluation.md."""
    (tmp_path / "runs" / "mono" / "checkpoints").mkdir(parents=True)
    (tmp_path / "runs" / "mono" / "checkpoints" / "best.pt").symlink_to(mono)
    (tmp_path / "kitti_shards").mkdir()
    (tmp_path / "kitti_shards" / "eigen").symlink_to(packed)
    abs_rel, spread, worst = run_lines(documented("evaluation.md"), tmp_path).split()
    evaluation = measured(packed, model=str(mono)).evaluation
    assert float(abs_rel) == pytest.approx(evaluation.metrics["abs_rel"], rel=1e-6)
    assert float(spread) == pytest.approx(evaluation.ratio_spread, rel=1e-6)
    assert worst == evaluation.ranked()[0].key


def test_ranking_and_latex_row() -> None:
    images = tuple(ImageScore(key, (value, 0, 0, 0, 1, 1, 1), 1.0, 5) for key, value in (("a", 0.1), ("b", 0.3)))
    evaluation = Evaluation((*images, ImageScore("c", (math.nan,) * 7, 1.0, 0)), EIGEN, "median")
    assert [image.key for image in evaluation.ranked()] == ["b", "a"]
    row = to_latex("mono_small", dict(zip(METRICS, (0.1154, 0.9, 4.8626, 0.193, 0.877, 0.959, 0.981), strict=True)))
    assert row == r"mono\_small & 0.115 & 0.900 & 4.863 & 0.193 & 0.877 & 0.959 & 0.981 \\"


def test_sixteen_bit_depth_keeps_zero_for_no_depth() -> None:
    depth = np.array([[1.0, 0.001, 300.0, np.nan, np.inf, 0.0]], np.float32)
    assert depth_to_uint16(depth).tolist() == [[256, 1, 65535, 0, 0, 0]]


def test_files_that_cannot_be_written_are_found_before_the_work(packed: Path, mono: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    worked = []
    for option in ("json_file", "csv_file", "sheet", "save_predictions", "save_png"):
        with pytest.raises(InputError, match="cannot write"):
            options = EvalOptions(model="m", dataset=str(packed), **{option: tmp_path / "file" / "x"})
            measure(options, load(mono, "cpu"), lambda done, total: worked.append(done))
    with pytest.raises(InputError, match="it is a folder"):
        measured(packed, model=str(mono), csv_file=tmp_path)
    assert not worked
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_images_without_any_ground_truth_say_so(tmp_path: Path, mono: Path) -> None:
    packed = pack_truth(tmp_path / "late", [None, None, constant(5)])
    with pytest.raises(DatasetError, match="none of the 2 images has ground truth"):
        measured(packed, model=str(mono), limit=2)
