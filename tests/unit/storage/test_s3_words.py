"""What is said when an object store refuses, is not there, or is set up wrongly: the thing and the remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import zarr
from faults import Answer, FaultyProxy, Request, failure, s3_account

from leukoflow.core.errors import PreflightError, SourceError, StorageError
from leukoflow.sources.identify import identify
from leukoflow.storage.opening import open_storage
from leukoflow.tasks.intake.preflight import conditional_writes

pytestmark = pytest.mark.slow  # a server of moto, behind a proxy


REFUSALS = (
    ("AccessDenied", 403, "access denied; give these credentials the rights"),
    ("InvalidAccessKeyId", 403, "does not know these credentials"),
    ("SignatureDoesNotMatch", 403, "does not know these credentials"),
    ("ExpiredToken", 400, "credentials have expired"),
    ("RequestTimeTooSkewed", 403, "the clock of this machine"),
    ("AuthorizationHeaderMalformed", 400, "in another region"),
    ("NoSuchBucket", 404, "bucket lab does not exist at"),
)


def test_refusals_name_the_thing_and_the_remedy(proxy: FaultyProxy) -> None:
    storage = open_storage("s3://lab/out")
    acts = (
        storage.probe,
        lambda: storage.read("a"),
        lambda: storage.create("a", b""),
        lambda: storage.write("a", b""),
        lambda: storage.files(""),
        lambda: storage.delete("a"),
        lambda: zarr.open_group(storage.zarr("z"), mode="r"),
    )
    for code, status, words in REFUSALS:
        answer = failure(code, status)
        proxy.says = lambda request, answer=answer: answer  # type: ignore[misc]
        for act in acts:
            before = len(proxy.log)
            with pytest.raises(StorageError, match=words) as caught:
                act()
            assert "s3://lab/out" in str(caught.value)
            assert "test-secret" not in str(caught.value)
            assert "\n" not in str(caught.value)
            assert len(proxy.log) - before <= 4  # Zarr asks for several keys at once; asking again is of no use
        with pytest.raises(PreflightError, match=words):
            conditional_writes(storage)
        with pytest.raises(SourceError, match=words):
            identify("s3://lab/in.zip")


def test_a_store_that_is_not_there_is_noticed_soon(proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage("s3://lab/out")
    with proxy.outage(), pytest.raises(StorageError, match="cannot be reached or breaks connections"):
        storage.probe()
    proxy.says = lambda request: Answer(404, ("HTTP/1.1 404 Not Found", "Content-Type: text/html"), b"<html>nginx")
    with pytest.raises(StorageError, match="does not answer as an S3 store does"):
        storage.probe()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(StorageError, match=r"127\.0\.0\.1:1 cannot be reached"):
        storage.probe()


def test_no_credentials(proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    for act in (open_storage("s3://lab/out").probe, lambda: open_storage("s3://lab/out").read("a")):
        with pytest.raises(StorageError, match="no credentials for the store; set AWS_ACCESS_KEY_ID"):
            act()
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(StorageError, match="correct AWS_PROFILE"):
        open_storage("s3://lab/out").probe()


def test_a_profile_names_credentials_and_endpoint(
    proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    open_storage("s3://lab/profile").write("a", b"1")
    account = s3_account(proxy.url)
    lines = ["[profile night]", f"endpoint_url = {proxy.url}", "region = us-east-1"]
    lines += [f"aws_access_key_id = {account['AWS_ACCESS_KEY_ID']}", "aws_secret_access_key = another"]
    (tmp_path / "config").write_text("\n".join(lines))
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "night")
    open_storage("s3://lab/profile").probe()
    assert open_storage("s3://lab/profile").read("a") == b"1"


@pytest.mark.parametrize(("style", "path"), [("path", "/lab/style/a"), ("virtual", "/style/a")])
def test_the_addressing_style_is_a_setting(
    proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch, style: str, path: str
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://localhost:{proxy.port}")
    monkeypatch.setenv("LEUKOFLOW_S3_ADDRESSING_STYLE", style)
    hosts: list[str] = []

    def note(request: Request) -> Answer:
        hosts.append(request.header("host") or "")
        return failure("AccessDenied", 403)

    proxy.says = note
    monkeypatch.setattr("socket.getaddrinfo", _resolving_to_loopback())
    with pytest.raises(StorageError, match="access denied"):
        open_storage("s3://lab/style").read("a")
    assert [seen.target for seen in proxy.log] == [path]
    assert hosts == [f"{'lab.' if style == 'virtual' else ''}localhost:{proxy.port}"]
    monkeypatch.setenv("LEUKOFLOW_S3_ADDRESSING_STYLE", "sideways")
    with pytest.raises(StorageError, match="must be path, virtual or auto"):
        open_storage("s3://lab/style").read("a")


def _resolving_to_loopback() -> Any:
    import socket

    real = socket.getaddrinfo
    return lambda host, *rest, **more: real("127.0.0.1", *rest, **more)
