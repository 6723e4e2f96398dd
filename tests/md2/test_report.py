"""`md2 report`: one page that needs nothing else, says what the run said, and opens without a complaint."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from browser import browse
from evaluation_data import constant, pack_truth, tiny_checkpoint, tiny_config
from PIL import Image
from pipeline_data import smooth

from md2.checkpoint import load_checkpoint
from md2.evaluation.metrics import METRICS
from md2.evaluation.run import EvalOptions, measure
from md2.inference.predictor import load
from md2.report.build import write_report
from md2.training.curves import curves_of
from shards.errors import InputError
from shards.manifest import CARD

SCORES = (0.123, 0.9, 5.1, 0.2, 0.85, 0.95, 0.98)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of two epochs, as md2/runlog.py writes it."""
    folder = tmp_path_factory.mktemp("runs") / "night <b>drive</b>"
    data = pack_truth(tmp_path_factory.mktemp("data") / "eigen", [constant(4), constant(9), constant(30)])
    hostile = "# Street\n\n<script>console.error('card')</script> ![x](https://example.org/x.png) [y](javascript:z())\n"
    (data / CARD).write_text(hostile)
    tiny_checkpoint(folder / "checkpoints" / "best.pt", tiny_config(data={"url": str(data)}))
    config = load_checkpoint(folder / "checkpoints" / "best.pt").parsed_config()
    (folder / "config.yaml").write_text(config.to_yaml())
    (folder / "environment.json").write_text(json.dumps({"git": "abc", "command": ["md2", "train", "a b"]}))
    lines = [
        {"kind": "train", "step": s, "epoch": 0, "loss": 0.2 / s, "loss/0": 0.3 / s, "lr": 1e-4, "data_wait": 0.01}
        for s in range(1, 5)
    ]
    lines += [{"kind": "val", "step": 2, "epoch": 1, "loss": 0.15, **dict(zip(METRICS, SCORES, strict=True))}]
    lines += [{"kind": "val", "step": 4, "epoch": 2, "loss": None, **{name: 0.5 for name in METRICS}}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "tr')
    (folder / "panels").mkdir()
    for name in ("train-00000002", "val-00000004"):
        Image.fromarray(smooth(np.random.default_rng(0), 2000, 200)).save(folder / "panels" / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    assert write_report(run, run / "report.html", device="cpu") == []
    return (run / "report.html").read_text()


class Collector(HTMLParser):
    """Everything that a browser would fetch or follow, the table's rows, and the tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []
        self.rows: list[list[str]] = []
        self._cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        if tag == "tr":
            self.rows.append([])
        self._cell = tag in ("td", "th")
        if self._cell:
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self._cell:
            self.rows[-1][-1] += data.strip("\n")


def test_nothing_is_fetched_and_nothing_runs(page: str) -> None:
    found = Collector(page)
    assert found.links
    assert all(link.startswith(("data:", "#")) for link in found.links)
    assert "script" not in found.tags
    assert "b" not in found.tags, "the run's name is text"
    assert "console.error('card')" in page.replace("&#x27;", "'").replace("&quot;", '"'), "shown, not obeyed"
    assert "default-src 'none'" in page
    assert "url(" not in page


def test_every_picture_is_whole(page: str, run: Path) -> None:
    outside = re.sub('srcdoc="[^"]*"', "", page)
    jpegs = [base64.b64decode(data) for data in re.findall(r"data:image/jpeg;base64,([^\"]+)", outside)]
    assert len(jpegs) == 3, "two panels, and the worst images"
    sizes = []
    for data in jpegs:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            sizes.append(image.size)
    assert sizes[:2] == [(1600, 160)] * 2
    plots = [base64.b64decode(data) for data in re.findall(r"data:image/svg\+xml;base64,([^\"]+)", page)]
    titles = ["".join(ElementTree.fromstring(plot).itertext()) for plot in plots]
    assert len(titles) == 5
    for title in ("Loss", "Loss per scale", "Depth error", "Share of pixels within a factor", "Learning rate"):
        assert any(title in text for text in titles)


def test_the_viewer_has_the_measured_images_their_camera_and_depth_in_metres(page: str) -> None:
    """Each image's depth is scaled to its truth, which is 4, 9 and 30 m everywhere."""
    inside = html.unescape(re.search('srcdoc="([^"]*)"', page)[1])  # type: ignore[index]
    data = json.loads(re.search(r'id="data">(.*?)</script>', inside)[1])  # type: ignore[index]
    assert [sample["name"] for sample in data["samples"]] == ["drive_000", "drive_001", "drive_002"]
    for sample, truth in zip(data["samples"], (4, 9, 30), strict=True):
        steps = np.frombuffer(base64.b64decode(sample["depth"]), "<u2")
        depth = sample["first"] * np.exp(sample["step"] * steps)
        assert np.median(depth) == pytest.approx(truth, rel=0.1)
        assert sample["unit"] == "m"
        assert sample["camera"] == [50, 48, 47.5, 31.5]
        assert sample["size"] == [96, 64]


def test_the_table_holds_what_was_measured_what_was_logged_and_what_was_published(page: str, run: Path) -> None:
    rows = {row[0]: row[1:] for row in Collector(page).rows if len(row) == 8}
    config = load_checkpoint(run / "checkpoints" / "best.pt").parsed_config()
    measured = measure(EvalOptions("model", config.data.url), load(run, "cpu")).evaluation.metrics
    own = next(cells for name, cells in rows.items() if name.startswith("this run, eigen test: 3 images"))
    assert own == [f"{value:.3f}" for value in measured.values()]
    assert rows["this run, best validation (step 2)"] == [f"{value:.3f}" for value in SCORES]
    assert rows["published S 640x192"] == ["0.109", "0.873", "4.960", "0.209", "0.864", "0.948", "0.975"]


def test_changed_settings_stand_out(page: str) -> None:
    assert '<tr class="changed"><td>pose_network</td><td>posecnn</td></tr>' in page
    assert '<tr class="default"><td>learning_rate</td><td>0.0001</td></tr>' in page
    assert "md2 train &#39;a b&#39;" in page


def test_curves_are_the_logged_numbers() -> None:
    lines = [
        {"kind": "train", "step": 1, "epoch": 0, "loss": 3.0, "loss/0": 2.0},
        {"kind": "val", "step": 1, "epoch": 1, "loss": 2.5, "abs_rel": 0.4},
        {"kind": "train", "step": 2, "epoch": 1, "loss": None, "loss/0": 1.0, "camera/fx": 55.0},
    ]
    curves = {curve.title: dict(curve.series) for curve in curves_of(lines)}
    assert curves["Loss"] == {"training": [(1, 3.0)], "validation": [(1, 2.5)]}
    assert curves["Loss per scale"] == {"scale 0": [(1, 2.0), (2, 1.0)]}
    assert curves["Depth error"] == {"abs_rel": [(1, 0.4)]}
    assert curves["Learned camera [pixels]"] == {"fx": [(2, 55.0)]}
    assert "Learning rate" not in curves


def test_a_run_whose_dataset_is_gone_still_has_a_page(run: Path, tmp_path: Path) -> None:
    notes = write_report(run, tmp_path / "r.html", dataset=str(tmp_path / "gone"), device="cpu")
    assert len(notes) == 1
    assert "cannot be shown" in notes[0]
    text = (tmp_path / "r.html").read_text()
    assert "cannot be shown" in text
    assert "this run, best validation (step 2)" in text
    assert write_report(run, tmp_path / "r.html", evaluate=False) == []
    with pytest.raises(InputError, match="no run there"):
        write_report(tmp_path, tmp_path / "x.html")


# In a browser


SIZE = (1240, 4200)


def test_a_browser_opens_it_without_a_complaint(chromium: str, page: str, run: Path, tmp_path: Path) -> None:
    assert browse(chromium, run / "report.html", tmp_path, SIZE) == []
    with Image.open(tmp_path / "shot.png") as screenshot:
        pixels = np.asarray(screenshot.convert("RGB")).astype(int)
    assert pixels.shape == (4200, 1240, 3)
    assert (pixels[:10] == 255).all(), "margin"
    # Text over the whole height, and the colours of the pictures (a page of text alone is grey).
    dark = (pixels.sum(2) < 200).any(1)
    assert dark[:300].any()
    assert dark[1500:].any()
    saturated = (pixels.max(2) - pixels.min(2)) > 100
    assert saturated.sum() > 20_000
    assert (pixels == 32).all(2).sum() > 50_000, "the ground of the point cloud, which a script has drawn"


def test_the_browser_would_have_complained(chromium: str, page: str, tmp_path: Path) -> None:
    """The same page with something to fetch, and a script: both must reach the console."""
    broken = page.replace("</body>", '<img src="https://example.org/a.png"><script>alert(1)</script></body>')
    (tmp_path / "broken.html").write_text(broken)
    lines = browse(chromium, tmp_path / "broken.html", tmp_path, SIZE)
    assert any("example.org" in line and "Content Security Policy" in line for line in lines)
    assert any("inline script" in line for line in lines)
