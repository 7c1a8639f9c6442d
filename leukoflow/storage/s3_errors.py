"""What goes wrong with an object store, in words: one line that names the thing and the remedy."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    HTTPClientError,
    NoCredentialsError,
    NoRegionError,
    PartialCredentialsError,
    ProfileNotFound,
    SSLError,
    TokenRetrievalError,
    UnauthorizedSSOTokenError,
)
from botocore.exceptions import ConnectionError as NoConnectionError
from botocore.parsers import ResponseParserError

from leukoflow.core.errors import LeukoflowError, StorageError

ABSENT = ("NoSuchKey", "NoSuchUpload", "404", "NotFound")
"""What stores say of a key that is not there."""
_DENIED = (
    "{uri}: access denied; give these credentials the rights on bucket {bucket} that the operating guide lists "
    "(Object storage), or use others (AWS_PROFILE, AWS_ACCESS_KEY_ID)"
)
_UNKNOWN = (
    "{uri}: {endpoint} does not know these credentials ({code}); correct AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
    "or AWS_PROFILE"
)
_EXPIRED = "{uri}: the credentials have expired ({code}); renew them, and run the same command again"
_ELSEWHERE = "{uri}: bucket {bucket} is in another region or behind another endpoint{region}; set AWS_DEFAULT_REGION"
_LACKING = "{uri}: {endpoint} does not offer what is needed ({code}); use another object store"
_OVERLOADED = "{uri}: the store is overloaded ({code}) and stayed so through all retries; try again later"
_REPLACED = "{uri} was replaced while it was being read; if it is a source, start a new run for the new content"
_NO_KEYS = (
    "{uri}: no credentials for the store; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE, or give this "
    "machine a role"
)
_NOT_FETCHED = "{uri}: the credentials cannot be fetched or have expired ({said}); renew them"
_UNREACHABLE = (
    "{uri}: {endpoint} cannot be reached or breaks connections ({kind}); check AWS_ENDPOINT_URL and the network, and "
    "try again"
)
_BY_CODE = {
    "NoSuchBucket": "{uri}: bucket {bucket} does not exist at {endpoint}; create it, or correct name or "
    "AWS_ENDPOINT_URL",
    **dict.fromkeys(("AccessDenied", "AllAccessDisabled", "403", "Forbidden"), _DENIED),
    **dict.fromkeys(("InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidSecurity"), _UNKNOWN),
    **dict.fromkeys(
        ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "InvalidToken", "RequestExpired"), _EXPIRED
    ),
    "RequestTimeTooSkewed": "{uri}: the clock of this machine is wrong (RequestTimeTooSkewed); correct it",
    **dict.fromkeys(
        ("PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "301"), _ELSEWHERE
    ),
    "InvalidBucketName": "{uri}: {bucket!r} is not a valid bucket name; correct the address",
    **dict.fromkeys(("PreconditionFailed", "412"), _REPLACED),
    "InvalidObjectState": "{uri}: it is in an archive class of the store; restore it first",
    **dict.fromkeys(("NotImplemented", "501", "MethodNotAllowed"), _LACKING),
    **dict.fromkeys(
        ("SlowDown", "503", "ServiceUnavailable", "Throttling", "RequestLimitExceeded", "TooManyRequests"), _OVERLOADED
    ),
}
"""By the store's own code."""
_BY_KIND: tuple[tuple[tuple[type[BaseException], ...], str], ...] = (
    ((NoCredentialsError, PartialCredentialsError), _NO_KEYS),
    ((CredentialRetrievalError, TokenRetrievalError, UnauthorizedSSOTokenError), _NOT_FETCHED),
    ((ProfileNotFound,), "{uri}: {said}; correct AWS_PROFILE"),
    ((NoRegionError,), "{uri}: no region is set; set AWS_DEFAULT_REGION"),
    ((SSLError,), "{uri}: no secure connection to {endpoint} ({tls}); set AWS_CA_BUNDLE to its authority's file"),
    ((ResponseParserError,), "{uri}: {endpoint} does not answer as an S3 store does; correct AWS_ENDPOINT_URL"),
    ((HTTPClientError, NoConnectionError, ConnectionError, TimeoutError), _UNREACHABLE),
)
"""By the kind of error at the root, the first that fits."""


def code_of(error: BaseException | None) -> str | None:
    """Return the store's own word for what went wrong, such as NoSuchKey, wherever it hides in the chain of causes."""
    seen = 0
    while error is not None and seen < 10:
        if isinstance(error, ClientError):
            return str(error.response.get("Error", {}).get("Code", ""))
        error, seen = error.__cause__ or error.__context__, seen + 1
    return None


@contextmanager
def store_errors(uri: str) -> Iterator[None]:
    """Turn whatever the client raises into StorageError in words; an absent key stays FileNotFoundError."""
    try:
        yield
    except LeukoflowError:
        raise
    except FileExistsError:
        raise
    except FileNotFoundError as error:
        if code_of(error) != "NoSuchBucket":
            raise
        raise StorageError(explain(error, uri)) from error
    except Exception as error:
        foreign = type(error).__module__.partition(".")[0] in ("botocore", "aiobotocore", "aiohttp")
        if not foreign and not isinstance(error, OSError | BotoCoreError):
            raise
        if code_of(error) in ABSENT:
            raise FileNotFoundError(uri) from error
        raise StorageError(explain(error, uri)) from error


def explain(error: BaseException, uri: str) -> str:
    """Say in one line what is wrong and what to do."""
    code = code_of(error) or ""
    root = error
    while root.__cause__ is not None and not isinstance(root, BotoCoreError | ClientError):
        root = root.__cause__
    template = _BY_CODE.get(code)
    if template is None:
        template = next((words for kinds, words in _BY_KIND if isinstance(root, kinds)), None)
    if template is None and "aiohttp" in type(root).__module__:
        template = _UNREACHABLE
    if template is None:
        template = "{uri} failed at the object store ({failure}); a retry may help"
    found = root.response.get("Error", {}) if isinstance(root, ClientError) else {}
    region = found.get("Region") or found.get("Endpoint")
    return template.format(
        uri=uri,
        bucket=uri.removeprefix("s3://").partition("/")[0],
        endpoint=endpoint(),
        code=code,
        region=f" ({region})" if region else "",
        said=" ".join(str(root).split())[:300] or type(root).__name__,
        tls=_tls_reason(root),
        kind=type(root).__name__,
        failure=code or type(root).__name__,
    )


def _tls_reason(error: BaseException) -> str:
    """Say why a certificate was refused, in the words of OpenSSL; the client's own quote the address of the object."""
    found = re.search(r"certificate verify failed: [A-Za-z -]+", str(error))
    return found[0].strip() if found else type(error).__name__


def endpoint() -> str:
    """Return the address of the store that is in use, or words for it."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "the store"
