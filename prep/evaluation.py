"""Packs raw KITTI for an evaluation: one part of a split, targets and ground truth only, lossless, in the cache.

`md2 eval MODEL RAW --split eigen` packs what it needs once and evaluates that. So one path leads from raw files to
numbers, for published shards and for raw data.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from prep.packing.encode import SCRATCH_ADVICE, versions
from prep.packing.pack import Packed, pack, scratch_folder
from prep.packing.plan import PackingPlan, make_plan
from prep.raw.files import RawData
from prep.raw.kitti import Kitti
from prep.raw.splits import SplitLists
from prep.request import make_content, refuse_empty
from prep.workers import Progress, start_workers
from shards.errors import InputError, StorageError, UsageError
from shards.files import cache_folder
from shards.publish import read_manifest
from shards.storage import open_storage


def is_packed(url: str) -> bool:
    """Whether a folder or URL holds a packed dataset, not raw files.

    Raises:
        DatasetError, StorageError: its manifest is broken, or the storage fails.
    """
    return read_manifest(open_storage(url)) is not None


def evaluation_part(lists: SplitLists, part: str | None) -> str:
    """The part to evaluate: `part`, else `test`, `val`, or the only one.

    Raises:
        UsageError: no such part, or several with other names.
    """
    names = list(lists.parts)
    if part is None:
        part = next((name for name in ("test", "val") if name in names), names[0] if len(names) == 1 else None)
    if part is None or part not in names:
        raise UsageError(f"split {lists.name} has the parts {', '.join(names)}: name one with --part")
    return part


def line_keys(lists: SplitLists, part: str) -> list[str]:
    """Sample key (drive, side, frame) of each line of a part, in the list's order: that of saved predictions."""

    def drive_key(name: str) -> str:
        return f"odom_{int(name):02d}" if name.isdecimal() else name.rsplit("/", 1)[-1]

    return [f"{drive_key(line.drive)}_{line.side}_{line.frame:010d}" for line in lists.parts[part]]


def pack_for_evaluation(
    raw: Sequence[str],
    lists: SplitLists,
    part: str,
    size: tuple[int, int],
    *,
    cache: Path | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Packed:
    """Pack one part's targets and ground truth into the cache, unless it holds them already.

    Args:
        raw: folders or URLs, as for `md2 prep --raw`.
        size: width and height of the networks' input.
        cache: folder to use instead of the user's cache.
        workers: number of processes; None: one per core.

    Raises:
        InputError: none of the part's drives has data, none of its images has ground truth, or a file is broken.
        StorageError: the cache cannot be written.
    """
    # Lossless: the networks see the resized original, as in the published evaluation.
    content = make_content(lists, size=f"{size[0]}x{size[1]}", frames="0", stereo=False, codec="png")
    data = RawData(list(raw), follow_links=True)  # nothing is published
    plan = make_plan(lists, Kitti(data, content.depth), content, parts=[part])
    refuse_empty(plan, data)
    if not any(sample.depth for samples in plan.samples.values() for sample in samples):
        expected = {
            "improved": "data_depth_annotated.zip, or its folders train and val (DRIVE/proj_depth/groundtruth)",
            "velodyne": "DRIVE/velodyne_points/data",
        }
        raise InputError(
            f"{', '.join(raw)}: no ground truth for any image of {lists.name} there; expected: "
            f"{expected.get(content.depth or '', 'depth')}; name another place that has it with --raw"
        )
    folder = (cache or cache_folder() / "evaluation") / _identity(raw, lists, plan)
    published = read_manifest(open_storage(str(folder))) if folder.is_dir() else None
    if published is not None:  # its name says that nothing has changed; it may be another user's folder
        return Packed(str(folder), published.manifest, plan.skipped, already=True)
    try:
        with start_workers(workers or len(os.sched_getaffinity(0))) as pool:
            return pack(plan, lists, str(folder), scratch_folder(str(folder)), pool, progress=progress)
    except StorageError as error:
        advice = "set MD2_CACHE to another folder"
        text = str(error).replace(f"give another --out, or {SCRATCH_ADVICE}", advice).replace(SCRATCH_ADVICE, advice)
        raise StorageError(text) from error


def _identity(raw: Sequence[str], lists: SplitLists, plan: PackingPlan) -> str:
    """Folder name: a hash of all that decides the bytes, as far as it is known without reading the raw files."""
    where = [str(Path(url).resolve()) if Path(url).exists() else url for url in raw]
    known = (where, lists.sha256, asdict(plan.content), plan.samples_sha256, plan.input_bytes, versions())
    return f"{lists.name}_{hashlib.sha256(repr(known).encode()).hexdigest()[:16]}"


@dataclass(frozen=True)
class EvaluationData:
    """Data of an evaluation.

    Attributes:
        url: a packed dataset.
        name: its name in the output; None: its URL.
        part: part to evaluate; None: the dataset's own choice.
        order: sample keys in the split's order, for saved predictions; None without a split.
        left_out: number of lines of the split without a sample.
    """

    url: str
    name: str | None = None
    part: str | None = None
    order: list[str] | None = None
    left_out: int = 0


def find_evaluation_data(
    dataset: str,
    split: SplitLists | None,
    part: str | None,
    raw: Sequence[str],
    size: tuple[int, int],
    *,
    for_predictions: bool,
    progress: Progress | None = None,
) -> EvaluationData:
    """Use a packed dataset as it is, or pack a split's lines from raw KITTI.

    Args:
        dataset: packed dataset, or location of raw KITTI.
        split: lines to take of raw KITTI, or the order of saved predictions.
        raw: further locations of raw KITTI.
        size: width and height of the networks' input, for packing.
        for_predictions: saved predictions are evaluated, not a model.

    Raises:
        UsageError: raw KITTI without a split, or options for raw KITTI with a packed dataset.
        InputError, StorageError: as `pack_for_evaluation`.
    """
    if not is_packed(dataset):
        if split is None:
            if Path(dataset).is_dir():
                raise UsageError(f"{dataset}: no packed dataset there; for raw KITTI name the split: --split eigen")
            return EvaluationData(dataset, part=part)  # opening it raises the error
        chosen = evaluation_part(split, part)
        packed = pack_for_evaluation([dataset, *raw], split, chosen, size, progress=progress)
        name = f"{split.name} of {dataset}"
        return EvaluationData(packed.url, name, chosen, line_keys(split, chosen), len(packed.skipped))
    if raw:
        raise UsageError(f"{dataset} is packed already: --raw goes with raw KITTI, leave it out")
    if split is None:
        return EvaluationData(dataset, part=part)
    if not for_predictions:
        raise UsageError(
            f"{dataset} is packed already: --split chooses lines of raw KITTI, or says which lines --predictions "
            "follow; leave it out (--part chooses a part)"
        )
    return EvaluationData(dataset, part=part, order=line_keys(split, evaluation_part(split, part)))
