"""The work of `md2 eval`: choose protocol and scaling, measure, write files."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from md2.data.batch import Batch
from md2.evaluation.collectors import BenchmarkPngs, Collector, Direction, Disparities, WorstAndBest
from md2.evaluation.evaluate import (
    Evaluation,
    PredictDisparity,
    Scaling,
    choose_part,
    choose_protocol,
    choose_scaling,
    constant_disparity,
    dataset_warnings,
    evaluate,
    evaluation_batches,
    network_disparity,
)
from md2.evaluation.further import FurtherMetrics
from md2.evaluation.metrics import EIGEN, METRICS, Crop, Protocol
from md2.evaluation.overlap import Overlap, training_overlap
from md2.evaluation.predictions import is_ground_truth, keys_file, open_ground_truth, open_predictions, truth_batches
from md2.inference.inputs import Progress
from md2.inference.predictor import Predictor
from md2.model import Networks
from md2.visualize import require_writable, write_file, write_npy, write_png
from md2.zoo import PUBLISHED
from shards.dataset import open_dataset
from shards.errors import UsageError


@dataclass(frozen=True)
class EvalOptions:
    """Options of `md2 eval`; see its help.

    Attributes:
        model: name of the model; None with `predictions`.
        dataset: folder or URL of a packed dataset; with `predictions` also gt_depths.npz or a folder of depth PNGs.
        dataset_name: its name in the output; None: its URL.
        order: sample key of each row of `predictions` and `save_predictions`. PREDICTIONS.keys.txt, if it exists,
            overrides it.
    """

    model: str | None
    dataset: str
    dataset_name: str | None = None
    part: str | None = None
    protocol: Literal["auto", "eigen", "eigen_benchmark"] = "auto"
    crop: Crop | None = None
    min_depth: float | None = None
    max_depth: float | None = None
    scaling: Literal["auto", "median", "metric"] = "auto"
    scale: float | None = None
    post_process: bool = False
    predictions: Path | None = None
    order: Sequence[str] | None = None
    save_predictions: Path | None = None
    save_png: Path | None = None
    json_file: Path | None = None
    csv_file: Path | None = None
    sheet: Path | None = None
    baselines: bool = False
    points: bool = False
    batch_size: int = 16
    limit: int | None = None


@dataclass(frozen=True)
class EvalReport:
    """The result of an evaluation.

    Attributes:
        overlap: how many of the images the model was trained on; None: unknown.
        title: which data, protocol and scaling.
        further: metrics of KITTI's depth benchmark, and with `points` F-scores, by name.
        rows: name -> metrics, the evaluated one first; then baselines and published rows, if any.
        published: names of those rows that are the paper's.
        warnings: why the numbers may mislead.
        about: facts for the JSON file.
    """

    evaluation: Evaluation
    overlap: Overlap | None
    title: str
    further: dict[str, float]
    rows: dict[str, dict[str, float]]
    published: frozenset[str]
    warnings: list[str]
    about: dict[str, Any]
    disparities: Disparities
    worst_and_best: WorstAndBest


def measure(
    options: EvalOptions,
    predictor: Predictor | None,
    progress: Progress = lambda done, total: None,
    also: Sequence[Collector] = (),
) -> EvalReport:
    """Evaluate a model (`predictor`) or `options.predictions`. Of the files, only --save-png is written meanwhile.

    Args:
        also: collectors that see every batch as well.

    Raises:
        UsageError: options exclude each other.
        InputError: predictions cannot be read, do not match the images, or are NaN; a file cannot be written.
        DatasetError: the dataset cannot be read or has no ground truth.
    """
    _check(options, predictor)
    data = (_truth_alone if is_ground_truth(options.dataset) else _packed)(options, predictor)
    scaling, warnings = _scaling(options, predictor)
    warnings += data.warnings
    predict: PredictDisparity
    if predictor is not None:
        predict = network_disparity(predictor, flip=options.post_process)
    else:
        assert options.predictions is not None
        predict = open_predictions(options.predictions, options.order or data.keys)

    disparities, worst_and_best, direction = Disparities(), WorstAndBest(data.protocol), Direction()
    further = FurtherMetrics(data.protocol, options.points)
    collectors: list[Collector] = [*also, further, *([disparities] if options.save_predictions else [])]
    collectors += [worst_and_best] if options.sheet else []
    collectors += [direction] if predictor is None else []
    pngs = BenchmarkPngs(options.save_png, data.protocol.max_depth) if options.save_png is not None else None
    collectors += [pngs] if pngs is not None else []
    passes = 1 + options.baselines * (1 if predictor is None else 2)

    images = min(data.total, options.limit or data.total)

    def batches(number: int) -> Iterator[Batch]:
        """Read the data for pass `number`, and report progress over all passes."""
        done = number * images
        for batch in data.batches():
            yield batch
            done += batch.size
            progress(done, passes * images)

    evaluation = evaluate(predict, batches(0), data.protocol, scaling, collectors)

    if direction.is_depth:
        pictures = options.predictions is not None and options.predictions.is_dir()
        warnings.append(
            "the PNGs fall as the true depth rises, so they look like disparities: depth (metres x 256) is needed"
            if pictures
            else "the predictions rise with the true depth, so they look like depth: disparities (1 / depth) are needed"
        )
    if pngs is not None and pngs.without:
        warnings.append(f"{pngs.without} images have no ground truth, so no size and scale: no PNG is written for them")
    rows = {model_name(options.model or str(options.predictions)): evaluation.metrics}
    if options.baselines:
        rows["constant depth, median"] = evaluate(constant_disparity, batches(1), data.protocol, "median").metrics
        if predictor is not None:
            fresh = network_disparity(_untrained(predictor))
            rows["untrained net, median"] = evaluate(fresh, batches(2), data.protocol, "median").metrics
    overlap = None
    if predictor is not None:
        overlap = training_overlap((image.key for image in evaluation.images), predictor.config.data)
        if overlap is not None and overlap.seen:
            warnings.append(f"{overlap}: the numbers are not those of unseen images")
    published = published_rows() if data.is_eigen else {}
    title = f"{options.dataset_name or data.name}: {'first ' * (images < data.total)}{images} images, "
    title += _how(data.protocol, scaling) + ", post-processed" * options.post_process
    about = {
        "model": options.model,
        "predictions": str(options.predictions) if options.predictions else None,
        **data.about,
        "further": {name: _finite(value) for name, value in further.means.items()},
        "post_processed": options.post_process,
        "training_overlap": asdict(overlap) if overlap is not None else None,
        "warnings": warnings,
    }
    return EvalReport(
        evaluation,
        overlap,
        title,
        further.means,
        rows | published,
        frozenset(published),
        warnings,
        about,
        disparities,
        worst_and_best,
    )


def _how(protocol: Protocol, scaling: Scaling) -> str:
    how = "median scaling" if scaling == "median" else f"metric, {scaling:g} m per unit"
    return f"crop {protocol.crop}, {protocol.min_depth:g}-{protocol.max_depth:g} m, {how}"


@dataclass(frozen=True)
class _Data:
    """The data to measure on, `total` images; each call of `batches` reads them from the start, up to --limit."""

    name: str
    protocol: Protocol
    batches: Callable[[], Iterator[Batch]]
    total: int
    about: dict[str, Any]
    is_eigen: bool
    warnings: list[str] = field(default_factory=list)
    keys: Sequence[str] | None = None


def _packed(options: EvalOptions, predictor: Predictor | None) -> _Data:
    """Open a packed dataset."""
    dataset = open_dataset(options.dataset)
    manifest = dataset.manifest
    part = choose_part(manifest, options.part)
    protocol = choose_protocol(
        manifest, options.protocol, crop=options.crop, min_depth=options.min_depth, max_depth=options.max_depth
    )
    return _Data(
        f"{dataset.url} {part}",
        protocol,
        lambda: evaluation_batches(dataset, part, predictor, batch_size=options.batch_size, limit=options.limit),
        manifest.samples(part),
        {
            "dataset": dataset.url,
            "split": manifest.split.name,
            "manifest_sha256": dataset.manifest_sha256,
            "part": part,
        },
        manifest.split.name == "eigen",
        dataset_warnings(manifest, protocol, predictor),
    )


def _truth_alone(options: EvalOptions, predictor: Predictor | None) -> _Data:
    """Open ground truth without images (gt_depths.npz, PNGs), for predictions of the same names or order."""
    if predictor is not None:
        raise UsageError(
            f"{options.dataset} holds ground truth without images: give --predictions FILE, or evaluate the model on a "
            "packed split (md2 prep --split eigen)"
        )
    if options.sheet is not None:
        raise UsageError(f"--sheet shows images, and {options.dataset} has none: leave it out")
    truth = open_ground_truth(Path(options.dataset), options.order)
    # 697 maps are raw velodyne, 652 are improved depth.
    name = options.protocol if options.protocol != "auto" else "eigen_benchmark" if len(truth) == 652 else "eigen"
    protocol = choose_protocol(None, name, crop=options.crop, min_depth=options.min_depth, max_depth=options.max_depth)
    return _Data(
        options.dataset,
        protocol,
        lambda: truth_batches(truth[: options.limit], options.batch_size),
        len(truth),
        {"dataset": options.dataset, "split": None, "manifest_sha256": None, "part": None},
        protocol == EIGEN and len(truth) == 697,
        keys=[key for key, _ in truth],
    )


def _check(options: EvalOptions, predictor: Predictor | None) -> None:
    if (predictor is None) == (options.predictions is None):
        raise UsageError("give a model to evaluate, or --predictions FILE; one of the two")
    if options.points and is_ground_truth(options.dataset):
        raise UsageError(f"--points needs intrinsics, and {options.dataset} has none: use a packed dataset")
    if options.predictions is not None and options.post_process:
        raise UsageError("--post-process runs the networks, and saved predictions come without: leave it out")
    for path in (options.json_file, options.csv_file, options.sheet, options.save_predictions):
        if path is not None:
            require_writable(path)
    if options.save_png is not None:
        require_writable(options.save_png, folder=True)


def _scaling(options: EvalOptions, predictor: Predictor | None) -> tuple[Scaling, list[str]]:
    if predictor is not None:
        return choose_scaling(predictor.metres_per_unit, options.scaling, options.scale)
    wanted = options.scaling
    if options.predictions is not None and options.predictions.is_dir() and options.scale is None:
        return ("median" if wanted == "median" else 1.0), []  # depth PNGs are in metres
    if wanted == "metric" and options.scale is None:
        return 1.0, ["predictions are taken as 1 / metres; for another unit give --scale METRES_PER_UNIT"]
    # The unit of predictions is unknown, so neither choice deserves a warning.
    return choose_scaling(None, "median" if wanted == "auto" and options.scale is None else wanted, options.scale)


def model_name(model: str) -> str:
    """Name of a model in a table: the run's or the folder's own name, `RUN last` for another checkpoint of it."""
    path = Path(model)
    if path.parent.name == "checkpoints" and path.suffix == ".pt":
        run = path.parent.parent.resolve().name
        return run if path.stem == "best" else f"{run} {path.stem}"
    return path.stem if path.suffix in (".pt", ".npy") else path.resolve().name


def _untrained(predictor: Predictor) -> Predictor:
    """The same networks with random weights."""
    config = predictor.config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        networks = Networks.of(config)
    return Predictor(networks, config, None, predictor.device)


def published_rows() -> dict[str, dict[str, float]]:
    """Return the paper's main rows: M, S and MS at both sizes."""
    main = {"M": "mono", "S": "stereo", "MS": "mono_stereo"}
    return {
        f"published {letters} {size}": PUBLISHED[f"monodepth2_resnet18_kitti_{mode}_{size}"]
        for size in ("640x192", "1024x320")
        for letters, mode in main.items()
    }


# Files


def write_results(options: EvalOptions, report: EvalReport) -> list[Path]:
    """Write the files that `options` name; returns all files and folders that the evaluation wrote.

    Raises:
        InputError: a file cannot be written.
    """
    if options.json_file is not None:
        write_file(options.json_file, to_json(report.evaluation, **report.about).encode())
    if options.csv_file is not None:
        write_file(options.csv_file, to_csv(report.evaluation).encode())
    if options.sheet is not None:
        write_png(options.sheet, report.worst_and_best.picture(f"{next(iter(report.rows))} on {report.title}"))
    if options.save_predictions is not None:
        rows = report.disparities.rows
        keys = [key for key in options.order or rows if key in rows]
        write_npy(options.save_predictions, np.stack([rows[key] for key in keys]))
        write_file(keys_file(options.save_predictions), "".join(f"{key}\n" for key in keys).encode())
    named = (options.json_file, options.csv_file, options.sheet, options.save_predictions, options.save_png)
    return [path for path in named if path is not None]


def to_json(evaluation: Evaluation, **about: Any) -> str:
    """Encode all but the images' scores; `about` comes first. Numbers that are not finite become null."""
    tree = {
        **about,
        "protocol": asdict(evaluation.protocol),
        "scaling": evaluation.scaling,
        "images": len(evaluation.images),
        "images_without_ground_truth": len(evaluation.images) - len(evaluation.counted),
        "metrics": {name: _finite(value) for name, value in evaluation.metrics.items()},
        "scale_ratio": {"median": _finite(evaluation.ratio_median), "std": _finite(evaluation.ratio_spread)},
    }
    return json.dumps(tree, indent=1, allow_nan=False) + "\n"


def to_csv(evaluation: Evaluation) -> str:
    """Encode one line per image, sorted by key: metrics, scale factor, counted pixels; NaN becomes an empty cell."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["key", *METRICS, "scale_ratio", "pixels"])
    for image in sorted(evaluation.images, key=lambda image: image.key):
        cells = [f"{value:.6g}" if math.isfinite(value) else "" for value in (*image.values, image.ratio)]
        writer.writerow([image.key, *cells, image.pixels])
    return buffer.getvalue()


def to_latex(name: str, metrics: dict[str, float]) -> str:
    """Format a table row as papers print it: name and the seven metrics, three decimals each."""
    safe = "".join("\\" + char if char in "_&%#$" else char for char in name)
    return " & ".join([safe, *(f"{metrics[metric]:.3f}" for metric in METRICS)]) + r" \\"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
