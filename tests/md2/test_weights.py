"""ImageNet and official Monodepth2 weights: in, out, and what is said of files that do not fit."""

from __future__ import annotations

import hashlib
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from md2 import weights
from md2.checkpoint import Checkpoint, save_checkpoint
from md2.config import Config, DataConfig, LossConfig, ModelConfig
from md2.inference.predictor import load
from md2.model import Networks
from md2.networks.resnet import ResNet
from shards.errors import InputError


def build(
    seed: int = 0, frames: tuple[int, ...] = (0, -1, 1), stereo: bool = False, mask: bool = False, **model: Any
) -> Networks:
    torch.manual_seed(seed)
    loss = LossConfig(predictive_mask=mask, disable_automasking=mask)
    return Networks(ModelConfig(**model), DataConfig(frames=list(frames), stereo=stereo), loss).eval()


def same(a: Networks, b: Networks) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return list(one) == list(other) and all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture
def imagenet_file(tmp_path: Path) -> Path:
    """A ResNet-18 state dict as torchvision publishes it: bare names, the hash in the file's name."""
    torch.manual_seed(5)
    state = {k: v for k, v in ResNet("resnet18", 1).state_dict().items() if "num_batches" not in k}
    plain = tmp_path / "plain.pth"
    torch.save(state, plain)
    digest = hashlib.sha256(plain.read_bytes()).hexdigest()
    folder = tmp_path / "www"
    folder.mkdir()
    return plain.rename(folder / f"resnet18-{digest[:8]}.pth")


@pytest.fixture
def server(imagenet_file: Path) -> Iterator[str]:
    """Serves the file's folder on loopback; the URL's end is the file's name."""
    handler = partial(_Quiet, directory=str(imagenet_file.parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """No lines on stderr."""


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "checkpoints"


def test_imagenet_download_fills_both_encoders(
    server: str, imagenet_file: Path, hub: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(weights.IMAGENET_URLS, "resnet18", f"{server}/{imagenet_file.name}")
    networks, untouched = build(), build()
    weights.initialise(networks, "imagenet")
    state = torch.load(imagenet_file, weights_only=True)
    assert torch.equal(networks.encoder.state_dict()["encoder.layer4.1.bn2.bias"], state["layer4.1.bn2.bias"])
    assert torch.equal(networks.encoder.state_dict()["encoder.conv1.weight"], state["conv1.weight"])
    pose = networks.pose_encoder.state_dict()
    assert torch.equal(pose["encoder.layer3.0.conv1.weight"], state["layer3.0.conv1.weight"])
    half = state["conv1.weight"] / 2
    assert torch.equal(pose["encoder.conv1.weight"], torch.cat([half, half], dim=1))
    assert all(map(torch.equal, networks.depth.parameters(), untouched.depth.parameters()))
    assert [path.name for path in hub.iterdir()] == [imagenet_file.name]
    assert capsys.readouterr().out == ""
    # From the cache, without the server's file.
    imagenet_file.unlink()
    again = build()
    weights.initialise(again, "imagenet")
    assert same(again, networks)


def test_two_equal_images_give_the_features_of_one(imagenet_file: Path) -> None:
    networks = build()
    weights.initialise(networks, str(imagenet_file))
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        one, two = networks.encoder(image), networks.pose_encoder(torch.cat([image, image], dim=1))
    torch.testing.assert_close(one[-1], two[-1], rtol=1e-3, atol=1e-4)


def test_three_images_and_shared_encoder(imagenet_file: Path) -> None:
    three = build(pose_input="all")
    weights.initialise(three, str(imagenet_file))
    first = torch.load(imagenet_file, weights_only=True)["conv1.weight"]
    torch.testing.assert_close(three.pose_encoder.encoder.conv1.weight, torch.cat([first / 3] * 3, dim=1))
    shared = build(pose_network="shared")
    weights.initialise(shared, str(imagenet_file))
    assert torch.equal(shared.encoder.encoder.conv1.weight, first)


def test_wrong_hash_is_refused_and_nothing_cached(
    server: str, imagenet_file: Path, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = imagenet_file.rename(imagenet_file.with_name("resnet18-00000000.pth"))
    monkeypatch.setitem(weights.IMAGENET_URLS, "resnet18", f"{server}/{wrong.name}")
    with pytest.raises(InputError, match=r"it is another file; .*give its path as model\.weights"):
        weights.initialise(build(), "imagenet")
    assert list(hub.iterdir()) == []


def test_missing_file_on_the_server_is_one_line(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(weights.IMAGENET_URLS, "resnet18", f"{server}/resnet18-ffffffff.pth")
    with pytest.raises(InputError, match=r"resnet18-ffffffff\.pth: nothing there; download") as caught:
        weights.initialise(build(), "imagenet")
    assert "\n" not in str(caught.value)


def test_published_urls_name_their_hashes() -> None:
    for name, url in weights.IMAGENET_URLS.items():
        assert torch.hub.HASH_REGEX.search(url) is not None, name


def test_scratch_changes_nothing() -> None:
    networks = build()
    weights.initialise(networks, "scratch")
    assert same(networks, build())


def test_encoder_of_another_depth_is_refused_by_name(imagenet_file: Path) -> None:
    with pytest.raises(InputError, match=r"weights of a resnet18, but model\.encoder is resnet34$"):
        weights.initialise(build(encoder="resnet34"), str(imagenet_file))


def official(networks: Networks, folder: Path, stereo: bool = False, old: bool = False) -> Path:
    """Write a folder the way the official code does: one `torch.save` per network; `old`: as torch 0.4 did."""
    folder.mkdir(parents=True)
    for name, state in networks.state_dicts().items():
        contents: dict[str, Any] = dict(state)
        if name == "encoder":
            contents |= {"height": 192, "width": 640, "use_stereo": stereo}
        torch.save(contents, folder / f"{name}.pth", _use_new_zipfile_serialization=not old)
    return folder


@pytest.mark.parametrize(
    ("model", "data"),
    [
        ({}, {}),
        ({}, {"stereo": True}),
        ({}, {"frames": [0], "stereo": True}),
        ({"encoder": "resnet50", "scales": [0, 1]}, {"frames": [0], "stereo": True}),
        ({"encoder": "resnet34"}, {"frames": [0], "stereo": True}),
        ({"pose_network": "shared"}, {}),
        ({"pose_network": "posecnn"}, {}),
        ({"pose_network": "posecnn", "pose_input": "all"}, {}),
        ({"pose_network": "shared", "pose_input": "all"}, {}),
        ({"pose_input": "all"}, {"stereo": True}),
    ],
)
def test_official_folder_loads_as_what_it_is(model: dict[str, Any], data: dict[str, Any], tmp_path: Path) -> None:
    original = build(seed=4, frames=tuple(data.get("frames", (0, -1, 1))), stereo=data.get("stereo", False), **model)
    folder = official(original, tmp_path / "weights", stereo=data.get("stereo", False))
    networks, config = weights.load_monodepth2(folder)
    assert config.model == ModelConfig(**model, weights="scratch")
    assert config.data == DataConfig(**data, width=640, height=192)
    assert same(networks, original)
    assert config.metres_per_unit == (5.4 if data.get("stereo") else None)


def test_official_files_are_of_torch_0_4_and_lie_beside_an_optimisers(tmp_path: Path) -> None:
    original = build(seed=4)
    folder = official(original, tmp_path / "weights", old=True)
    torch.save({"state": {}, "param_groups": []}, folder / "adam.pth")
    assert (folder / "encoder.pth").read_bytes()[:2] != b"PK"
    assert same(weights.load_monodepth2(folder)[0], original)


def test_official_predictive_mask(tmp_path: Path) -> None:
    original = build(seed=4, frames=(0,), stereo=True, mask=True)
    networks, config = weights.load_monodepth2(official(original, tmp_path / "weights", stereo=True))
    assert config.loss.predictive_mask and same(networks, original)


def test_written_folder_is_the_official_form_and_loads_back(tmp_path: Path) -> None:
    networks = build(seed=6)
    folder = tmp_path / "deep" / "export"
    weights.save_monodepth2(networks.state_dicts(), folder, height=320, width=1024, stereo=True)
    assert sorted(path.name for path in folder.iterdir()) == [
        "depth.pth",
        "encoder.pth",
        "pose.pth",
        "pose_encoder.pth",
    ]
    assert [path.name for path in folder.parent.iterdir()] == ["export"]
    encoder = torch.load(folder / "encoder.pth", weights_only=True)
    assert (encoder.pop("height"), encoder.pop("width"), encoder.pop("use_stereo")) == (320, 1024, True)
    assert list(encoder) == list(networks.encoder.state_dict())
    loaded, config = weights.load_monodepth2(folder)
    assert same(loaded, networks)
    assert (config.data.width, config.data.height, config.data.stereo) == (1024, 320, True)


def test_written_folder_takes_no_others_place(tmp_path: Path) -> None:
    networks = build(frames=(0,), stereo=True)
    folder = official(networks, tmp_path / "weights", stereo=True)
    with pytest.raises(InputError, match="not empty"):
        weights.save_monodepth2(networks.state_dicts(), folder, height=192, width=640, stereo=True)
    (tmp_path / "empty").mkdir()
    weights.save_monodepth2(networks.state_dicts(), tmp_path / "empty", height=192, width=640, stereo=True)
    assert weights.is_monodepth2(tmp_path / "empty")


def test_fine_tuning_takes_what_both_have(tmp_path: Path) -> None:
    stereo_only = build(seed=4, frames=(0,), stereo=True)
    folder = official(stereo_only, tmp_path / "weights", stereo=True)
    networks, fresh = build(stereo=True), build(stereo=True)
    assert weights.initialise(networks, str(folder)) == ["pose_encoder", "pose"]
    assert all(map(torch.equal, networks.depth.parameters(), stereo_only.depth.parameters()))
    assert all(map(torch.equal, networks.pose.parameters(), fresh.pose.parameters()))


def test_a_pose_network_without_its_encoder_is_not_started_from(tmp_path: Path) -> None:
    folder = official(build(seed=4), tmp_path / "weights")
    assert weights.initialise(build(), str(folder)) == []
    (folder / "pose_encoder.pth").unlink()
    with pytest.raises(InputError, match="pose_encoder is missing, which pose needs"):
        weights.initialise(build(), str(folder))


def test_starting_from_a_checkpoint_and_from_a_run(tmp_path: Path) -> None:
    original = build(seed=8)
    checkpoint = Checkpoint(Config().model_dump(mode="json"), original.state_dicts(), None)
    save_checkpoint(checkpoint, tmp_path / "run" / "checkpoints" / "last.pt")
    for source in (tmp_path / "run", tmp_path / "run" / "checkpoints" / "last.pt"):
        networks = build()
        weights.initialise(networks, str(source))
        assert same(networks, original)


CHANGES: dict[str, tuple[str, dict[str, Any]]] = {
    "no number": ("encoder.pth", {"height": "tall"}),
    "block": ("encoder.pth", {"encoder.layer4.x.weight": torch.zeros(1)}),
    "flat": ("depth.pth", {"decoder.10.conv.weight": torch.zeros(1)}),
}


def damage(folder: Path, case: str) -> None:
    depth, encoder = folder / "depth.pth", folder / "encoder.pth"
    if case == "key":
        state = torch.load(depth, weights_only=True)
        state["decoder.99.bias"] = state.pop("decoder.4.conv.conv.bias")
        torch.save(state, depth)
    elif case == "truncated":
        depth.write_bytes(depth.read_bytes()[:1000])
    elif case == "file":
        depth.unlink()
    elif case == "pose_encoder":
        (folder / "pose_encoder.pth").unlink()
    elif case == "size":
        state = torch.load(encoder, weights_only=True)
        del state["height"]
        torch.save(state, encoder)
    elif case in CHANGES:
        name, change = CHANGES[case]
        torch.save(torch.load(folder / name, weights_only=True) | change, folder / name)
    elif case in ("list", "pickle"):
        torch.save([1, 2] if case == "list" else {"decoder": Path("code")}, depth)
    elif case == "encoder":
        state = torch.load(encoder, weights_only=True)
        torch.save({k: v for k, v in state.items() if "layer4.1" not in k}, encoder)
    elif case == "foreign":
        torch.save({"downsample_layers.0.weight": torch.zeros(3), "height": 64, "width": 96}, encoder)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("key", r"depth: missing keys: decoder\.4\.conv\.conv\.bias; depth: extra keys: decoder\.99\.bias"),
        ("truncated", r"depth\.pth: damaged or not a file of weights"),
        ("file", r"depth\.pth missing"),
        ("pose_encoder", r"pose_encoder\.pth is missing"),
        ("size", r"height and width are missing"),
        ("no number", r"height and width are missing"),
        ("block", r"extra keys: encoder\.layer4\.x\.weight"),
        ("flat", r"no disparity outputs"),
        ("list", r"depth\.pth: holds a list"),
        ("pickle", r"depth\.pth: damaged or not a file of weights"),
        ("encoder", r"not a ResNet-18, 34, 50, 101 or 152"),
        ("foreign", r"not a ResNet-18.*first weights: downsample_layers\.0\.weight"),
    ],
)
def test_damaged_official_folder_is_explained(case: str, message: str, tmp_path: Path) -> None:
    # The pose networks only where they matter: they are half of what is written.
    whole = build() if case.startswith("pose") else build(frames=(0,), stereo=True)
    folder = official(whole, tmp_path / "weights", stereo=not case.startswith("pose"))
    damage(folder, case)
    with pytest.raises(InputError, match=message) as caught:
        weights.load_monodepth2(folder)
    assert "\n" not in str(caught.value)


def test_a_mono_model_without_its_pose_network_predicts_depth(tmp_path: Path) -> None:
    """encoder.pth and depth.pth are all that depth needs, with or without the pose encoder beside them."""
    original = build(seed=4)
    folder = official(original, tmp_path / "weights")
    (folder / "pose.pth").unlink()
    image = torch.rand(1, 3, 64, 96)
    for _ in range(2):
        networks, config = weights.load_monodepth2(folder)
        assert config.metres_per_unit is None and not networks.temporal
        networks.eval()
        with torch.no_grad():
            assert torch.equal(networks.disparities(image)[0], original.disparities(image)[0])
            assert not networks({0: image}).poses
        (folder / "pose_encoder.pth").unlink(missing_ok=True)


def test_prefixes_and_counts_of_other_tools_do_not_matter(tmp_path: Path) -> None:
    """DataParallel's `module.`, and what thop leaves in a model that it has measured."""
    original = build(seed=4, frames=(0,), stereo=True)
    folder = official(original, tmp_path / "weights", stereo=True)
    for name in ("encoder", "depth"):
        state = torch.load(folder / f"{name}.pth", weights_only=True)
        prefixed = {f"module.{k}" if isinstance(v, torch.Tensor) else k: v for k, v in state.items()}
        torch.save(
            prefixed | {"module.total_ops": torch.zeros(1), "total_params": torch.ones(1)}, folder / f"{name}.pth"
        )
    networks, _ = weights.load_monodepth2(folder)
    assert same(networks, original)


def test_files_that_are_something_else_are_named(tmp_path: Path) -> None:
    folder = official(build(frames=(0,), stereo=True), tmp_path / "outer" / "weights", stereo=True)
    with zipfile.ZipFile(tmp_path / "mono.zip", "w") as archive:
        archive.write(folder / "encoder.pth", "mono_640x192/encoder.pth")
    torch.save(build(frames=(0,), stereo=True), tmp_path / "whole.pth")
    (tmp_path / "pointer.pth").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    (tmp_path / "page.pth").write_bytes(b"\n<!DOCTYPE html><html></html>")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    for name, message in {
        "mono.zip": "a zip of Monodepth2 weights .unpack it",
        "whole.pth": "holds Python objects, whose code md2 does not run: save the model's state_dict",
        "pointer.pth": "a git-lfs pointer",
        "page.pth": "a web page",
        "picture.png": "a PNG picture",
        "outer": r"did you mean .*outer/weights\?",
        "nothing": "no such file or folder",
    }.items():
        with pytest.raises(InputError, match=message) as caught:
            load(tmp_path / name)
        assert "\n" not in str(caught.value) and "weights_only" not in str(caught.value)
    with pytest.raises(InputError, match="a recipe: train it first, md2 train mono"):
        load("mono")


def test_no_such_weights(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        weights.initialise(build(), str(tmp_path / "nothing"))
    for content in (b"", b"hello", b"root:x:0:0:root:/root\n", b"\x80\x02}q.", b"PK\x03\x04", bytes(range(256))):
        (tmp_path / "text.pth").write_bytes(content)
        with pytest.raises(InputError, match=r"text\.pth") as caught:
            weights.initialise(build(), str(tmp_path / "text.pth"))
        assert "\n" not in str(caught.value)
