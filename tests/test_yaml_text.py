"""YAML from outside has bounds on its length and on what it stands for; other text is read as PyYAML does."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import yaml

from md2.config import load_config
from prep.raw.camera import parse_camera
from prep.raw.files import RawData
from shards.errors import InputError, UsageError
from shards.yaml_text import MAX_BYTES, load_yaml, read_yaml_text


def tower(first: str, step: str) -> str:
    """Ten levels, each of which names the one below it nine times: 9^10 values."""
    levels = [f"a{n}: &a{n} {step % ', '.join([f'*a{n - 1}'] * 9)}" for n in range(1, 11)]
    return "\n".join([f"a0: &a0 {first}", *levels, ""])


BOMBS = {
    "lists": tower("[1]", "[%s]"),
    "merges": tower("{x: 1}", "{<<: [%s]}"),
    "matrix": tower("[1]", "[%s]").replace("a10:", "camera_matrix:"),
    "itself": "a: &a\n  b: *a\n<<: *a\n",
    "values": f"a: [{'1,' * 200_000}1]",
    "brackets": "[" * 5000,
    "sixties": f"a: 1{':1' * 100_000}",
    "hexadecimal": f"train: {{batch_size: 0x{'f' * 100_000}}}\nfx: 0x{'f' * 100_000}",
    "digits": f"train: {{batch_size: {'9' * 100_000}}}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_file_that_stands_for_much_is_one_line_at_once(name: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(BOMBS[name])
    began = time.monotonic()
    with pytest.raises(UsageError, match=r"c\.yaml") as config:
        load_config(tmp_path / "c.yaml")
    with pytest.raises(InputError, match=r"^camera\.yaml") as camera:
        parse_camera(BOMBS[name].encode(), "camera.yaml")
    assert time.monotonic() - began < 30
    for caught in (config, camera):
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 500


def test_anchors_and_merges_that_people_write_are_read() -> None:
    text = "base: &b {lr: 1e-4, sizes: [640, 192]}\nmine: {<<: *b, lr: 2e-4}\nagain: *b\n"
    assert load_yaml(text) == yaml.safe_load(text)
    assert load_yaml("") is None


def test_a_long_or_strange_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "long.yaml"
    path.touch()
    os.truncate(path, MAX_BYTES)
    assert len(read_yaml_text(path)) == MAX_BYTES
    os.truncate(path, 1 << 40)
    with pytest.raises(InputError, match="larger than"):
        read_yaml_text(path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        read_yaml_text(tmp_path / "pipe")


def test_a_folder_that_links_to_itself_is_not_entered_again(tmp_path: Path) -> None:
    (tmp_path / "raw" / "drive").mkdir(parents=True)
    (tmp_path / "raw" / "drive" / "up").symlink_to("..")
    (tmp_path / "raw" / "self").symlink_to(".")
    (tmp_path / "raw" / "other").symlink_to("drive")
    raw = RawData([str(tmp_path / "raw")])
    assert raw.folders() == ["drive", "other"]
    assert raw.folders("drive") == raw.folders("other") == []
