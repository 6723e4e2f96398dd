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
from evaluation_data import HEIGHT, WIDTH, constant, documented, pack_truth, run_lines, tiny_checkpoint, tiny_config
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
from md2.evaluation.predictions import keys_file
from md2.evaluation.run import EvalOptions, EvalReport, model_name, run_eval, to_latex
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


def save(path: Path, depths: list[float], keys: list[str] | None = None) -> Path:
    """Disparities of constant depth, with the keys beside them."""
    np.save(path, np.stack([np.full((8, 24), 1 / depth, np.float32) for depth in depths]))
    names = keys if keys is not None else [f"drive_{number:03d}" for number in range(len(depths))]
    keys_file(path).write_text("\n".join(names))
    return path


def run(dataset: Path, **options: Any) -> EvalReport:
    model = options.get("model")
    return run_eval(
        EvalOptions(dataset=str(dataset), **{"model": None, **options}), load(model, "cpu") if model else None
    )


def test_saved_disparities_by_hand(packed: Path, tmp_path: Path) -> None:
    """Depths 2, 10, 40 for true 4, 10, 20, with 1 m per unit: errors 1/2, 0, 1 of the truth."""
    report = run(packed, predictions=save(tmp_path / "d.npy", [2, 10, 40]), scale=1.0)
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
    report = run(packed, predictions=save(tmp_path / "d.npy", [2, 10, 40]))
    assert report.evaluation.metrics["abs_rel"] == pytest.approx(0, abs=1e-6)
    assert report.evaluation.ratio_median == pytest.approx(1)
    mean = 3.5 / 3
    deviations = ((2 - mean) ** 2 + (1 - mean) ** 2 + (0.5 - mean) ** 2) / 3
    assert report.evaluation.ratio_spread == pytest.approx(math.sqrt(deviations))


def test_predictions_are_found_by_key_and_not_by_place(packed: Path, tmp_path: Path) -> None:
    """Rows in another order than the shards', and more of them: Eigen's 697 serve the 652."""
    names = ["drive_002", "elsewhere_000", "drive_000", "drive_001"]
    predictions = save(tmp_path / "d.npy", [20, 1, 4, 10], names)
    assert run(packed, predictions=predictions, scale=1.0).evaluation.metrics["abs_rel"] == pytest.approx(0, abs=1e-6)
    listed = run(packed, predictions=predictions, scale=1.0, order=names)
    assert listed.evaluation.metrics["a1"] == 1
    # Keys that were saved beside the file are believed before a split that says otherwise.
    assert run(packed, predictions=predictions, scale=1.0, order=names[::-1]).evaluation.metrics["a1"] == 1
    keys_file(predictions).unlink()
    assert run(packed, predictions=predictions, scale=1.0, order=names).evaluation.metrics["a1"] == 1
    with pytest.raises(InputError, match="4 predictions for 3 images"):
        run(packed, predictions=predictions, order=names[:3])
    with pytest.raises(InputError, match="drive_001 is not in the list"):
        run(packed, predictions=save(tmp_path / "less.npy", [20, 4], ["drive_002", "drive_000"]))


def test_predictions_without_keys_ask_for_the_split(packed: Path, tmp_path: Path) -> None:
    predictions = save(tmp_path / "d.npy", [4, 10, 20])
    keys_file(predictions).unlink()
    with pytest.raises(InputError, match="--split"):
        run(packed, predictions=predictions)


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
        run(packed, predictions=tmp_path / "d.npy", order=["drive_000", "drive_001", "drive_002"])


def test_nan_predictions_are_named(packed: Path, tmp_path: Path) -> None:
    predictions = save(tmp_path / "d.npy", [4, float("nan"), 20])
    with pytest.raises(InputError, match=r"drive_001.*NaN"):
        run(packed, predictions=predictions)


def test_predictions_that_are_mostly_infinitely_far_have_no_scale(packed: Path, tmp_path: Path) -> None:
    """Their median depth is infinite; in metres they are merely wrong, 80 m for 4 m."""
    predictions = save(tmp_path / "d.npy", [math.inf, 10, 20])
    with pytest.raises(InputError, match=r"drive_000: half .* no scale"):
        run(packed, predictions=predictions)
    assert run(packed, predictions=predictions, scale=1.0).evaluation.images[0].values[0] == pytest.approx(19)
    with pytest.raises(UsageError, match="positive"):
        run(packed, predictions=predictions, scale=0.0)


def test_the_network_is_measured_in_its_own_unit(packed: Path, stereo: Path) -> None:
    """abs_rel of the paper's unit, 5.4 m, recomputed from the network's output image by image."""
    report = run(packed, model=str(stereo), batch_size=2)
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
    assert "lidar" in run(camera, model=str(mono)).warnings[0]
    improved = pack_truth(tmp_path / "improved", [constant(5)], split="eigen_benchmark", source="improved")
    report = run(improved, model=str(mono))
    assert report.evaluation.protocol == EIGEN_BENCHMARK
    assert report.warnings == []
    assert report.evaluation.images[0].pixels == 40 * 120
    assert "no crop" in run(improved, model=str(mono), crop="garg").warnings[0]


def test_images_stored_smaller_than_the_networks_input_are_warned_of(packed: Path, tmp_path: Path) -> None:
    larger = tiny_config(data={"width": WIDTH + 32})
    report = run(packed, model=str(tiny_checkpoint(tmp_path / "large.pt", larger)))
    assert report.warnings == [
        "the images are stored at 96x64 and enlarged to the networks' 128x64, which costs accuracy: pack them with "
        "--size 128x64"
    ]
    smaller = tiny_config(data={"width": WIDTH - 32})
    assert run(packed, model=str(tiny_checkpoint(tmp_path / "small.pt", smaller))).warnings == []


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
    half = run(packed, model=str(mono), crop="none", max_depth=50.0)
    assert half.evaluation.images[0].pixels == 40 * 60
    # Of improved ground truth every measurement counts.
    whole = run(packed, model=str(mono), protocol="eigen_benchmark", max_depth=50.0)
    assert whole.evaluation.images[0].pixels == 40 * 120


def test_images_without_ground_truth_are_counted_and_left_out(tmp_path: Path, mono: Path) -> None:
    packed = pack_truth(tmp_path / "some", [constant(5), None, np.zeros((40, 120), np.uint16)])
    evaluation = run(packed, model=str(mono)).evaluation
    assert [image.pixels > 0 for image in evaluation.images] == [True, False, False]
    assert evaluation.metrics["abs_rel"] == pytest.approx(evaluation.images[0].values[0])
    report = run(packed, model=str(mono), save_png=tmp_path / "png")
    assert [path.name for path in (tmp_path / "png").iterdir()] == ["drive_000.png"]
    assert "2 images have no ground truth" in report.warnings[-1]
    empty = pack_truth(tmp_path / "none", [np.zeros((40, 120), np.uint16)])
    with pytest.raises(DatasetError, match="no measurement counts in any of 1 images"):
        run(empty, model=str(mono))


def test_post_processing_changes_the_result_of_an_asymmetric_network(packed: Path, mono: Path) -> None:
    plain = run(packed, model=str(mono)).evaluation
    merged = run(packed, model=str(mono), post_process=True).evaluation
    assert merged.metrics["abs_rel"] != plain.metrics["abs_rel"]
    predictor = load(mono, "cpu")
    image = _image(packed, 0)
    merged_map = predictor.disparity(image, flip=True)
    # The far left is the mirror image's prediction alone.
    mirrored = predictor.disparity(image.flip(-1)).flip(-1)
    torch.testing.assert_close(merged_map[..., :3], mirrored[..., :3])
    torch.testing.assert_close(merged_map[..., 45], (predictor.disparity(image) + mirrored)[..., 45] / 2)


def test_saved_predictions_evaluate_to_the_same_numbers(packed: Path, mono: Path, tmp_path: Path) -> None:
    first = run(packed, model=str(mono), save_predictions=tmp_path / "out.npy")
    again = run(packed, predictions=tmp_path / "out.npy")
    assert again.evaluation.metrics == pytest.approx(first.evaluation.metrics, rel=1e-6)
    assert np.load(tmp_path / "out.npy").shape == (3, HEIGHT, WIDTH)


def test_files_hold_what_the_table_says(packed: Path, stereo: Path, tmp_path: Path) -> None:
    report = run(
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
    rows = run_eval(options, load(mono, "cpu"), lambda done, total: counted.append((done, total))).rows
    # Three passes of three images, two at a time.
    assert counted == [(done, 9) for done in (2, 3, 5, 6, 8, 9)]
    assert rows["constant depth, median"]["abs_rel"] == pytest.approx(0, abs=1e-9)
    assert rows["untrained net, median"]["abs_rel"] > 0
    assert rows["published M 640x192"]["abs_rel"] == 0.115


def test_limit_and_batch_size_do_not_change_an_images_score(packed: Path, mono: Path) -> None:
    whole = run(packed, model=str(mono), batch_size=3).evaluation.images
    for alone in (
        run(packed, model=str(mono), batch_size=1).evaluation.images,
        run(packed, model=str(mono), batch_size=2, limit=2).evaluation.images,
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
        run(train, model=str(mono))
    assert len(run(train, model=str(mono), part="train").evaluation.images) == 1
    with pytest.raises(DatasetError, match="no part 'val'"):
        run(train, model=str(mono), part="val")
    shards = [Shard.model_construct(name=f"{part}/000000.tar") for part in ("train", "val", "test")]
    for count, part in ((3, "test"), (2, "val")):
        assert choose_part(Manifest.model_construct(shards=shards[:count]), None) == part


def test_options_that_exclude_each_other(packed: Path, mono: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="one of the two"):
        run(packed)
    with pytest.raises(UsageError, match="saved predictions"):
        run(packed, predictions=tmp_path / "d.npy", post_process=True)


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
        run_eval(options, load(mono, "cpu"))
    assert not (tmp_path / "elsewhere.png").exists()


def test_the_sheet_shows_each_image_once(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors 1/2, 0 and 1 of the truth: two worst ones above, the best below."""
    captions: list[str] = []

    def keep(title: str, tiles: Sequence[Tile], **options: Any) -> Any:
        captions.extend(tile.caption for tile in tiles)
        return sheet(title, tiles, **options)

    monkeypatch.setattr("md2.evaluation.collectors.sheet", keep)
    run(packed, predictions=save(tmp_path / "d.npy", [2, 10, 40]), scale=1.0, sheet=tmp_path / "s.png")
    shown = [caption.split("   ")[0] for caption in captions]
    assert shown == ["worst 1:  drive_002", "worst 2:  drive_000", "best 1:  drive_001"]


def test_the_documented_lines_measure_what_the_command_measures(packed: Path, mono: Path, tmp_path: Path) -> None:
    """As they stand in docs/evaluation.md."""
    (tmp_path / "runs" / "mono" / "checkpoints").mkdir(parents=True)
    (tmp_path / "runs" / "mono" / "checkpoints" / "best.pt").symlink_to(mono)
    (tmp_path / "kitti_shards").mkdir()
    (tmp_path / "kitti_shards" / "eigen").symlink_to(packed)
    abs_rel, spread, worst = run_lines(documented("evaluation.md"), tmp_path).split()
    evaluation = run(packed, model=str(mono)).evaluation
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


# Files of other projects


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
        return any("look like depth" in warning for warning in run(packed, predictions=tmp_path / "p.npy").warnings)

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
    report = run(truth, predictions=tmp_path / "d.npy", scale=1.0, csv_file=tmp_path / "e.csv")
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
    assert run(equal, predictions=tmp_path / "two.npy", scale=1.0).evaluation.metrics["rmse"] == pytest.approx(11)
    with pytest.raises(InputError, match="3 predictions for 2 images"):
        run(equal, predictions=tmp_path / "d.npy")
    with pytest.raises(UsageError, match="--sheet shows images"):
        run(truth, predictions=tmp_path / "d.npy", sheet=tmp_path / "s.png")


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
        report = run(tmp_path / folder, predictions=tmp_path / "d.npy", scale=1.0, order=given)
        errors = (0.5, 1) if given and "x" in given else (0.5, 0, 1)  # key x has a prediction, and no ground truth
        assert report.evaluation.metrics["abs_rel"] == pytest.approx(sum(errors) / len(errors), rel=1e-5)
    first = run(tmp_path / "numbers", predictions=tmp_path / "d.npy", scale=1.0, limit=2)
    assert first.evaluation.metrics["abs_rel"] == pytest.approx(0.25, rel=1e-5)
    same = run(tmp_path / "keys", predictions=tmp_path / "keys")
    assert same.evaluation.metrics["abs_rel"] == pytest.approx(0, abs=1e-5)
    with pytest.raises(InputError, match="3 depth maps for 2 lines"):
        run(tmp_path / "numbers", predictions=tmp_path / "d.npy", order=["a", "b"])


def test_disparities_where_depth_pngs_are_expected_are_noticed(tmp_path: Path) -> None:
    truth = [ramp(4, 30), ramp(10, 50)]
    packed = pack_truth(tmp_path / "eigen", truth)
    for name, values in (("depth", truth), ("disparity", [(256 * 256 * 8 / one).astype(np.uint16) for one in truth])):
        (tmp_path / name).mkdir()
        for number, value in enumerate(values):
            Image.fromarray(value).save(tmp_path / name / f"drive_00{number}.png")
        said = run(packed, predictions=tmp_path / name).warnings
        assert any("look like disparities: depth (metres x 256)" in one for one in said) == (name == "disparity")


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("/tmp/md2_hostile_ground_truth"),)


def test_ground_truth_cannot_run_code_and_broken_files_are_one_line(tmp_path: Path) -> None:
    marker = Path("/tmp/md2_hostile_ground_truth")
    marker.unlink(missing_ok=True)
    np.save(tmp_path / "d.npy", np.ones((1, 4, 4), np.float32))
    hostile = save_ground_truth(tmp_path / "hostile.npz", [Hostile()])  # type: ignore[list-item]
    with pytest.raises(InputError, match=r"cannot be read \(it holds .*, which is no array\)"):
        run(hostile, predictions=tmp_path / "d.npy")
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
        ("flat", "entry 0 is not a floating-point depth map"),
        ("absent", "no such file"),
    ):
        with pytest.raises(InputError, match=message):
            run(tmp_path / f"{name}.npz", predictions=tmp_path / "d.npy")


def test_a_folder_of_depth_pngs_is_a_prediction(packed: Path, tmp_path: Path) -> None:
    """Metres x 256 for true 4, 10, 20: predicted 2, 10, 40, by key, or in the split's order under other names."""
    for folder, names in (("keys", [f"drive_00{n}" for n in range(3)]), ("numbers", ["1", "9", "10"])):
        (tmp_path / folder).mkdir()
        for name, metres in zip(names, (2, 10, 40), strict=True):
            Image.fromarray(constant(metres, 30, 90)).save(tmp_path / folder / f"{name}.png")
    by_key = run(packed, predictions=tmp_path / "keys").evaluation
    assert by_key.scaling == 1.0
    assert by_key.metrics["abs_rel"] == pytest.approx((0.5 + 0 + 1) / 3, rel=1e-4)
    order = [f"drive_00{n}" for n in range(3)]
    assert run(packed, predictions=tmp_path / "numbers", order=order).evaluation.metrics == by_key.metrics
    with pytest.raises(InputError, match=r"no drive_000\.png.*--split"):
        run(packed, predictions=tmp_path / "numbers")
    with pytest.raises(InputError, match="3 PNGs for 2 lines"):
        run(packed, predictions=tmp_path / "numbers", order=order[:2])
    Image.new("RGB", (9, 9)).save(tmp_path / "keys" / "drive_001.png")
    with pytest.raises(InputError, match="16-bit grey"):
        run(packed, predictions=tmp_path / "keys")


def test_files_that_cannot_be_written_are_found_before_the_work(packed: Path, mono: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    worked = []
    for option in ("json_file", "csv_file", "sheet", "save_predictions", "save_png"):
        with pytest.raises(InputError, match="cannot write"):
            options = EvalOptions(model="m", dataset=str(packed), **{option: tmp_path / "file" / "x"})
            run_eval(options, load(mono, "cpu"), lambda done, total: worked.append(done))
    with pytest.raises(InputError, match="it is a folder"):
        run(packed, model=str(mono), csv_file=tmp_path)
    assert not worked
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_images_without_any_ground_truth_say_so(tmp_path: Path, mono: Path) -> None:
    packed = pack_truth(tmp_path / "late", [None, None, constant(5)])
    with pytest.raises(DatasetError, match="none of the 2 images has ground truth"):
        run(packed, model=str(mono), limit=2)
