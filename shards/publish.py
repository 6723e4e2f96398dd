"""Publishing a dataset: shards are uploaded one by one, `dataset.json` last, and nothing is ever overwritten.

    store = Store("s3://team/kitti/eigen_zhou")          # or a folder
    finished = store.begin(plan)                         # claims the prefix; returns an interrupted run's receipts
    if store.published: ...                              # the whole dataset is there already: nothing to do
    for name in shards_of(plan):
        if name not in finished:
            ... pack to local scratch ...
            store.put_shard(shard, tar, index, note={...})
    store.put_text("README.md", card(manifest, store.url))
    store.commit(manifest)                               # readers see the dataset from here on

During a publication, `.publish/claim.json` records what is being published and by whom, and
`.publish/train/000000.json` is the receipt of a shard that arrived whole. The commit removes both. So an interrupted
run, or a second writer with the same plan, sends only the missing shards; a writer with another plan is refused. If a
dataset with another plan is committed at the URL, `begin` chooses the first free of `…-v2`, `…-v3` … beside it, and
`store.url` is that.

A `Store` that has begun can be pickled: workers of a process pool or a cluster may call `has_shard` and
`put_shard` (any number at a time, different shards), the main process everything else.
"""

from __future__ import annotations

import hashlib
import json
import logging
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from shards.errors import DatasetError, StorageError
from shards.files import ProcessIdentity, sha256_file
from shards.manifest import MANIFEST, Manifest, Shard, count_values
from shards.parallel import run_threads
from shards.storage import Storage, open_storage
from shards.storage.retry import MissingError

Plan = Mapping[str, Any]
"""Everything that decides the bytes, as JSON values, under the manifest's field names if it has one."""

MAX_MANIFEST_BYTES = 16 << 20
"""Some 50,000 shards."""
_MAX_RECORD_BYTES, _MAX_RECORD_VALUES = 1 << 16, 1000
"""Of a claim or receipt."""
_MAX_RECEIPTS = 50_000
_PARALLEL = 8
_LOOKS, _PAUSE = 3, 0.5
_MAX_VERSIONS = 1000
FOLDER = ".publish"
"""Holds claim and receipts until the commit."""
SCRATCH = f"{FOLDER}/scratch"
"""Holds the shards that a copy into a folder is still fetching."""
_CLAIM = f"{FOLDER}/claim.json"
_log = logging.getLogger(__name__)


class Receipt(BaseModel):
    """A shard that arrived whole, with its packer's own notes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    shard: Shard
    note: dict[str, Any] = {}
    tags: tuple[str, str] = ("", "")
    """The storage's own tags of tar and index on arrival: another tag means that the object was replaced since."""


class Claim(BaseModel):
    """Who publishes what under a prefix, and since when."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    plan: dict[str, Any]
    plan_sha256: str
    host: str
    process: int
    since: str
    machine: str = ""
    """See `ProcessIdentity`; "" in claims of older versions."""
    started: int = 0

    @property
    def has_ended(self) -> bool:
        """Whether the process has certainly ended; False for a process of another machine or container."""
        return ProcessIdentity(self.machine, self.process, self.started).has_ended()

    @property
    def who(self) -> str:
        return f"{self.host} (process {self.process}) since {self.since}"


Record = TypeVar("Record", Receipt, Claim)


def plan_sha256(plan: Plan) -> str:
    """Return the hash of a plan; the order of its keys does not matter."""
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Committed:
    """A dataset's manifest as it lies in its storage."""

    manifest: Manifest
    data: bytes

    @property
    def sha256(self) -> str:
        """Of the bytes of `dataset.json`; names exactly this dataset."""
        return hashlib.sha256(self.data).hexdigest()


def read_manifest(storage: Storage) -> Committed | None:
    """Return the committed manifest; None if nothing is committed.

    Raises:
        DatasetError: the manifest is broken, or the storage fails.
    """
    data = storage.read(MANIFEST, MAX_MANIFEST_BYTES)
    return None if data is None else Committed(Manifest.from_json(data, f"{storage.url}/{MANIFEST}"), data)


def require_manifest(storage: Storage) -> Committed:
    """As `read_manifest`, but the dataset must exist.

    Raises:
        DatasetError: nothing is committed there.
    """
    found = read_manifest(storage)
    if found is None:
        raise DatasetError(f"{storage.url}: no dataset there (no {MANIFEST}); md2 prep packs one, or check the path")
    return found


def read_claim(storage: Storage) -> Claim | None:
    """Return the claim of an unfinished publication; None if there is none.

    Raises:
        StorageError: it is broken, or the storage fails.
    """
    return _read(storage, _CLAIM, Claim)


class Store:
    """One publication. See the module's docstring for the order of calls.

    Attributes:
        url: where the dataset goes; after `begin` perhaps a `…-v2` of `asked_url`.
        asked_url: the URL that was given.
        storage: the storage at `url`.
        published: the committed manifest if exactly this dataset is there already, else None.
        resumed: whether `begin` found an unfinished publication of the same plan.

    Raises:
        UsageError: an unknown kind of URL.
    """

    def __init__(self, url: str) -> None:
        self.asked_url = url.rstrip("/") or url
        self.storage: Storage = open_storage(self.asked_url)
        self.published: Manifest | None = None
        self.resumed = False
        self._plan_sha256 = ""
        self._copied: Committed | None = None

    @property
    def url(self) -> str:
        return self.storage.url

    def begin(self, plan: Plan, copied: Committed | None = None) -> dict[str, Receipt]:
        """Claim the prefix for `plan`; return the receipts of shards that arrived before, by shard name.

        Args:
            copied: the finished dataset to copy, its manifest byte for byte.

        Raises:
            StorageError: another plan is being published here, or was left unfinished; or the storage fails.
        """
        self._plan_sha256, self._copied = plan_sha256(plan), copied
        for version in range(1, _MAX_VERSIONS):
            self.storage = open_storage(self.asked_url if version == 1 else f"{self.asked_url}-v{version}")
            found = read_manifest(self.storage)
            if found is None:
                self._claim(plan)
                return self._receipts()
            if self._is_planned(found):
                self.published = found.manifest
                self._tidy()  # a run that was killed right after its commit left claim and receipts
                return self._receipts()
        raise StorageError(f"{self.asked_url}: {_MAX_VERSIONS} versions are published already; use another name")

    def _is_planned(self, committed: Committed) -> bool:
        """Return whether this publication would commit the same dataset."""
        if self._copied is not None:
            return committed.data == self._copied.data
        return committed.manifest.plan_sha256 == self._plan_sha256

    def _claim(self, plan: Plan) -> None:
        claim = Claim(
            plan=dict(plan),
            plan_sha256=self._plan_sha256,
            host=socket.gethostname(),
            since=datetime.now(UTC).isoformat(timespec="seconds"),
            **ProcessIdentity.own()._asdict(),
        )
        text = claim.model_dump_json(indent=1).encode()
        self.resumed = not self.storage.create(_CLAIM, text)
        if self.resumed and self._is_abandoned():
            self.storage.write(_CLAIM, text)
            self.resumed = False
        # Also after creating it: two writers may both have created it where the storage cannot exclude that.
        self._check_claim()

    def _receipts(self) -> dict[str, Receipt]:
        """Return the receipts of the shards that are there, by shard name."""
        if self.published is not None:
            return {shard.name: Receipt(shard=shard) for shard in self.published.shards}
        names = [name for name in self.storage.names(FOLDER) if _is_receipt(name)] if self.resumed else []
        if len(names) > _MAX_RECEIPTS:
            raise StorageError(f"{self.url}/{FOLDER}: more than {_MAX_RECEIPTS:,} receipts, refused")
        receipts = run_threads(lambda name: _read(self.storage, name, Receipt), names, _PARALLEL)
        arrived = run_threads(self._has_arrived, receipts, _PARALLEL)
        return {r.shard.name: r for r, there in zip(receipts, arrived, strict=True) if r is not None and there}

    def _is_abandoned(self) -> bool:
        """Return whether the claim's process is one of this machine that ended before it published anything.

        So a run that stopped at a broken file, or was interrupted because of a wrong option, does not block the next.
        """
        claim = read_claim(self.storage)
        if claim is None or claim.plan_sha256 == self._plan_sha256 or not claim.has_ended:
            return False
        return not any(name.endswith((".tar", ".idx")) or _is_receipt(name) for name in self.storage.names(""))

    def _check_claim(self) -> None:
        """Refuse another plan's claim; set `published` if another writer has committed this plan meanwhile."""
        for _ in range(_LOOKS):
            claim = read_claim(self.storage)
            if claim is not None:
                self._check_plan(claim)
                return
            found = read_manifest(self.storage)
            if found is not None and self._is_planned(found):
                self.published = found.manifest
                return
            time.sleep(_PAUSE)  # a server that replaces objects in two steps may briefly show none
        raise StorageError(f"{self.url}: the claim on this publication is gone: someone removed it")

    def _check_plan(self, claim: Claim) -> None:
        if claim.plan_sha256 == self._plan_sha256:
            return
        what = f"another dataset is being published there by {claim.who}, or was left unfinished"
        if claim.has_ended:
            what = (
                "holds part of another dataset (other raw data, split, options), left unfinished by a process of this "
                "machine"
            )
        raise StorageError(f"{self.url}: {what}; publish under another name, or remove it: md2 shards clean {self.url}")

    def has_shard(self, shard: Shard) -> bool:
        """Return whether exactly this shard arrived whole.

        Raises:
            StorageError: the storage fails.
        """
        receipt = self.arrived(shard.name)
        return receipt is not None and receipt.shard == shard

    def arrived(self, name: str) -> Receipt | None:
        """Return the receipt of a shard that arrived whole by now, from whichever writer.

        Raises:
            StorageError: the storage fails.
        """
        receipt = self._receipt(name)
        return receipt if self._has_arrived(receipt) else None

    def is_published(self) -> bool:
        """Return whether exactly this dataset is committed by now; another writer may have done it.

        Raises:
            DatasetError: the storage fails, or a broken manifest is there.
        """
        found = read_manifest(self.storage)
        if found is not None and self._is_planned(found):
            self.published = found.manifest
            self._tidy()
        return self.published is not None

    def put_shard(
        self, shard: Shard, tar: Path, index: Path, note: Mapping[str, Any] | None = None, *, move: bool = False
    ) -> bool:
        """Publish one shard's two files; return False if exactly this shard was there already.

        Args:
            shard: its entry in the manifest.
            tar, index: local files.
            note: a few JSON values that the receipt keeps for a resumed publication.
            move: the caller has just written and hashed the local files, and gives them up: they are not hashed again,
                and removed once they are published (a folder on the same disk links them, no copy).

        Raises:
            DatasetError: the local files differ from `shard`.
            StorageError: another shard has that name; or the storage fails.
        """
        _check_local(shard, tar, index, sizes_only=move)
        if self.published is None:
            self._check_claim()
        receipt = self._receipt(shard.name)
        if (receipt or self.published) and (receipt is None or receipt.shard != shard):
            raise StorageError(
                f"{self.url}/{shard.name}: published already with other bytes though the plan is the same (did the raw "
                "data or a codec change?); never overwritten: publish under another name"
            )
        new = receipt is None or not self._has_arrived(receipt)
        if new:
            new, tar_tag = self._put_file(shard.name, tar, shard.bytes, shard.sha256, move)
            sent, index_tag = self._put_file(shard.index_name, index, shard.index_bytes, shard.index_sha256, move)
            new = new or sent  # else another writer of the same was faster
            receipt = Receipt(shard=shard, note=dict(note or {}), tags=(tar_tag, index_tag))
            self.storage.write(_receipt_name(shard.name), receipt.model_dump_json(indent=1).encode())
        if move:
            tar.unlink(missing_ok=True)
            index.unlink(missing_ok=True)
        return new

    def _put_file(self, name: str, path: Path, size: int, sha256: str, move: bool) -> tuple[bool, str]:
        """Send a file; return whether that was necessary, and the storage's tag of the object."""
        sent = self.storage.create_file(name, path, move)
        # There without a receipt: from a run that was stopped before it, or from another writer.
        if not sent and not self._has_bytes(name, size, sha256):
            raise StorageError(f"{self.url}/{name}: exists with other bytes; never overwritten: use another URL")
        found = self.storage.stat(name)
        if found is None or found.size != size:
            raise StorageError(f"{self.url}/{name}: did not arrive whole; publish again")
        return sent, found.tag

    def _has_bytes(self, name: str, size: int, sha256: str) -> bool:
        """Return whether an object has the right bytes; another writer may need a moment to finish it."""
        for _ in range(_LOOKS):
            found = self.storage.stat(name)
            if found is not None and found.size == size:
                digest = hashlib.sha256()
                with suppress(MissingError):  # removed since it was looked for
                    for piece in self.storage.stream(name):
                        digest.update(piece)
                if digest.hexdigest() == sha256:
                    return True
            time.sleep(_PAUSE)
        return False

    def put_text(self, name: str, text: str) -> None:
        """Write a small file such as README.md beside the manifest, unless the dataset is committed already.

        A resumed run may replace it until the commit.

        Raises:
            StorageError: the storage fails.
        """
        if self.published is None:
            self.storage.write(name, text.encode())

    def commit(self, manifest: Manifest) -> Manifest:
        """Write `dataset.json`, which makes the dataset visible; return the manifest as written.

        Fills in the manifest's `plan_sha256`. The same dataset may be committed twice.

        Raises:
            DatasetError: a shard of the manifest did not arrive, or was replaced since.
            StorageError: another dataset was committed meanwhile; or the storage fails.
        """
        if self._copied is None:
            manifest = manifest.model_copy(update={"plan_sha256": self._plan_sha256})
            data = manifest.to_json().encode()
        else:
            manifest, data = self._copied.manifest, self._copied.data
        if self.published is None:
            self._check_claim()
        if self.published is None:
            arrived = run_threads(self.has_shard, manifest.shards, _PARALLEL)
            missing = [shard.name for shard, there in zip(manifest.shards, arrived, strict=True) if not there]
            if not missing:
                self.storage.create(MANIFEST, data)
            elif read_manifest(self.storage) is None:  # else another writer committed and removed the receipts
                raise DatasetError(f"{self.url}/{missing[0]}: not published, or changed since; run it again")
        found = read_manifest(self.storage)
        if found is None or found.data != data:
            raise StorageError(f"{self.url}: another dataset is committed there; never overwritten: use another name")
        self.published = manifest
        self._tidy()
        return manifest

    def _tidy(self) -> None:
        """Remove claim, receipts and leftovers of killed runs; the dataset is committed even if this is not allowed."""
        try:
            self.storage.delete(self.storage.names(FOLDER))
            self.storage.sweep()
        except StorageError as error:
            _log.warning("%s: committed, but %s/ cannot be removed (%s)", self.url, FOLDER, error)

    def _receipt(self, shard_name: str) -> Receipt | None:
        """Return the receipt of the shard that has the name; of a committed dataset it holds no tags."""
        if self.published is None:
            return _read(self.storage, _receipt_name(shard_name), Receipt)
        return next((Receipt(shard=shard) for shard in self.published.shards if shard.name == shard_name), None)

    def _has_arrived(self, receipt: Receipt | None) -> bool:
        """Return whether a receipt's files are still as they arrived."""
        if receipt is None or self.published is not None:
            return receipt is not None
        sizes = {receipt.shard.name: receipt.shard.bytes, receipt.shard.index_name: receipt.shard.index_bytes}
        for (name, size), tag in zip(sizes.items(), receipt.tags, strict=True):
            found = self.storage.stat(name)
            if found is None or found.size != size or (tag and found.tag != tag):
                return False
        return True


def _read(storage: Storage, name: str, model: type[Record]) -> Record | None:
    """Return a claim or receipt; read it again if it is broken, because another writer may be replacing it.

    Raises:
        StorageError: it stays broken.
    """
    for look in range(_LOOKS):
        time.sleep(_PAUSE * bool(look))
        data = storage.read(name, _MAX_RECORD_BYTES)
        if data is None:
            return None
        try:
            if count_values(data) <= _MAX_RECORD_VALUES:
                return model.model_validate_json(data)
        except ValidationError:
            continue
    kind = model.__name__.lower()
    raise StorageError(
        f"{storage.url}/{name}: not a {kind}; remove it if nobody is publishing there, and publish again"
    )


def _is_receipt(name: str) -> bool:
    return name.startswith(f"{FOLDER}/") and name.endswith(".json") and name != _CLAIM


def _receipt_name(shard_name: str) -> str:
    return f"{FOLDER}/{shard_name.removesuffix('.tar')}.json"


def _check_local(shard: Shard, tar: Path, index: Path, sizes_only: bool) -> None:
    for path, size, sha256 in ((tar, shard.bytes, shard.sha256), (index, shard.index_bytes, shard.index_sha256)):
        if path.stat().st_size != size or not (sizes_only or sha256_file(path) == sha256):
            raise DatasetError(f"{path}: not the bytes it was packed with ({shard.name}): a disk or memory fault")
