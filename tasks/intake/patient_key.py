"""The key that makes pseudonyms of patients: where it comes from, what makes it good, and how a run remembers it.

A run remembers no key but a check value of it, so that the same run is never taken up with another key: its patients
would then silently not be found in other runs.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from typing import Any, cast

from leukoflow.core.errors import ConfigError
from leukoflow.tasks.intake.spelling import tidied

PATIENT_KEY = "LEUKOFLOW_PATIENT_KEY"
SHORTEST_KEY = 32
FEWEST_CHARACTERS = 8
KEY_COMMAND = 'python -c "import secrets; print(secrets.token_hex(32))"'
KEY_RULE = (
    f"at least {SHORTEST_KEY} characters, {FEWEST_CHARACTERS} different ones among them, no pattern that repeats and "
    "no placeholder"
)
_PLACEHOLDERS = ("change-me", "changeme", "change_me", "password", "passwort", "example", "leukoflow", "12345678")
_CHECKED = b"leukoflow: check value of a patient key"


def pseudonym(patient_id: str, key: bytes) -> str:
    """Return the HMAC-SHA-256 of a patient's id: it recognises a patient, and nobody without the key finds out who."""
    return "p_" + hmac.new(key, patient_id.encode(), hashlib.sha256).hexdigest()[:32]


def pseudonyms(patient_id: str, key: bytes) -> tuple[str, ...]:
    """Return the pseudonyms that a patient may have: of the id as manifests are read, and as it was typed.

    They differ where blanks stand around the id, which older versions took for a part of it.
    """
    return tuple(dict.fromkeys(pseudonym(name, key) for name in (tidied(patient_id), patient_id)))


def check_value(key: bytes) -> str:
    """Return 16 hex digits that say whether two keys are the same, and nothing else about them."""
    return hmac.new(key, _CHECKED, hashlib.sha256).hexdigest()[:16]


def weakness(key: bytes) -> str | None:
    """Say in words why a key does not resist guessing; None for a good one."""
    text = key.decode(errors="replace").strip()
    if len(text) < SHORTEST_KEY:
        return f"it has {len(text)} characters"
    if any(word in text.lower() for word in _PLACEHOLDERS):
        return "it holds a placeholder or an obvious word"
    if len(set(text)) < FEWEST_CHARACTERS:
        return f"it has {len(set(text))} different characters"
    if text in (text + text)[1:-1]:
        return "it repeats a pattern"
    return None


def require_good(key: bytes) -> None:
    """Raise ConfigError with the rule and the remedy for a key that can be guessed."""
    if wrong := weakness(key):
        raise ConfigError(
            f"the patient key ({PATIENT_KEY}, or the Prefect Secret block) can be guessed: {wrong}. It needs "
            f"{KEY_RULE}; make one with {KEY_COMMAND}, and keep it as you keep the results"
        )


def patient_key() -> bytes | None:
    """Return the key for pseudonyms from the environment or, where a Prefect API is configured, from a Secret block."""
    if value := os.environ.get(PATIENT_KEY):
        return value.encode()
    if not os.environ.get("PREFECT_API_URL"):
        return None
    import httpx
    from prefect.blocks.system import Secret

    try:
        block = cast(Any, Secret.load)("leukoflow-patient-key", _sync=True)
    except ValueError:  # there is no such block
        return None
    except httpx.HTTPError as error:
        if isinstance(error, httpx.HTTPStatusError) and error.response.status_code in (401, 403):
            raise ConfigError(
                f"the Prefect server at {os.environ['PREFECT_API_URL']}, which may hold the key for the patients in "
                "the manifest, refuses user and password: set PREFECT_API_AUTH_STRING to USER:PASSWORD, or set "
                f"{PATIENT_KEY}"
            ) from None
        raise ConfigError(
            f"the Prefect server at {os.environ['PREFECT_API_URL']} does not answer ({type(error).__name__}), and it "
            f"may hold the key for the patients in the manifest; start it, or set {PATIENT_KEY}"
        ) from None
    return str(block.get()).encode()
