"""A model to publish: weights as safetensors, configuration, and a card that says what it was trained on and for what.

model/model.safetensors   all sub-networks, keys as in checkpoints with the sub-network's name in front
model/config.json         configuration, unit of depth, metrics, dataset, sha256 of the weights
model/README.md           the card; the YAML in front is for the Hugging Face Hub
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from md2 import __version__
from md2.checkpoint import ABOUT, Checkpoint, load_checkpoint, resolve, write_published
from md2.config import Config
from md2.evaluation.metrics import METRICS
from md2.evaluation.overlap import Overlap
from md2.inference.predictor import load
from md2.training.runlog import ENVIRONMENT
from md2.weights import is_monodepth2
from shards.card import licence_name, licence_of
from shards.errors import InputError, Md2Error, first_line
from shards.files import fsync_folder, read_small, temporary
from shards.manifest import CARD
from shards.storage import is_local, open_storage

_LONGEST = 1 << 20
"""Bytes of a file that is read for the card."""
_INTENDED = """\
Depth from single images of scenes like those of the training data, seen by a camera like theirs: for research, for
teaching, and as a start for training on other data. The depth is an estimate, without a measure of its error. It is
often wrong on glass, mirrors and the sky, on what moves as the camera does, and on other scenes and cameras. Nobody's
safety may depend on it.
"""


def export_safetensors(model: str | Path, folder: Path, evaluations: Sequence[Path] = ()) -> Path:
    """Write a run, checkpoint or folder of Monodepth2 weights as a folder to publish, whole or not at all.

    Args:
        evaluations: results of `md2 eval --json`, for the card.

    Returns:
        The folder; `md2.load` reads it, and its URL wherever it is published.

    Raises:
        InputError: no model there, an evaluation that cannot be read, or the folder exists or cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not empty: give a new folder")
    predictor = load(model, "cpu")
    networks, config = predictor.networks.state_dicts(), predictor.config
    if is_monodepth2(model):
        checkpoint, dataset = Checkpoint({}, {}, predictor.metres_per_unit), dict[str, Any]()
    else:
        path = resolve(model)
        checkpoint, dataset = load_checkpoint(path), _dataset(path)
    # The place of the dataset on this machine says nothing to others.
    data = {"url": Config().data.url} if is_local(config.data.url) else {}
    tree = config.model_copy(update={"data": config.data.model_copy(update=data)}).model_dump(mode="json")
    checkpoint = Checkpoint(
        tree, networks, predictor.metres_per_unit, checkpoint.step, checkpoint.epoch, {}, checkpoint.metrics
    )
    results = [_evaluation(path) for path in evaluations]
    about = {"library_name": "md2", "md2_version": __version__, "dataset": dataset, "evaluations": results}
    licence = _licence(config.data.url) if dataset else None
    beside = temporary(folder)
    try:
        beside.mkdir(parents=True)
        write_published(checkpoint, beside, about)
        (beside / CARD).write_text(_card(checkpoint, config, dataset, results, licence), encoding="utf-8")
        beside.replace(folder)
        fsync_folder(folder.parent)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror or error}; name another place") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder


def _dataset(checkpoint: Path) -> dict[str, Any]:
    """What a run's environment.json, or an exported model's config.json, says of the training data; {} if nothing."""
    for path in (checkpoint.resolve().parent.parent / ENVIRONMENT, checkpoint.with_name(ABOUT)):
        try:
            found = json.loads(read_small(path, _LONGEST))["dataset"]
            return {name: str(found[name]) for name in ("split", "manifest_sha256", "images") if name in found}
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
    return {}


def _evaluation(path: Path) -> dict[str, Any]:
    """The facts of a result of `md2 eval --json` that a card shows."""
    try:
        found = json.loads(read_small(path, _LONGEST))
        overlap = found["training_overlap"]
        return {
            "dataset": " ".join(str(found[name]) for name in ("split", "part") if found[name]) or path.stem,
            "images": int(found["images"]),
            "scaling": str(found["scaling"]),
            "metrics": {name: float(found["metrics"][name]) for name in METRICS},
            "training_overlap": None if overlap is None else str(Overlap(**overlap)),
        }
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: not a result of md2 eval --json ({first_line(error)})") from error


def _licence(url: str) -> str | None:
    """Text on the licence in the card of the training data; None if the dataset cannot be read."""
    try:
        text = open_storage(url).read(CARD, _LONGEST)
    except Md2Error:
        return None
    return None if text is None else licence_of(text.decode(errors="replace"))


def _card(
    checkpoint: Checkpoint, config: Config, dataset: dict[str, Any], results: list[dict[str, Any]], licence: str | None
) -> str:
    """The text of a published model's README.md."""
    data, model = config.data, config.model
    sources = [f"frames {', '.join(map(str, data.frames))}"] + ["the stereo partner"] * data.stereo
    unit = checkpoint.metres_per_unit
    head = {
        "library_name": "md2",
        "pipeline_tag": "depth-estimation",
        "license": licence_name(licence),
        "tags": ["monocular-depth", "self-supervised", "monodepth2", *(["stereo"] if data.stereo else [])],
    }
    depth = "in metres" if unit is not None else "right up to one factor, the same for all images"
    training = f"{checkpoint.step:,} steps, {checkpoint.epoch} epochs" if checkpoint.step else "not known"
    sections = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n",
        f"# Monodepth2, {model.encoder}, {data.width}x{data.height}\n",
        "Depth from one image, learned without depth labels (Monodepth2, Godard et al., ICCV 2019) by md2 "
        f"{__version__}. "
        f'The depth is {depth}.\n\n    import md2\n    result = md2.load("URL or folder").predict(image)\n'
        "    result.depth, result.unit\n",
        f"## Training\n\nLearned from {' and '.join(sources)}; {training}. `config.json` has every setting.\n",
        _data_section(dataset),
        _metrics_section(checkpoint.metrics, results),
        f"## Licence\n\nmd2 does not decide under which licence these weights may be used: state it here. "
        f"{'The licence of the training data:' if licence else 'That of the training data is not known.'}\n"
        + (f"\n{licence.strip()}\n" if licence else ""),
        f"## Intended use\n\n{_INTENDED}",
    ]
    return "\n".join(sections)


def _data_section(dataset: dict[str, Any]) -> str:
    if not dataset:
        return "## Data\n\nNot known: these weights came without a record of their training.\n"
    lines = [
        f"Split {dataset.get('split', 'not known')}, images as {dataset.get('images', 'not known')}. The sha256 of the "
        f"dataset's manifest (dataset.json), which names exactly these bytes: `{dataset.get('manifest_sha256', '')}`."
    ]
    return "## Data\n\n" + "\n".join(lines) + "\n"


def _metrics_section(validation: dict[str, float], results: list[dict[str, Any]]) -> str:
    rows = [("validation during training", {name: validation.get(name) for name in METRICS})] if validation else []
    rows += [(f"{one['dataset']}: {one['images']} images, {one['scaling']} scaling", one["metrics"]) for one in results]
    if not rows:
        return "## Metrics\n\nNot measured.\n"
    lines = [f"| | {' | '.join(METRICS)} |", "|---" * (len(METRICS) + 1) + "|"]
    for name, metrics in rows:
        cells = ["" if metrics[metric] is None else f"{metrics[metric]:.3f}" for metric in METRICS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    audits = [
        f"- {one['dataset']}: {one['training_overlap'] or 'not known, since the training data were not at hand'}"
        for one in results
    ]
    leaks = ["", "Leak audit, which evaluated images training has used:", "", *audits] if audits else []
    return "## Metrics\n\n" + "\n".join([*lines, *leaks]) + "\n"
