"""The contract of a storage root, held to by a folder and by a prefix of an S3 bucket alike."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import numpy as np
import pytest
import zarr
from attempts import FILES, put
from faults import moto_server, s3_account
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from leukoflow.core.errors import StorageError
from leukoflow.storage.base import Storage
from leukoflow.storage.opening import open_storage


@pytest.fixture(scope="module")
def store() -> Iterator[str]:
    """The address of an S3 API with an empty bucket `lab`."""
    with moto_server() as url:
        boto3.client(
            "s3",
            endpoint_url=url,
            aws_access_key_id="test",
            aws_secret_access_key="test-secret",
            region_name="us-east-1",
        ).create_bucket(Bucket="lab")
        yield url


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.slow)])
def root(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A root of its own for each test; the store is started only where it is asked for."""
    if request.param == "local":
        return str(tmp_path / "run")
    for name, value in s3_account(request.getfixturevalue("store")).items():
        monkeypatch.setenv(name, value)
    return f"s3://lab/{tmp_path.name}"


@pytest.fixture
def storage(root: str) -> Storage:
    return open_storage(root)


def test_what_is_written_is_read(storage: Storage) -> None:
    storage.write("a/b.json", b"one")
    assert storage.exists("a/b.json")
    storage.write("a/b.json", b"two")
    assert storage.read("a/b.json") == b"two"
    assert storage.names("a") == ["b.json"]
    with storage.open("a/b.json") as file:
        file.seek(1)
        assert file.read() == b"wo"
    assert b"".join(storage.pieces("a/b.json")) == b"two"
    assert storage.digest("a/b.json") == (
        "a/b.json", 3, "3fc4ccfe745870e2c0d99f71f30ff0656c8dedd41cc1d7d3d376b0dbe685e2f3",
    )  # fmt: skip


def test_what_is_absent_is_absent(storage: Storage) -> None:
    assert not storage.exists("a")
    for ask in (storage.read, storage.digest, storage.stamp, lambda key: list(storage.pieces(key))):
        with pytest.raises(FileNotFoundError):
            ask("a/c.json")
    assert storage.digests(["a/c.json"], absent=True) == []
    with pytest.raises(FileNotFoundError):
        storage.digests(["a/c.json"])
    assert storage.files("") == storage.names("") == []
    assert storage.usage("") == (0, 0)
    storage.delete("a")


def test_a_writer_publishes_when_it_is_closed(storage: Storage) -> None:
    with storage.writer("scratch/a") as file:
        file.write(b"one")
        file.write(b"two")
    assert storage.read("scratch/a") == b"onetwo"


def test_listings_are_sorted_and_stay_below_their_prefix(storage: Storage) -> None:
    for key in ("b/2", "b/1/x", "bb/1", "a"):
        storage.write(key, key.encode())
    assert storage.files("") == ["a", "b/1/x", "b/2", "bb/1"]
    assert storage.files("b") == ["b/1/x", "b/2"]
    assert storage.names("") == ["a", "b", "bb"]
    assert storage.names("b") == ["1", "2"]
    assert storage.usage("b") == (2, 8)
    assert storage.child("b").files("1") == ["1/x"]


def test_zarr_arrays_are_kept(storage: Storage) -> None:
    group = zarr.open_group(storage.zarr("masks.zarr/00000"), mode="w")
    group["cells"] = np.arange(6, dtype=np.uint16).reshape(2, 3)
    again = zarr.open_group(storage.zarr("masks.zarr/00000", read_only=True), mode="r")
    assert np.asarray(again["cells"]).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_a_storage_that_can_be_used_says_nothing(storage: Storage) -> None:
    storage.probe()
    assert storage.abort_uploads() == 0
    storage.prune("nowhere")


NAMES = st.text("abcXYZ019 -_+#%äöü漢", min_size=1, max_size=8).filter(lambda name: name.strip() == name)


@settings(
    max_examples=15, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(st.dictionaries(st.lists(NAMES, min_size=2, max_size=3).map("/".join), st.binary(max_size=64), max_size=5))
def test_any_keys_and_bytes_come_back(storage: Storage, files: dict[str, bytes]) -> None:
    storage.delete("")
    kept: dict[str, bytes] = {}
    for key, data in files.items():
        if not any(key.startswith(f"{other}/") or other.startswith(f"{key}/") for other in kept):
            storage.write(key, data)
            kept[key] = data
    assert storage.files("") == sorted(kept)
    assert {key: storage.read(key) for key in kept} == kept
    assert storage.intact(storage.digests(kept))
    assert storage.usage("") == (len(kept), sum(map(len, kept.values())))


def test_other_schemes_are_refused() -> None:
    with pytest.raises(StorageError, match="only local folders and s3://"):
        open_storage("gs://bucket/x")


def test_it_travels_as_its_uri(storage: Storage) -> None:
    assert pickle.loads(pickle.dumps(storage)).root == storage.root
    assert open_storage("s3://lab/out/").child("a").uri("b") == "s3://lab/out/a/b"


def test_of_many_creators_one_wins(storage: Storage) -> None:
    gate = threading.Barrier(8)

    def create(i: int) -> bool:
        gate.wait()
        return storage.create("markers/x.json", str(i).encode())

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(create, range(8)))
    assert sum(won) == 1
    assert storage.read("markers/x.json") == str(won.index(True)).encode()
    assert storage.names("markers") == ["x.json"]


def test_delete_takes_files_folders_and_nothing(storage: Storage) -> None:
    storage.write("a/b", b"1")
    storage.write("a/c/d", b"2")
    storage.delete("a/b")
    assert storage.files("") == ["a/c/d"]
    storage.delete("a")
    storage.delete("a")
    assert storage.files("") == []
    assert storage.names("nowhere") == []


def test_promotion_moves_units_and_may_be_repeated(storage: Storage) -> None:
    parts = put(storage, "_attempts/00001/one", FILES)
    assert not storage.intact(parts)
    storage.promote("_attempts/00001/one", parts)
    storage.promote("_attempts/00001/one", parts)
    assert storage.intact(parts)
    storage.delete("_attempts")
    assert set(storage.files("")) == set(FILES)


def test_promotion_interrupted_between_units_is_completed(storage: Storage) -> None:
    parts = put(storage, "_attempts/00001/one", FILES)
    storage.promote("_attempts/00001/one", parts[:2])
    assert not storage.intact(parts)
    storage.promote("_attempts/00001/one", parts)
    assert storage.intact(parts)


def test_promotions_at_once_lose_nothing(storage: Storage) -> None:
    """A retry of a shard completes its commit, even while the first attempt is still at it."""
    for n in range(30 if storage.is_local else 5):
        files = {f"masks.zarr/{n:05d}/zarr.json": b"{}", f"masks.zarr/{n:05d}/c/0": b"x"}
        parts = put(storage, f"_attempts/{n:05d}/one", files)
        gate = threading.Barrier(3)

        def promote(
            n: int = n, parts: tuple[tuple[str, int, str], ...] = parts, gate: threading.Barrier = gate
        ) -> None:
            gate.wait()
            storage.promote(f"_attempts/{n:05d}/one", parts)

        with ThreadPoolExecutor(3) as pool:
            for done in [pool.submit(promote) for _ in range(3)]:
                done.result()
        assert storage.intact(parts)


@pytest.mark.parametrize("harm", ["gone", "shorter", "other", "folder"])
def test_intact_sees_every_harm(storage: Storage, harm: str) -> None:
    storage.write("a/b", b"abc")
    files = (storage.digest("a/b"),)
    assert storage.intact(files)
    storage.delete("a/b")
    if harm == "shorter":
        storage.write("a/b", b"ab")
    elif harm == "other":
        storage.write("a/b", b"abd")
    elif harm == "folder":
        storage.write("a/b/c", b"abc")
    assert not storage.intact(files)


def test_adopted_files_share_no_fate(storage: Storage, root: str) -> None:
    other = open_storage(f"{root}-other")
    storage.write("features.zarr/00000/c/0", b"abc")
    parts = (storage.digest("features.zarr/00000/c/0"),)
    other.adopt(storage, parts, "_attempts/00000/x")
    other.promote("_attempts/00000/x", parts)
    assert other.intact(parts)
    storage.delete("features.zarr")
    assert other.intact(parts)


def test_a_stamp_tells_a_new_file_from_the_old(storage: Storage) -> None:
    storage.write("plan.parquet", b"one")
    before = storage.stamp("plan.parquet")
    assert storage.stamp("plan.parquet") == before
    storage.write("plan.parquet", b"two")
    assert storage.stamp("plan.parquet") != before
    with pytest.raises(FileNotFoundError):
        storage.stamp("absent")


def test_what_lies_elsewhere_is_brought_through_this_process(storage: Storage, tmp_path: Path) -> None:
    here = open_storage(str(tmp_path / "here"))
    storage.write("features.zarr/00000/c/0", b"abc")
    parts = (storage.digest("features.zarr/00000/c/0"),)
    here.adopt(storage, parts, "_attempts/00000/x")
    here.promote("_attempts/00000/x", parts)
    assert here.intact(parts)
    storage.adopt(here, parts, "_attempts/00000/y")
    assert storage.read("_attempts/00000/y/features.zarr/00000/c/0") == b"abc"
