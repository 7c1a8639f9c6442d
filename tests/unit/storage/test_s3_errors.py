"""What is said of a store names no object of it."""

from __future__ import annotations

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, SSLError

from leukoflow.storage.s3_errors import explain

ADDRESS = "https://s/b/in/miller.jpg"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (EndpointConnectionError(endpoint_url=ADDRESS), "or breaks connections (EndpointConnectionError)"),
        (
            SSLError(endpoint_url=ADDRESS, error="certificate verify failed: self-signed certificate (_ssl.c:1)"),
            "no secure connection to the store (certificate verify failed: self-signed certificate)",
        ),
        (ClientError({"Error": {"Code": "InternalError", "Message": "in/miller.jpg"}}, "GetObject"), "(InternalError)"),
        (OSError("in/miller.jpg"), "(OSError)"),
    ],
)  # fmt: skip
def test_what_is_said_of_the_store_names_no_object(
    error: Exception, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    said = explain(error, "s3://b/in")
    assert words in said
    assert "miller" not in said
