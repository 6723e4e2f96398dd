"""Every page of the documentation, from top to bottom: its commands and snippets run, on a synthetic drive."""

from __future__ import annotations

import re
import shutil
import zipfile
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hub_server import hub_server
from page_runner import ROOT, Chunk, Runner, chunks, inside
from PIL import Image
from pipeline_data import decode
from prep_data import DATE, DRIVE, VAL_DRIVE, files_of, odometry_raw, read_part
from storage_servers import rclone_server, use_endpoint

import md2
from cli.console import run
from cli.main import app
from md2.inference.film import VideoWriter
from md2.networks.timm_encoder import _timm

NEEDS: dict[str, set[str]] = {
    "README.md": {"kitti_data", "street.jpg"},
    "docs/evaluation.md": {
        "kitti_data", "kitti_shards", "kitti_odometry", "RUN", "runs", "disparities.npy", "pngs", "gt_depths.npz",
        "ground_truth_pngs", "depth_selection", "09.txt", "frames", "poses.txt",
    },
    "docs/faq.md": {"drives", "shards", "runs"},
    "docs/pipeline.md": {"kitti_shards"},
    "docs/prediction.md": {"RUN", "runs", "street.png", "a.png", "folder", "drive", "drive.mp4", "kitti_shards"},
    "docs/prep.md": {"kitti_data", "data", "drives"},
    "docs/shards.md": {"kitti_data", "kitti_shards", "b", "data"},
    "docs/training.md": {"kitti_data", "kitti_shards"},
}  # fmt: skip
"""What a page supposes in the folder where its commands run. docs/camera.md has tests/cli/test_camera_page.py."""
MAKES = {
    "README.md": """
        kitti_shards/eigen_zhou/dataset.json kitti_shards/eigen/dataset.json runs/mono_stereo/checkpoints/last.pt
        runs/monodepth2_resnet18_kitti_mono_640x192/checkpoints/last.pt mono_640x192.zip mono_640x192/encoder.pth
        mono_640x192/depth.pth predictions/street.png
    """,
    "docs/evaluation.md": """
        upload/0000000000.png odometry/09_poses.txt odometry/09.tum odometry/09.png odometry/09.json RUN/report.html
        runs/mono-2/config.yaml compare.png compare.json
    """,
    "docs/faq.md": "runs/mine/config.yaml runs/drives/config.yaml",
    "docs/pipeline.md": "loader.pt",
    "docs/prediction.md": """
        predictions/a.png predictions/a_disparity.png predictions/a_depth.npy predictions/a_depth.png
        predictions/drive.mp4 predictions/c/d.png depth.html depth.onnx depth.pt2 official/encoder.pth
        official/depth.pth model/config.json model/README.md eigen.json street/config.json
    """,
    "docs/prep.md": """
        kitti_shards/eigen_zhou/dataset.json ../s3/team/kitti/eigen_zhou/dataset.json shards/drives/dataset.json
        runs/mono/config.yaml
    """,
    "docs/shards.md": """
        runs/mono/config.yaml ../s3/elsewhere/eigen_zhou/dataset.json val/val/000000.tar runs/hub/config.yaml
        data/eigen_zhou/dataset.json eigen_zhou.png
    """,
    "docs/training.md": """
        runs/first/config.yaml runs/first/environment.json runs/first/metrics.jsonl runs/first/checkpoints/last.pt
        runs/first/checkpoints/previous.pt runs/first/checkpoints/best.pt runs/first/tensorboard runs/first/panels
        runs/four/config.yaml kitti_shards/eigen_zhou_832x256/dataset.json runs/convnext/config.yaml
        runs/monodepth2_resnet18_kitti_mono_crop_640x192/config.yaml runs/hrnet/config.yaml runs/mono/config.yaml
        runs/monodepth2_resnet18_kitti_mono_velocity_640x192/config.yaml runs/metres/config.yaml
    """,
}
"""Some of what is there afterwards, and in the folder itself nothing else."""
TEXT = {
    "raw KITTI ──►": "a drawing",
    "against exact depth": "an output",
    "prep/     raw KITTI": "a drawing",
    "config.yaml  ": "names of files",
    "drives/camera.yaml": "names of files",
    "width: 1280": "a camera.yaml",
}
"""Blocks that hold no commands, by how they begin."""
NOT_RUN = {
    "pip install": "fetches packages; tests/test_packaging.py installs md2",
    "make ": "tests/test_docs.py knows the targets; `make demo` takes minutes",
    "md2 predict RUN 0 ": "needs a camera",
}
"""Commands that are not run, by how they begin."""
REPLACED = [
    ("gs://", "s3://"),  # the same code behind fsspec; there is no server of GCS to be had
    ("/data/", "data/"),  # folders of the user's machine
    ("https://storage.googleapis.com/", "https://"),
    ("--array=1-32", "--array=1-3"),
    ("$SLURM_ARRAY_TASK_ID/32", "$SLURM_ARRAY_TASK_ID/3"),
    ("timm/convnext_tiny", "timm/test_convnext"),
    ("timm/hrnet_w18", "timm/test_resnet"),
]
"""What stands for words of the pages."""
SHORT = {
    "model.weights": "scratch",
    "data.width": "96",
    "data.height": "64",
    "data.threads": "1",
    "data.prefetch": "1",
    "train.device": "cpu",
    "train.val_batches": "1",
}
"""What trainings are given that do not set it themselves."""
STEPS = ["train.batch_size=1", "train.max_steps=1"]
MODELS = ("eval", "predict", "odometry", "report")


@pytest.fixture(scope="module")
def world(drive: Path, tmp_path_factory: pytest.TempPathFactory, narrow: None) -> Iterator[Path]:
    """Everything that any page supposes, made once; trainings are of one step."""
    top = tmp_path_factory.mktemp("world")
    lists = {
        "eigen_zhou/train": [f"{DATE}/{DRIVE} {frame} {side}" for frame in range(1, 7) for side in "lr"],
        "eigen_zhou/val": [f"{DATE}/{VAL_DRIVE} {frame} l" for frame in (1, 2)],
        "eigen/test": [f"{DATE}/{VAL_DRIVE} {frame} l" for frame in (4, 5, 6)],
        "odom/test_09": [f"9 {frame} l" for frame in range(1, 7)],
    }
    for name, lines in lists.items():
        path = top / "splits" / f"{name}_files.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines))
    (top / "kitti_data").symlink_to(drive)
    (top / "data").mkdir()
    (top / "data/kitti").symlink_to(drive)
    odometry_raw(drive, top / "kitti_odometry")
    pictures(top, drive)
    own_drives(top, drive)
    with pytest.MonkeyPatch.context() as patch, inside(top):
        patch.setenv("MD2_CACHE", str(top / "cache"))
        for line in (
            "prep --split eigen_zhou",
            "prep --split eigen",
            "prep --split odom --raw kitti_odometry --part test_09",
            "prep --split eigen_zhou --limit 4 --out b",
            "prep --split eigen_zhou --motion --out motion/eigen_zhou",
            "prep --dataset folder --raw drives --out shards/drives --size 512x288",
            "train mono_stereo --run RUN",
            "train mono --run runs/mono",
            "train mono data.url=motion/eigen_zhou loss.velocity=0.05 --run runs/velocity-0",
            "export RUN --to monodepth2 --out official",
        ):
            assert run(app, line.split() + added(line.split(), top / "splits")) == 0, line
    shutil.copytree(top / "RUN", top / "runs/mono_stereo")
    with zipfile.ZipFile(top / "mono_640x192.zip", "w") as archive:
        for path in (top / "official").iterdir():
            archive.write(path, path.name)
    predictions(top)
    yield top


def pictures(top: Path, drive: Path) -> None:
    """Images in the places that the pages name, a video, and frames with their poses."""
    found = sorted((drive / DATE / VAL_DRIVE / "image_02/data").glob("*.png"))
    shutil.copytree(found[0].parent, top / "frames")
    shutil.copy(drive / DATE / VAL_DRIVE / "true_pose_02.txt", top / "poses.txt")
    shutil.copy(top / "poses.txt", top / "09.txt")
    benchmark = "depth_selection/test_depth_prediction_anonymous/image/0000000000.png"
    places = (
        "street.jpg",
        "street.png",
        "a.png",
        "folder/b.png",
        "drive/0.png",
        "drive/1.png",
        "drive/c/d.jpg",
        benchmark,
    )
    for place in places:
        (top / place).parent.mkdir(parents=True, exist_ok=True)
        Image.open(found[0]).save(top / place)
    with VideoWriter(top / "drive.mp4", Fraction(10)) as video:
        for path in found[:2]:
            video.write(np.asarray(Image.open(path)))


def own_drives(top: Path, drive: Path) -> None:
    """What docs/prep.md draws, with its camera.yaml."""
    (camera,) = [chunk.text for chunk in chunks(ROOT / "docs/prep.md") if chunk.text.startswith("width: 1280")]
    monday = top / "drives/monday"
    for name in ("left", "right", "depth"):
        (monday / name).mkdir(parents=True)
    (top / "drives/camera.yaml").write_text(camera)
    for frame in range(1, 7):
        for name, camera in (("left", "image_02"), ("right", "image_03")):
            with Image.open(drive / DATE / DRIVE / camera / f"data/{frame:010d}.png") as picture:
                picture.resize((1280, 720)).save(monday / name / f"{frame:06d}.jpg")
        Image.fromarray(np.full((720, 1280), 2560, np.uint16)).save(monday / f"depth/{frame:06d}.png")


def predictions(top: Path) -> None:
    """Those of another project for the test images, and their ground truth as the official code exports it."""
    samples = sorted(read_part(top / "kitti_shards/eigen", "test"), key=lambda sample: sample["__key__"])
    np.save(top / "disparities.npy", np.random.default_rng(0).uniform(0.05, 0.5, (len(samples), 64, 192)))
    truth = np.empty(len(samples), object)
    for folder in ("pngs", "ground_truth_pngs"):
        (top / folder).mkdir()
    for n, sample in enumerate(samples):
        (top / "pngs" / f"{sample['__key__']}.png").write_bytes(sample["depth.png"])
        (top / "ground_truth_pngs" / f"{n:010d}.png").write_bytes(sample["depth.png"])
        truth[n] = (decode(sample["depth.png"]) / 256).astype(np.float32)
    np.savez(top / "gt_depths.npz", data=truth)


def added(words: list[str], splits: Path) -> list[str]:
    """What the test adds to a command: small sizes, no workers, and where the named lists are."""
    lists = ["--splits", str(splits)] if "--split" in words and words[0] in ("prep", "eval") else []
    if words[0] == "train":
        given = {word.split("=")[0] for word in words}
        if "--resume" in words:
            return ["train.max_steps=2"]
        return [f"{key}={value}" for key, value in SHORT.items() if key not in given] + STEPS
    return lists + {"prep": ["--workers", "1"]}.get(words[0], ["--device", "cpu"] if words[0] in MODELS else [])


@pytest.fixture
def runner(
    request: pytest.FixtureRequest, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Runner]:
    """A folder that has what the page needs, with a bucket `team` and the Hub within reach."""
    folder = tmp_path / "page"
    folder.mkdir()
    for name in NEEDS[request.param]:
        source = world / ("motion" if (name, request.param) == ("kitti_shards", "docs/training.md") else name)
        if source.is_symlink() or source.is_file():
            shutil.copy(source, folder / name, follow_symlinks=False)
        else:
            shutil.copytree(source, folder / name, symlinks=True)
    internet = tmp_path / "internet"
    official = internet / "niantic-lon-static/research/monodepth2"
    official.mkdir(parents=True)
    shutil.copy(world / "mono_640x192.zip", official)
    bucket = tmp_path / "s3"
    for name in ("team", "elsewhere"):
        (bucket / name).mkdir(parents=True)
    if request.param == "docs/training.md":
        shutil.copytree(world / "kitti_shards/eigen_zhou", bucket / "team/kitti/eigen_zhou")
    monkeypatch.setattr("md2.training.trainer.run_figure", lambda run: None)
    monkeypatch.setattr("md2.training.summary.run_figure", lambda run: None)
    monkeypatch.setenv("MD2_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "1")
    monkeypatch.setattr("typer.confirm", lambda question, err: True)
    with rclone_server(bucket) as endpoint, hub_server() as hub, inside(folder):
        use_endpoint(monkeypatch, endpoint)
        hub.token = "hf_" + "Tests0Only" * 3
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield Runner(folder, hub, internet, REPLACED, lambda words: added(words, world / "splits"), monkeypatch)


def variants(chunk: Chunk) -> Iterator[str]:
    """The command lines that are run: without what stands in brackets, and with it."""
    for line in chunk.commands:
        for words in dict.fromkeys([re.sub(r" \[[^]]*\]", "", line), re.sub(r"[][]", "", line)]):
            if not words.startswith(tuple(NOT_RUN)):
                yield words


@pytest.mark.parametrize(("page", "runner"), [(page, page) for page in NEEDS], indirect=["runner"], ids=list(NEEDS))
def test_the_page_does_what_it_says(page: str, runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    for chunk in chunks(ROOT / page):
        if chunk.kind == "python":
            runner.python(chunk.text)
        elif chunk.kind == "script":
            for task in range(1, 4):
                monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
                runner.shell(chunk.text)
        elif chunk.kind == "shell":
            for line in variants(chunk):
                if line.rstrip().endswith("# the same"):
                    shutil.rmtree(runner.folder / "runs/four")
                runner.shell(line)
    made = MAKES[page].split()
    assert [path for path in made if not (runner.folder / path).exists()] == []
    names = {path.split("/")[0] for path in made} - {".."}
    assert {path.name for path in runner.folder.iterdir()} == NEEDS[page] | names
    if page == "docs/prep.md":
        alone, shared = (files_of(Path(place)) for place in ("kitti_shards/eigen_zhou", "../s3/team/kitti/eigen_zhou"))
        assert shared == alone, "of three tasks and of one process"
    if page == "docs/prediction.md":
        assert md2.load("hf://anna/street@main", device="cpu").metres_per_unit == 5.4


def test_the_lists_are_of_what_the_pages_hold() -> None:
    found = [chunk for page in NEEDS for chunk in chunks(ROOT / page)]
    commands = [line for chunk in found if chunk.kind == "shell" for line in chunk.commands]
    for start in NOT_RUN:
        assert any(line.startswith(start) for line in commands), start
    for words, _ in REPLACED:
        assert any(words in chunk.text for chunk in found if chunk.kind != "text"), words
    for words, _ in REPLACED:
        assert not words.startswith("timm/") or _timm().is_model(words.removeprefix("timm/"))
    texts = [chunk.text for chunk in found if chunk.kind == "text"]
    assert [text for text in texts if not text.startswith(tuple(TEXT))] == []
    assert [start for start in TEXT if not any(text.startswith(start) for text in texts)] == []
    pages = {str(page.relative_to(ROOT)) for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]}
    assert {page for page in pages if [*chunks(ROOT / page)]} == {*NEEDS, "docs/camera.md"}
