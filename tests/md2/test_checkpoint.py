"""Checkpoint files: whole or refused, and the one before is still there."""

from __future__ import annotations

import json
import os
import struct
import zipfile
from pathlib import Path

import pytest
import torch

from md2 import checkpoint as checkpoint_module
from md2.checkpoint import (
    LAST,
    PREVIOUS,
    Checkpoint,
    has_checkpoint,
    load_checkpoint,
    load_latest,
    resolve,
    save_checkpoint,
)
from md2.config import Config
from md2.weights import read_monodepth2, save_monodepth2
from shards.errors import InputError


def checkpoint(step: int) -> Checkpoint:
    return Checkpoint(
        config=Config().model_dump(mode="json"),
        networks={"depth": {"weight": torch.arange(4096.0) + step}},
        metres_per_unit=5.4,
        step=step,
        epoch=1,
        training={"loaders": [b"\x00\xff state"], "best": float("inf")},
        metrics={"abs_rel": 0.115},
    )


def save_two(run: Path) -> Path:
    folder = run / "checkpoints"
    for step in (1, 2):
        save_checkpoint(checkpoint(step), folder / LAST, keep=folder / PREVIOUS)
    return folder


def test_everything_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    save_checkpoint(checkpoint(7), path)
    loaded = load_checkpoint(path)
    assert (loaded.step, loaded.epoch, loaded.metres_per_unit) == (7, 1, 5.4)
    assert loaded.training == {"loaders": [b"\x00\xff state"], "best": float("inf")}
    assert torch.equal(loaded.networks["depth"]["weight"], torch.arange(4096.0) + 7)
    assert loaded.parsed_config() == Config()
    assert [file.name for file in tmp_path.iterdir()] == ["a.pt"]


def test_the_old_one_is_kept_until_the_new_one_is_on_the_disk(tmp_path: Path, disk: list[str]) -> None:
    folder = save_two(tmp_path)
    first = ["sync last.pt.tmp", "last.pt.tmp -> last.pt", "sync checkpoints"]
    assert disk == [*first, first[0], "last.pt -> previous.pt", *first[1:]]
    assert [load_checkpoint(folder / name).step for name in (PREVIOUS, LAST)] == [1, 2]


def test_newest_first(tmp_path: Path) -> None:
    save_two(tmp_path)
    found, warning = load_latest(tmp_path)
    assert (found.step, warning) == (2, None)


def flip_one_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[data.index(torch.tensor(100.0).numpy().tobytes() + torch.tensor(101.0).numpy().tobytes())] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-500])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [flip_one_byte, truncate, empty, Path.unlink])
def test_a_damaged_last_one_falls_back_and_says_so(tmp_path: Path, damage: object) -> None:
    folder = save_two(tmp_path)
    damage(folder / LAST)  # type: ignore[operator]
    # Between two renames of a run that was killed there is the previous one alone: it must not begin anew.
    assert has_checkpoint(tmp_path)
    found, warning = load_latest(tmp_path)
    assert found.step == 1
    if damage is not Path.unlink:
        assert warning is not None
        assert LAST in warning
        assert PREVIOUS in warning


def test_both_damaged_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    folder = save_two(tmp_path)
    truncate(folder / LAST)
    truncate(folder / PREVIOUS)
    with pytest.raises(InputError, match=rf"{LAST}: damaged .*{PREVIOUS}: damaged .* start a new run") as caught:
        load_latest(tmp_path)
    assert "\n" not in str(caught.value)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "ran",)  # type: ignore[return-value]

    torch.save({"format": 1, "networks": Bomb()}, tmp_path / "bad.pt")
    with pytest.raises(InputError, match=r"bad\.pt"):
        load_checkpoint(tmp_path / "bad.pt")
    assert not (tmp_path / "ran").exists()


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(InputError, match="not a checkpoint of md2"):
        load_checkpoint(tmp_path / "other.pt")


@pytest.mark.parametrize(
    "change",
    [
        {"author": "someone"},
        {"config": None},
        {"networks": {"depth": [1.0]}},
        {"networks": {"depth": {"weight": 1.0}}},
        {"metres_per_unit": "5.4"},
        {"metres_per_unit": float("nan")},
        {"metres_per_unit": -1.0},
        {"step": "7"},
    ],
)
def test_fields_of_other_names_or_types_are_refused_in_one_line(tmp_path: Path, change: dict[str, object]) -> None:
    save_checkpoint(checkpoint(1), tmp_path / "a.pt")
    data = torch.load(tmp_path / "a.pt", weights_only=True)
    torch.save(data | change, tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"a\.pt: not a checkpoint's fields"):
        load_checkpoint(tmp_path / "a.pt")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    save_checkpoint(checkpoint(1), path)
    (tmp_path / "in-the-way").mkdir()
    with pytest.raises(InputError, match="cannot write"):
        save_checkpoint(checkpoint(2), path, keep=tmp_path / "in-the-way")
    assert {file.name for file in tmp_path.iterdir()} == {"a.pt", "in-the-way"}
    assert load_checkpoint(path).step == 1


def test_a_write_that_fails_leaves_nothing_half_written_and_says_why(tmp_path: Path, small_files: None) -> None:
    with pytest.raises(InputError, match=r"new/a\.pt: File too large; free some space"):
        save_checkpoint(checkpoint(1), tmp_path / "new" / "a.pt")
    assert list((tmp_path / "new").iterdir()) == []
    assert not has_checkpoint(tmp_path)
    weights = {"weight": torch.zeros(4096)}
    with pytest.raises(InputError, match=r"cannot write .*official: File too large; name another place"):
        save_monodepth2(
            {"encoder": weights, "depth": weights}, tmp_path / "official", height=64, width=96, stereo=False
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new"]


def test_the_best_is_gone_on_from_where_it_is_all_there_is(tmp_path: Path) -> None:
    """As after a disk that was full once the best was written and before the last was."""
    folder = tmp_path / "checkpoints"
    save_checkpoint(checkpoint(3), folder / "best.pt")
    assert has_checkpoint(tmp_path)
    found, warning = load_latest(tmp_path)
    assert (found.step, warning) == (3, None)
    (folder / LAST).write_bytes(b"half")
    found, warning = load_latest(tmp_path)
    assert found.step == 3 and warning is not None and "resuming from best.pt" in warning
    save_checkpoint(checkpoint(2), folder / PREVIOUS)
    assert load_latest(tmp_path)[0].step == 2


def test_a_run_resolves_to_its_best(tmp_path: Path) -> None:
    folder = save_two(tmp_path)
    assert resolve(tmp_path) == folder / LAST
    save_checkpoint(checkpoint(1), folder / "best.pt")
    assert resolve(tmp_path) == folder / "best.pt"
    assert resolve(folder / PREVIOUS) == folder / PREVIOUS
    assert resolve(folder) == folder / "best.pt"
    with pytest.raises(InputError, match="no such file or folder"):
        resolve(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="neither a checkpoint nor a folder with one"):
        resolve(tmp_path / "empty")


def write_archive(path: Path, members: dict[str, bytes], kind: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def test_what_stands_for_more_than_the_file_holds_is_refused(tmp_path: Path) -> None:
    """Archives that unpack, a million objects, tensors of one number that claim to have a billion."""
    path = tmp_path / "a.pt"
    save_checkpoint(checkpoint(1), path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    write_archive(path, members, zipfile.ZIP_DEFLATED)
    with pytest.raises(InputError, match="unpacks to more than it holds"):
        load_checkpoint(path)
    write_archive(path, members | {"archive/data.pkl": b"]" * (5 << 20)})
    with pytest.raises(InputError, match="unpacks to more than it holds"):
        load_checkpoint(path)
    write_archive(path, members | {f"{n:0255}": b"" for n in range(20_000)})
    with pytest.raises(InputError, match="a part of it claims"):
        load_checkpoint(path)
    for tensor in (torch.zeros(1).expand(10**9), torch.zeros(9, device="meta"), torch.eye(9).to_sparse()):
        torch.save({"format": 1, **vars(checkpoint(1)), "training": {"a": [tensor]}}, path)
        with pytest.raises(InputError, match="a tensor claims more than the file holds"):
            load_checkpoint(path)


def test_weights_in_torchs_old_format_are_read_up_to_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"height": 64, "width": 96, "use_stereo": False, "a": torch.arange(100_000.0)}
    for name in ("encoder", "depth"):
        torch.save(state, tmp_path / f"{name}.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(read_monodepth2(tmp_path).networks["encoder"]["a"], state["a"])
    monkeypatch.setattr(checkpoint_module, "_LONGEST_PICKLE", 300_000)
    start = (tmp_path / "depth.pth").read_bytes()[:50]
    for rest, message in (
        (b"]" * 301_000, "more objects than weights have"),
        (b"X\xff\xff\xff\x0f", "a part of it claims"),
    ):
        (tmp_path / "depth.pth").write_bytes(start[: start.index(b"\x80\x02", 9)] + b"\x80\x02" + rest)
        with pytest.raises(InputError, match=message):
            read_monodepth2(tmp_path)


def test_a_published_model_with_a_long_header_or_a_pipe_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 27) + b" " * 100)
    weights = {"bytes": path.stat().st_size, "sha256": checkpoint_module.sha256_file(path)}
    facts = {name: value for name, value in vars(checkpoint(1)).items() if name not in ("networks", "training")}
    (tmp_path / "config.json").write_text(json.dumps({"format": 1, "weights": weights, **facts}))
    with pytest.raises(InputError, match="a header of 134,217,728 bytes"):
        load_checkpoint(path)
    (tmp_path / "config.json").unlink()
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(InputError, match=r"config\.json: cannot be read \(not a regular file"):
        load_checkpoint(path)
