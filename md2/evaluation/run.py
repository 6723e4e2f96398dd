"""What `md2 eval` does: open, choose protocol and scaling, measure, write what was asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from md2.data.batch import Batch
from md2.evaluation.evaluate import (
    Evaluation,
    Source,
    Watcher,
    choose_part,
    choose_protocol,
    choose_scaling,
    constant_disparity,
    dataset_warnings,
    evaluate,
    evaluation_batches,
    network_disparity,
    read_predictions,
    saved_disparity,
)
from md2.evaluation.metrics import Crop
from md2.evaluation.scores import to_csv, to_json
from md2.evaluation.sheets import LEGEND, BenchmarkPngs, Extremes, Keeper
from md2.inference.predictor import Predictor
from md2.model import Networks
from md2.visualize import write_file, write_npy, write_png
from md2.zoo import zoo
from shards.dataset import LocalDataset, open_dataset
from shards.errors import InputError, UsageError

Progress = Callable[[int, int], None]
"""Told how many images are done, of how many."""


@dataclass(frozen=True)
class EvalOptions:
    """Options of `md2 eval`; see its help.

    Attributes:
        model: name of what is evaluated; None with `predictions`.
        dataset: folder or URL of a packed dataset.
        dataset_name: what to call it; None: its URL.
        order: sample key of each row of `predictions` (and of `save_predictions`); None: from PREDICTIONS.keys.txt,
            which is believed in any case where it is there.
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
    batch_size: int = 16
    limit: int | None = None


@dataclass(frozen=True)
class EvalReport:
    """What came out.

    Attributes:
        title: which data, protocol and scaling.
        rows: name -> metrics, the evaluated one first; then baselines and published rows, if any.
        published: names of those rows that are the paper's.
        warnings: why the numbers do not mean what one may think.
        written: files and folders.
    """

    evaluation: Evaluation
    title: str
    rows: dict[str, dict[str, float]]
    published: frozenset[str]
    warnings: list[str]
    written: list[Path] = field(default_factory=list)


def run_eval(
    options: EvalOptions, predictor: Predictor | None, progress: Progress = lambda done, total: None
) -> EvalReport:
    """Evaluate and write. `predictor` is what runs; None with `predictions`.

    Raises:
        UsageError: options that exclude each other.
        InputError: predictions cannot be read or placed, or are NaN.
        DatasetError: the dataset cannot be read or has no ground truth.
    """
    _check(options, predictor)
    dataset = open_dataset(options.dataset)
    manifest = dataset.manifest
    part = choose_part(manifest, options.part)
    protocol = choose_protocol(
        manifest, options.protocol, crop=options.crop, min_depth=options.min_depth, max_depth=options.max_depth
    )
    scaling, warnings = _scaling(options, predictor)
    warnings += dataset_warnings(manifest, protocol, predictor)
    work = _Work(options, dataset, part, predictor)

    keeper, extremes = Keeper(), Extremes(protocol)
    watchers: list[Watcher] = [keeper] if options.save_predictions else []
    watchers += [extremes] if options.sheet else []
    pngs = BenchmarkPngs(options.save_png, protocol.max_depth) if options.save_png is not None else None
    watchers += [pngs] if pngs is not None else []
    evaluation = evaluate(work.source(), work.batches(progress), protocol, scaling, watchers)

    if pngs is not None and pngs.without:
        warnings.append(f"{pngs.without} images without ground truth, and so without size or scale: no PNG of them")
    rows = {model_name(options.model or str(options.predictions)): evaluation.metrics}
    if options.baselines:
        median = evaluate(constant_disparity, work.batches(), protocol, "median")
        rows["constant depth, median"] = median.metrics
        if predictor is not None:
            fresh = network_disparity(_untrained(predictor))
            rows["untrained net, median"] = evaluate(fresh, work.batches(), protocol, "median").metrics
    published = published_rows() if manifest.split.name == "eigen" else {}
    rows |= published
    how = "median scaling" if scaling == "median" else f"metric, {scaling:g} m per unit"
    title = f"{options.dataset_name or dataset.url} {part}: {len(evaluation.images)} images, crop {protocol.crop}, "
    title += f"{protocol.min_depth:g}-{protocol.max_depth:g} m, {how}{', post-processed' * options.post_process}"
    report = EvalReport(evaluation, title, rows, frozenset(published), warnings)
    _write(options, report, dataset, part, keeper, extremes)
    return report


@dataclass(frozen=True)
class _Work:
    """One pass over the data, as often as it is needed."""

    options: EvalOptions
    dataset: LocalDataset
    part: str
    predictor: Predictor | None

    def source(self) -> Source:
        if self.predictor is not None:
            return network_disparity(self.predictor, flip=self.options.post_process)
        assert self.options.predictions is not None
        return saved_disparity(read_predictions(self.options.predictions), _order(self.options))

    def batches(self, progress: Progress = lambda done, total: None) -> Iterator[Batch]:
        total = self.dataset.manifest.samples(self.part)
        total = min(total, self.options.limit or total)
        done = 0
        for batch in evaluation_batches(
            self.dataset, self.part, self.predictor, batch_size=self.options.batch_size, limit=self.options.limit
        ):
            yield batch
            done += batch.size
            progress(done, total)


def _check(options: EvalOptions, predictor: Predictor | None) -> None:
    if (predictor is None) == (options.predictions is None):
        raise UsageError("give a model to evaluate, or --predictions FILE; one of the two")
    if options.predictions is not None and options.post_process:
        raise UsageError("--post-process runs the networks; saved predictions are taken as they are")


def _scaling(options: EvalOptions, predictor: Predictor | None) -> tuple[Literal["median"] | float, list[str]]:
    if predictor is not None:
        return choose_scaling(predictor.metres_per_unit, options.scaling, options.scale)
    if options.scaling == "metric" and options.scale is None:
        return 1.0, ["predictions are taken as 1 / metres; if they are in another unit give --scale METRES_PER_UNIT"]
    # Of predictions nothing is known about the unit, so neither choice deserves a warning.
    return choose_scaling(
        None, "median" if options.scaling == "auto" and options.scale is None else options.scaling, options.scale
    )


def model_name(model: str) -> str:
    """What to call a model in a table: the run's or the folder's own name, `RUN last` for another checkpoint of it."""
    path = Path(model)
    if path.parent.name == "checkpoints" and path.suffix == ".pt":
        run = path.parent.parent.resolve().name
        return run if path.stem == "best" else f"{run} {path.stem}"
    return path.stem if path.suffix in (".pt", ".npy") else path.resolve().name


def keys_file(predictions: Path) -> Path:
    """Where the sample keys of saved predictions are."""
    return predictions.with_name(predictions.name + ".keys.txt")


def _order(options: EvalOptions) -> Sequence[str]:
    assert options.predictions is not None
    path = keys_file(options.predictions)
    if options.order is not None and not path.exists():
        return options.order
    try:
        return path.read_text(encoding="utf-8").split()
    except OSError as error:
        raise InputError(
            f"which image is which in {options.predictions}? {path.name} is not beside it: name the split whose "
            "lines they follow with --split"
        ) from error


def _untrained(predictor: Predictor) -> Predictor:
    """The same networks with random weights."""
    config = predictor.config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        networks = Networks(config.model, config.data, config.loss)
    return Predictor(networks, config, None, predictor.device)


def published_rows() -> dict[str, dict[str, float]]:
    """The paper's main rows: M, S and MS at both sizes."""
    main = {"mono": "M", "stereo": "S", "mono_stereo": "MS"}
    wanted = {
        f"monodepth2_resnet18_kitti_{mode}_{size}": f"published {letters} {size}"
        for size in ("640x192", "1024x320")
        for mode, letters in main.items()
    }
    found = {recipe.name: recipe.published for recipe in zoo()}
    return {label: found[name] for name, label in wanted.items()}


def _write(
    options: EvalOptions, report: EvalReport, dataset: LocalDataset, part: str, keeper: Keeper, extremes: Extremes
) -> None:
    name = next(iter(report.rows))
    about = {
        "model": options.model,
        "predictions": str(options.predictions) if options.predictions else None,
        "dataset": dataset.url,
        "split": dataset.manifest.split.name,
        "manifest_sha256": dataset.manifest_sha256,
        "part": part,
        "post_processed": options.post_process,
        "warnings": report.warnings,
    }
    texts = {options.json_file: to_json(report.evaluation, **about), options.csv_file: to_csv(report.evaluation)}
    for path, text in texts.items():
        if path is not None:
            write_file(path, text.encode())
            report.written.append(path)
    if options.sheet is not None:
        write_png(options.sheet, extremes.picture(f"{name} on {report.title}", LEGEND))
        report.written.append(options.sheet)
    if options.save_predictions is not None:
        rows, keys = keeper.stacked(list(options.order) if options.order is not None else None)
        write_npy(options.save_predictions, rows)
        write_file(keys_file(options.save_predictions), "".join(f"{key}\n" for key in keys).encode())
        report.written.append(options.save_predictions)
    if options.save_png is not None:
        report.written.append(options.save_png)
