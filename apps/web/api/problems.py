"""Errors for programs (RFC 9457), and their description in the OpenAPI document."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, Field
from starlette.responses import JSONResponse

TITLES = {
    400: "The request could not be understood",
    401: "Please sign in",
    403: "You are not allowed to do this",
    404: "Not found",
    405: "Not possible here",
    408: "The request took too long to arrive",
    409: "This conflicts with the current state",
    413: "This is too large",
    415: "This format is not supported here",
    422: "The request has an invalid value",
    429: "Too many requests",
    500: "Something went wrong",
    503: "The server is busy",
}
_WHEN = {
    400: "The request is malformed, or the server does not answer to this host name.",
    401: "No valid API token or session.",
    403: "The token or role lacks the scope, or the CSRF token is missing.",
    404: "No such run, field, patient or upload; it may have been deleted.",
    408: "The body did not arrive in time.",
    409: "It conflicts with the current state.",
    413: "The body or a part of it is too large.",
    415: "The content type of the body is not supported.",
    422: "A value is missing or out of its range.",
    429: "Too many requests; `Retry-After` says how many seconds to wait.",
    503: "The queue is full, or the results cannot be read now; `Retry-After` says when to try again.",
}


class FieldProblem(BaseModel):
    """One value that is not right."""

    at: str = Field(examples=["query.limit"])
    message: str = Field(examples=["Input should be less than or equal to 500"])


class Problem(BaseModel):
    """What went wrong (RFC 9457)."""

    type: str = Field(examples=["about:blank"])
    title: str = Field(examples=[TITLES[404]])
    status: int = Field(examples=[404])
    detail: str = Field(examples=["There is no run with that key."])
    errors: list[FieldProblem] | None = None


def problem(status: int, detail: str, headers: dict[str, str] | None = None, errors: Any = None) -> JSONResponse:
    """Return a response that says what went wrong."""
    body = {"type": "about:blank", "title": TITLES.get(status, TITLES[500]), "status": status, "detail": detail}
    if errors:
        body["errors"] = errors
    return JSONResponse(body, status, headers, media_type="application/problem+json")


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the `responses` of an operation that may answer with these statuses."""
    content = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    found: dict[int | str, dict[str, Any]] = {}
    for status in statuses:
        found[status] = {"description": _WHEN[status], "content": content}
        if status in (429, 503):
            found[status]["headers"] = {"Retry-After": {"schema": {"type": "integer"}, "description": "Seconds."}}
    return found


def finite(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row with null in place of the numbers that JSON cannot represent: NaN and infinities."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def add_problem_schema(document: dict[str, Any], models: Iterable[type[BaseModel]] = (Problem,)) -> None:
    """Add the schema of `Problem` to an OpenAPI document."""
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for model in models:
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= schema.pop("$defs", {})
        schemas[model.__name__] = schema
