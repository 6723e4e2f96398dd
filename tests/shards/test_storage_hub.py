"""`hf://` addresses: what is read, where the token goes, and what a user sees at each refusal."""

from __future__ import annotations

import importlib.util
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hub_server import SIGNATURE, Hub, hub_server
from storage_data import all_samples
from storage_fixtures import Packed, RunShards, note_fault
from storage_servers import free_port

from shards.dataset import open_dataset
from shards.errors import DatasetError, Md2Error, StorageError, UsageError, conceal
from shards.publish import Store
from shards.storage import open_storage
from shards.transfer import copy_dataset

TOKEN = "hf_" + "Tests0Only" * 3
REPO = "datasets/anna/street.v1"
URL = f"hf://{REPO}"


@pytest.fixture
def hub(packed: Packed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """The packed dataset as a public repository; nobody is logged in."""
    for name in ("HF_TOKEN", "HF_TOKEN_PATH", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("MD2_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MD2_STORAGE_PATIENCE", "5")
    with hub_server() as server:
        server.repositories[REPO] = packed.folder
        server.token = TOKEN
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        yield server


def log_in(token: str = TOKEN) -> None:
    """As `hf auth login` leaves it."""
    path = Path(os.environ["HF_HOME"]) / "token"
    path.parent.mkdir(exist_ok=True)
    path.write_text(token + "\n")


@contextmanager
def seen_by_user(fault: str, *words: str, kind: type[Md2Error] = StorageError) -> Iterator[None]:
    """The block raises `kind` in one line with all `words`, without the token; a row for the table of faults."""
    began = time.monotonic()
    with pytest.raises(kind) as caught:
        yield
    assert type(caught.value) is kind
    message = str(caught.value)
    for word in (URL, *words):
        assert word in message
    assert "\n" not in message
    assert TOKEN not in message and SIGNATURE not in message
    note_fault(fault, message, began)


def test_a_private_dataset_is_read_and_the_token_stays_on_the_hub(hub: Hub, packed: Packed) -> None:
    hub.private = {REPO}
    log_in()
    dataset = open_dataset(URL)
    assert dataset.manifest == packed.manifest
    assert dataset.url == URL
    assert all_samples(dataset.tars("train")) == all_samples(
        [packed.folder / s.name for s in packed.manifest.part("train")]
    )
    assert {authorization for _, authorization in hub.seen} == {f"Bearer {TOKEN}"}
    assert len(hub.elsewhere) >= 3
    assert {authorization for _, authorization in hub.elsewhere} == {""}


def test_a_public_dataset_needs_no_token(hub: Hub, packed: Packed, tmp_path: Path) -> None:
    copied = copy_dataset(URL, str(tmp_path / "copy"))
    assert copied.manifest == packed.manifest
    assert (tmp_path / "copy/train/000001.tar").read_bytes() == (packed.folder / "train/000001.tar").read_bytes()
    assert {authorization for _, authorization in (*hub.seen, *hub.elsewhere)} == {""}


def test_the_environments_token_comes_first(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub.private = {REPO}
    log_in("hf_" + "another" * 4)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert open_storage(URL).read("README.md", 1 << 20) is not None
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "mine"))
    (tmp_path / "mine").write_text(TOKEN)
    assert open_storage(URL).read("README.md", 1 << 20) is not None


def test_a_cut_shard_is_taken_up_at_another_signed_address(hub: Hub, packed: Packed) -> None:
    hub.cut = 100_000
    data = b"".join(open_storage(URL).stream("train/000000.tar"))
    assert data == (packed.folder / "train/000000.tar").read_bytes()
    assert len([path for path, _ in hub.seen if path.endswith("000000.tar")]) == 2


@pytest.mark.parametrize(
    ("address", "path"),
    [
        (f"{URL}@v1.0/", "/datasets/anna/street.v1/resolve/v1.0/train/x.idx"),
        (f"{URL}@refs/pr/7/kitti/zhou", "/datasets/anna/street.v1/resolve/refs%2Fpr%2F7/kitti/zhou/train/x.idx"),
        (f"{URL}@a%2Fb", "/datasets/anna/street.v1/resolve/a%2Fb/train/x.idx"),
        (f"HF://{REPO}/sub", "/datasets/anna/street.v1/resolve/main/sub/train/x.idx"),
        ("hf://anna/model@2", "/anna/model/resolve/2/train/x.idx"),
    ],
)
def test_addresses(hub: Hub, address: str, path: str) -> None:
    storage = pickle.loads(pickle.dumps(open_storage(address)))
    with suppress(StorageError):  # no such repository or revision
        assert storage.read("train/x.idx", 10) is None
    assert hub.seen[0][0] == path


@pytest.mark.parametrize(
    "address",
    ["hf://", "hf://datasets/street", "hf://spaces/a/b", "hf://datasets/a/b/../../c/d", "hf://../b", "hf://datasets/a/b?x=1",
     "hf://datasets/a/b@", "hf://user:secret9@datasets/a/b", "hf://datasets/a/b@x@y", "hf://datasets/a/b/c d"],
)  # fmt: skip
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(UsageError, match="not an address on the Hub; the form is hf://datasets/USER/NAME") as caught:
        open_storage(address)
    assert "secret9" not in str(caught.value)


def test_what_a_user_sees_at_each_refusal(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub.private = {REPO}
    with seen_by_user("hf: private dataset, not logged in", "it is private: log in", "HF_TOKEN", "401"):
        open_dataset(URL)
    log_in()
    hub.private = set()
    with seen_by_user("hf: no such dataset", "no such repository", "may not read it (404)"):
        open_dataset(f"{URL}-none")
    with seen_by_user("hf: no such revision", "no revision 'v9'", "/tree/main"):
        open_dataset(f"{URL}@v9")
    with seen_by_user("hf: no dataset at the path", "no dataset there", kind=DatasetError):
        open_dataset(f"{URL}/none")
    hub.token = "another"
    with seen_by_user("hf: expired or revoked token", "does not accept the token of", "hf/token (401)", "expired"):
        open_dataset(URL)
    monkeypatch.setenv("HF_TOKEN", "hf_" + "wrong" * 4)
    with seen_by_user("hf: wrong token in HF_TOKEN", "does not accept the token of HF_TOKEN"):
        open_dataset(URL)
    monkeypatch.setenv("HF_TOKEN", "two lines\nof text")
    with pytest.raises(UsageError, match=r"^HF_TOKEN: not a token of the Hub; log in again"):
        open_dataset(URL)


def test_a_gated_dataset(hub: Hub) -> None:
    hub.gated = {REPO}
    with seen_by_user("hf: gated dataset, not logged in", f"accept its conditions at {hub.endpoint}/{REPO}"):
        open_dataset(URL)


def test_a_rate_limit(hub: Hub, packed: Packed, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.refusals = 2
    assert open_dataset(URL).manifest == packed.manifest, "asked again"
    hub.refusals = 10_000
    monkeypatch.setenv("MD2_STORAGE_PATIENCE", "1")
    with seen_by_user("hf: rate limit (patience 1 s)", "429: too many requests", "gave up after", "try again later"):
        open_dataset(URL)


def test_no_hub_there(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    with seen_by_user("hf: HF_ENDPOINT names no server", "cannot connect", "HF_ENDPOINT"):
        open_dataset(URL)
    for wrong in ("mirror:80", "ftp://mirror", "http://", "https://user:pw12345@mirror"):
        monkeypatch.setenv("HF_ENDPOINT", wrong)
        with pytest.raises(UsageError, match="HF_ENDPOINT is not a web address") as caught:
            open_storage(URL)
        assert "pw12345" not in str(caught.value)


def test_the_hub_is_neither_written_nor_listed(hub: Hub, md2: RunShards, packed: Packed) -> None:
    for command, reason in (["push", packed.url, f"{URL}/new"], "hf upload"), (["ls", f"{URL}/new"], "not listed"):
        code, _, errors = md2(*command)
        assert (code, errors.strip().count("\n")) == (2, 0), errors
        assert reason in errors
    with pytest.raises(UsageError, match=r"hf upload USER/NAME FOLDER --repo-type dataset"):
        Store(f"{URL}/new").begin({})
    assert md2("verify", URL)[0] == 0


def test_tokens_are_concealed_and_addresses_are_not() -> None:
    assert conceal(f"a {TOKEN}, b") == "a …, b"
    assert conceal(f"{URL}@v1.0/x: no") == f"{URL}@v1.0/x: no"
    assert conceal("hf://anna:hunter22@datasets/x") == "hf://…@datasets/x"


@pytest.mark.skipif(importlib.util.find_spec("huggingface_hub") is None, reason="huggingface_hub is not installed")
def test_the_hubs_own_client_reads_the_same_server(hub: Hub, packed: Packed, tmp_path: Path) -> None:
    """So that the server is the Hub as its makers know it. In a process of its own: settings are read at import."""
    hub.private = {REPO}
    script = (
        "from huggingface_hub import hf_hub_download\n"
        "for name in ('dataset.json', 'train/000000.tar'):\n"
        "    print(hf_hub_download('anna/street.v1', name, repo_type='dataset'))\n"
    )
    environment = {**os.environ, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.returncode == 0, done.stderr
    for line, name in zip(done.stdout.split(), ("dataset.json", "train/000000.tar"), strict=True):
        assert Path(line).read_bytes() == (packed.folder / name).read_bytes()
    files = {authorization for path, authorization in hub.seen if path.startswith(f"/{REPO}/")}
    assert files == {f"Bearer {TOKEN}"}
    assert {authorization for _, authorization in hub.elsewhere} == {""}
