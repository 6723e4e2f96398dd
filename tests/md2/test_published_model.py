"""`md2 export --to safetensors`: what comes back is the model, from a folder or the Hub; the card says what it is."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from evaluation_data import HEIGHT, WIDTH, constant, measured, pack_truth, tiny_checkpoint, tiny_config
from hub_server import hub_server
from PIL import Image
from pipeline_data import smooth
from prep_data import command
from safetensors import safe_open

import md2
from md2.checkpoint import load_checkpoint, save_checkpoint
from md2.evaluation.metrics import METRICS
from md2.inference.export import export_monodepth2
from md2.report.model_card import export_safetensors
from shards.errors import DatasetError, InputError

TOKEN = "hf_" + "Tests0Only" * 3
FACTS = {"url": "/home/anna/shards", "split": "street", "manifest_sha256": "5" * 64, "images": "JPEG, even tables"}
LICENCE = "Made by Anna. CC BY 4.0.\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of a mono model with its pose network, validated, whose training data has a licence."""
    top = tmp_path_factory.mktemp("runs")
    keys = [f"drive_l_{number:010d}" for number in range(3)]
    data = pack_truth(top / "data", [constant(4)] * 3, part="train", split="street", keys=keys)
    text = (data / "README.md").read_text()
    (data / "README.md").write_text(text.partition("## Licence\n\n")[0] + "## Licence\n\n" + LICENCE)
    best = tiny_checkpoint(top / "street" / "checkpoints" / "best.pt", tiny_config(data={"url": str(data)}))
    found = load_checkpoint(best)
    found.networks["depth"]["decoder.10.conv.weight"] *= 20
    found.metrics.update(dict.fromkeys(METRICS, 0.25), abs_rel=0.123)
    save_checkpoint(type(found)(found.config, found.networks, None, 4200, 7, {}, found.metrics), best)
    (top / "street" / "environment.json").write_text(json.dumps({"dataset": FACTS}))
    return top / "street"


@pytest.fixture(scope="module")
def evaluation(run: Path) -> Path:
    """A result of `md2 eval --json` on images of which training has used some."""
    keys = ["drive_l_0000000001", "drive_l_0000000009", "other_l_0000000001"]
    truth = pack_truth(run.parent / "truth", [constant(4), constant(9), constant(30)], keys=keys)
    report = measured(truth, model=str(run), json_file=run.parent / "eigen.json")
    assert report.overlap is not None and report.overlap.targets == 1
    return run.parent / "eigen.json"


@pytest.fixture(scope="module")
def model(run: Path, evaluation: Path) -> Path:
    done = command(
        "export", run, "--to", "safetensors", "--out", run.parent / "model", "--evaluation", evaluation, cwd=run
    )
    assert (done.returncode, "hf upload USER/NAME" in done.stdout) == (0, True), done.stderr
    return run.parent / "model"


def test_what_comes_back_is_the_model(run: Path, model: Path, tmp_path: Path) -> None:
    assert sorted(path.name for path in model.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    image = Image.fromarray(smooth(np.random.default_rng(0), 200, 90))
    first, again = md2.load(run, "cpu"), md2.load(model, "cpu")
    depth = first.predict(image).depth
    assert depth.max() / depth.min() > 1.2, "a depth that does not vary would prove nothing"
    np.testing.assert_array_equal(again.predict(image).depth, depth)
    assert (again.unit, again.width, again.height) == (first.unit, WIDTH, HEIGHT)
    for name, state in first.networks.state_dicts().items():
        for key, value in again.networks.state_dicts()[name].items():
            assert torch.equal(value, state[key])
    changed = {"data": again.config.data.model_copy(update={"url": first.config.data.url})}
    assert again.config.model_copy(update=changed) == first.config
    copy = export_safetensors(model, tmp_path / "copy")
    assert (copy / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    assert "5" * 64 in (copy / "README.md").read_text()


def test_the_file_is_one_that_others_open(run: Path, model: Path) -> None:
    states = load_checkpoint(run / "checkpoints" / "best.pt").networks
    with safe_open(model / "model.safetensors", "pt") as file:
        assert set(file.keys()) == {f"{name}.{key}" for name, state in states.items() for key in state}
        torch.testing.assert_close(
            file.get_tensor("depth.decoder.10.conv.weight"), states["depth"]["decoder.10.conv.weight"]
        )


def test_the_card(model: Path) -> None:
    text = (model / "README.md").read_text()
    match = re.match(r"---\n(.*?\n)---\n", text, re.DOTALL)
    assert match is not None
    head = yaml.safe_load(match[1])
    assert (head["library_name"], head["pipeline_tag"], head["license"]) == ("md2", "depth-estimation", "cc-by-4.0")
    for words in (
        "4,200 steps, 7 epochs",
        f"Split street, images as JPEG, even tables. The sha256 of the dataset's manifest (dataset.json), which names "
        f"exactly these bytes: `{'5' * 64}`",
        "| validation during training | 0.123 | 0.250 |",
        "| eigen test: 3 images, median scaling | ",
        "- eigen test: training used 1 of the 3 images (1 as target frame), and drives of 2",
        LICENCE,
        "## Intended use",
        "right up to one factor",
    ):
        assert words in text, words
    for secret in ("/home/anna", str(model.parent)):
        assert secret not in text + (model / "config.json").read_text(), "no place of this machine"


def test_official_weights_become_a_model(run: Path, tmp_path: Path) -> None:
    export_monodepth2(run, tmp_path / "official")
    folder = export_safetensors(tmp_path / "official", tmp_path / "model")
    image = Image.fromarray(smooth(np.random.default_rng(0), 200, 90))
    expected = md2.load(tmp_path / "official", "cpu").predict(image).depth
    np.testing.assert_array_equal(md2.load(folder, "cpu").predict(image).depth, expected)
    text = (folder / "README.md").read_text()
    for words in ("license: unknown", "Not known", "Not measured"):
        assert words in text


def test_a_model_on_the_hub(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("MD2_CACHE", str(tmp_path / "cache"))
    image = Image.fromarray(smooth(np.random.default_rng(0), 200, 90))
    image.save(tmp_path / "street.png")
    expected = md2.load(model, "cpu").predict(image).depth
    with hub_server() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        hub.token, hub.repositories, hub.private = TOKEN, {"anna/street": model}, {"anna/street"}
        for _ in range(2):
            np.testing.assert_array_equal(md2.load("hf://anna/street@main", "cpu").predict(image).depth, expected)
        assert len(hub.elsewhere) == 1, "the weights come once"
        assert hub.elsewhere[0][1] == ""
        done = command("predict", "hf://anna/street", "street.png", "--save", "npy", "--out", "out", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        np.testing.assert_allclose(np.load(tmp_path / "out" / "street_depth.npy"), expected)

        broken = tmp_path / "broken"
        broken.mkdir()
        about = json.loads((model / "config.json").read_text())
        about["step"] += 1
        (broken / "config.json").write_text(json.dumps(about))
        data = (model / "model.safetensors").read_bytes()
        (broken / "model.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        hub.repositories["anna/broken"] = broken
        with pytest.raises(DatasetError, match=r"anna/broken/model\.safetensors.*not the bytes"):
            md2.load("hf://anna/broken", "cpu")
        hub.repositories["anna/none"] = tmp_path
        with pytest.raises(InputError, match=r"hf://anna/none: no model there \(no config.json\); md2 export RUN"):
            md2.load("hf://anna/none", "cpu")


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("config.json", b"", "not the config.json of a model that md2 has exported"),
        ("config.json", b'{"architectures": ["DPT"]}', "not the config.json of a model that md2 has exported"),
        ("config.json", None, r"config.json: cannot be read .*it belongs to model.safetensors"),
        ("model.safetensors", b"abc", "not the weights that config.json beside it describes"),
    ],
)
def test_what_is_damaged_is_named(model: Path, tmp_path: Path, name: str, data: bytes | None, says: str) -> None:
    for path in model.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / name).unlink()
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=says):
        md2.load(tmp_path, "cpu")


def test_what_is_refused(run: Path, model: Path, evaluation: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="exists and is not empty"):
        export_safetensors(run, model)
    with pytest.raises(InputError, match=r"config.json: not a result of md2 eval --json"):
        export_safetensors(run, tmp_path / "new", [model / "config.json"])
    assert not list(tmp_path.iterdir())
    for words, says in (
        (["--to", "onnx", "--evaluation", evaluation], "leave it out"),
        (["--to", "safetensors", "--dynamic-batch"], "no meaning for weights"),
    ):
        done = command("export", run, *words, cwd=tmp_path)
        assert (done.returncode, says in done.stderr) == (2, True), done.stderr
