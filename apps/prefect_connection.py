"""The Prefect server that a user has configured: where it is, and whether it answers and lets us in.

Read without importing Prefect, which fixes its settings when it is imported.
"""

from __future__ import annotations

import base64
import os
import ssl
import time
import tomllib
import urllib.error
import urllib.request
from pathlib import Path

from leukoflow.core.errors import LeukoflowError


class PrefectServerError(LeukoflowError):
    """A Prefect server did not start, does not answer, or does not let us in."""


def configured_api_url() -> str | None:
    """Return the Prefect API that the user has chosen: `PREFECT_API_URL`, else that of the active profile, if any."""
    return configured_setting("PREFECT_API_URL")


def configured_setting(name: str) -> str | None:
    """Return a setting of Prefect's client: from the environment, else from the active profile."""
    return os.environ.get(name) or _setting_of_profile(name)


def _setting_of_profile(name: str) -> str | None:
    home = Path(os.environ.get("PREFECT_HOME") or "~/.prefect").expanduser()
    path = Path(os.environ.get("PREFECT_PROFILES_PATH") or home / "profiles.toml").expanduser()
    try:
        profiles = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError):
        return None
    active = os.environ.get("PREFECT_PROFILE") or profiles.get("active")
    value = profiles.get("profiles", {}).get(active, {}).get(name)
    return str(value) if value else None


def is_healthy(api_url: str, timeout: float = 2.0) -> bool:
    """Return whether a Prefect server answers at `api_url` (asked directly when it is a loopback address)."""
    return ask(f"{api_url.rstrip('/')}/health", timeout) is not None


def require_server(api_url: str | None, timeout: float = 5.0) -> None:
    """Make sure that the configured server answers and lets us in, before work depends on it.

    Tried three times, since a server may be restarting. Raises PrefectServerError with the remedy.
    """
    if api_url is None:
        raise PrefectServerError("no Prefect server is configured: set PREFECT_API_URL to its address, .../api")
    base = api_url.rstrip("/")
    for attempt in range(3):
        if attempt:
            time.sleep(1.0)
        try:
            _open(f"{base}/admin/version", timeout, _credentials())
        except urllib.error.HTTPError as error:
            trouble = f"answers with HTTP {error.code}: see to that server, or to the proxy before it"
            if error.code in (401, 403):
                said = "refuses" if configured_setting("PREFECT_API_AUTH_STRING") else "asks for"
                raise PrefectServerError(
                    f"the Prefect server at {api_url} {said} user and password: set PREFECT_API_AUTH_STRING to the "
                    "USER:PASSWORD that it was started with (PREFECT_SERVER_API_AUTH_STRING)"
                ) from None
            if error.code == 404:
                raise PrefectServerError(
                    f"there is no Prefect API at {api_url}: correct the path of PREFECT_API_URL, which ends with /api"
                ) from None
        except (urllib.error.URLError, OSError, ValueError) as error:
            if words := _describe_certificate_error(error):
                raise PrefectServerError(f"the Prefect server at {api_url}: {words}") from None
            trouble = "does not answer: start that server"
        else:
            return
    raise PrefectServerError(
        f"the Prefect server at {api_url} {trouble}, or {how_to_unset_server()} so that a run starts its own"
    )


def how_to_unset_server() -> str:
    """Say what makes a run start a server of its own: the configured address is taken away where it stands."""
    url = configured_setting("PREFECT_API_URL")
    in_profile = url is not None and _setting_of_profile("PREFECT_API_URL") == url
    return (
        "take its address out of the profile (`prefect config unset PREFECT_API_URL`)"
        if in_profile
        else ("unset PREFECT_API_URL")
    )


def _describe_certificate_error(error: BaseException) -> str:
    """Say what is wrong with certificates, and the remedy; empty where an error is of another kind."""
    reason = getattr(error, "reason", None)
    cause = reason if isinstance(reason, BaseException) else error
    if isinstance(cause, ssl.SSLCertVerificationError):
        return (
            f"its certificate is refused ({cause.verify_message}): set PREFECT_API_SSL_CERT_FILE to the certificate "
            "of the authority that signed it, or have it renewed"
        )
    file = configured_setting("PREFECT_API_SSL_CERT_FILE")
    unread = isinstance(cause, FileNotFoundError | PermissionError) or getattr(cause, "library", None) == "X509"
    if file is None or not unread:
        return ""
    return f"{file}, which PREFECT_API_SSL_CERT_FILE names, is absent or no PEM file: correct its path, or unset it"


def _credentials() -> dict[str, str]:
    """Return the header that a server with basic authentication wants, if user and password are configured."""
    secret = configured_setting("PREFECT_API_AUTH_STRING")
    return {"Authorization": f"Basic {base64.b64encode(secret.encode()).decode()}"} if secret else {}


def _open(url: str, timeout: float, headers: dict[str, str]) -> bytes:
    """Return the body of an answer. Certificates are checked as Prefect's client does. Raises urllib's errors."""
    handlers: list[urllib.request.BaseHandler] = []
    if "//127.0.0.1" in url or "//localhost" in url:
        handlers.append(urllib.request.ProxyHandler({}))
    if url.startswith("https:"):
        context = ssl.create_default_context(cafile=configured_setting("PREFECT_API_SSL_CERT_FILE"))
        if (configured_setting("PREFECT_API_TLS_INSECURE_SKIP_VERIFY") or "").lower() in ("1", "true"):
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        handlers.append(urllib.request.HTTPSHandler(context=context))
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.build_opener(*handlers).open(request, timeout=timeout) as answer:
        return bytes(answer.read())


def ask(url: str, timeout: float = 2.0) -> bytes | None:
    """Return the body of a successful answer, else None."""
    try:
        return _open(url, timeout, {})
    except (urllib.error.URLError, OSError, ValueError):
        return None
