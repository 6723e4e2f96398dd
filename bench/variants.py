"""What md2's variants of the published method gain on synthetic drives: the same steps, several seeds, one table.

    md2 bench variants FOLDER [--cases NAME,NAME] [--seeds 3] [--append FILE] [key.sub=value …]

Three synthetic streets train, mono, from random weights that see depth and motion of a plausible size; the depth of a
fourth is compared with its scans (Garg's crop). FOLDER keeps everything, so that a measurement may be stopped and
continued; a training that is done is not repeated. Overrides are for every `md2 train`, for example train.epochs=8.
`--report` makes the table of what is there.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev

from bench.camera import md2
from bench.machine import add_append, busy, processor, publish, versions
from bench.parity_report import Verdict
from md2.evaluation.evaluate import Scaling, evaluate, evaluation_batches, network_disparity
from md2.evaluation.metrics import EIGEN
from md2.inference.predictor import load
from md2.visualize import write_file
from shards.dataset import open_dataset

TRAINING = ["data.frames=[0,-1,1]", "data.stereo=false", "data.threads=1", "train.batch_size=4", "train.epochs=3"]
TRAINING += ["train.lr_step_epochs=2", "train.val_batches=1", "train.image_every=100000", "train.precision=bf16"]
TRAINING += ["model.start=[7.03,1.026]"]
"""From the usual start most seeds learn nothing in so few steps; the numbers are those of `md2 bench parity`."""
BASELINE = "mono"

Result = dict[str, float]
"""`abs_rel` with median scaling; of a model that knows its unit also `metres`, abs_rel without, and `factor`, by which
its depth differs from the truth."""


CASES: dict[str, list[str]] = {
    BASELINE: [],
    "crop": ["data.crop=[0.7,1]"],
    "hrdepth": ["model.decoder=hrdepth"],
    "given": ["train.poses=given"],
    "velocity": ["loss.velocity=0.05"],
}
"""Name of a training -> its overrides."""


def pack(folder: Path) -> Path:
    """The drives packed with their motion, unless they are there."""
    raw, shards = folder / "raw", folder / "shards"
    if not (raw / "splits/sample").exists():
        md2("sample", raw, "--drives", 4, "--frames", 40, "--size", "416x128", "--workers", 1)
    if not (shards / "dataset.json").exists():
        split = ("--split", raw / "splits/sample", "--no-stereo", "--motion")
        md2("prep", *split, "--raw", raw, "--out", shards, "--size", "192x64", "--workers", 1)
    return shards


def measure(folder: Path, name: str, seed: int, overrides: Sequence[str]) -> Result:
    """Train and evaluate one case with one seed, or what is left of that."""
    run = place(folder, name, seed)
    if not (run / "result.json").exists():
        shards = pack(folder)
        if (run / "checkpoints/last.pt").exists():
            md2("train", "--resume", run)
        else:
            words = [f"data.url={shards}", *TRAINING, *CASES[name], *overrides, f"train.seed={seed}"]
            md2("train", "demo", *words, "--run", run)
        write_file(run / "result.json", json.dumps(evaluated(run, shards)).encode())
    return dict(json.loads((run / "result.json").read_text()))


def place(folder: Path, name: str, seed: int) -> Path:
    return folder / "runs" / f"{name}-{seed}"


def evaluated(run: Path, shards: Path) -> Result:
    """A run's depth against that of the test images."""
    predictor, dataset = load(str(run), "cpu"), open_dataset(str(shards))
    scalings: list[Scaling] = ["median"] if predictor.metres_per_unit is None else ["median", predictor.metres_per_unit]
    scored = [
        evaluate(network_disparity(predictor), evaluation_batches(dataset, "test", predictor), EIGEN, scaling)
        for scaling in scalings
    ]
    found = {"abs_rel": scored[0].metrics["abs_rel"]}
    if predictor.metres_per_unit is not None:
        found["metres"] = scored[1].metrics["abs_rel"]
        found["factor"] = scored[0].ratio_median / predictor.metres_per_unit
    return found


def table(results: Mapping[str, Sequence[Result]]) -> str:
    """Mean ± standard deviation over the seeds, and abs_rel against the baseline's with its standard error (Welch)."""
    lines = [
        f"| | seeds | abs_rel, medians | against {BASELINE} | in standard errors | | abs_rel, metres | factor |",
        "|---|---:|---:|---:|---:|---|---:|---:|",
    ]
    base = [result["abs_rel"] for result in results.get(BASELINE, [])]
    for name, found in results.items():
        ours = [result["abs_rel"] for result in found]
        compared = name != BASELINE and len(ours) > 1 and len(base) > 1
        against = str(Verdict.of(ours, base)) if compared else " | | "
        cells = [spread([result[key] for result in found if key in result]) for key in ("abs_rel", "metres", "factor")]
        lines.append(f"| {name} | {len(found)} | {cells[0]} | {against} | {cells[1]} | {cells[2]} |")
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    deviation = stdev(values) if len(values) > 1 else math.nan
    return f"{fmean(values):.3f}" if math.isnan(deviation) else f"{fmean(values):.3f} ± {deviation:.3f}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cases", default=",".join(CASES), help=f"some of {', '.join(CASES)} (default: all)")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each case (default: %(default)s)")
    parser.add_argument("--report", action="store_true", help="train nothing: the table of the runs that are there")
    add_append(parser)
    parser.add_argument("overrides", nargs="*", help="key.sub=value for every md2 train")
    options = parser.parse_intermixed_args(arguments)
    names = options.cases.split(",")
    if unknown := [name for name in names if name not in CASES]:
        parser.error(f"--cases: no such case: {', '.join(unknown)}; choose from {', '.join(CASES)}")
    results: dict[str, list[Result]] = {name: [] for name in names}
    for seed in range(options.seeds):
        for name in names:
            if options.report and not (place(options.folder, name, seed) / "result.json").exists():
                continue
            results[name].append(measure(options.folder, name, seed, options.overrides))
            print(f"{name} seed {seed}: {results[name][-1]}", flush=True)
    words = shlex.join(sys.argv[1:])
    about = f"`md2 bench variants {words}`, {processor()}, {busy()}; {versions('torch')}"
    publish(f"{about}\n\n{table(results)}", options.append)


if __name__ == "__main__":
    main()
