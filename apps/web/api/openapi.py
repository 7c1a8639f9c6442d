"""The API's own description, as OpenAPI and as a page."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from starlette.responses import JSONResponse

from leukoflow.apps.web.api.problems import add_problem_schema
from leukoflow.tasks.review.wording import RESEARCH_USE

router = APIRouter(prefix="/api/v1")


@router.get("/openapi.json", include_in_schema=False)
async def openapi(request: Request) -> JSONResponse:
    """Return the OpenAPI document. Needs no token, since it says nothing about this installation."""
    return JSONResponse(document(request.app))


@router.get("/docs", include_in_schema=False)
async def docs(request: Request) -> Response:
    """Show the OpenAPI document as a page."""
    found = document(request.app)
    schemas = found["components"]["schemas"]
    operations = [
        (method.upper(), path, operation, operation["tags"][0])
        for path, methods in found["paths"].items()
        for method, operation in methods.items()
    ]
    context = {"operations": operations, "schemas": schemas, "notice": RESEARCH_USE, "shown": _schema_words}
    answer: Response = request.app.state.templates.TemplateResponse(request, "api.html", context)
    return answer


def _schema_words(schema: dict[str, Any]) -> str:
    """Describe a schema in a few words."""
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return " or ".join(_schema_words(part) for part in schema[key])
    if "enum" in schema or "const" in schema:
        return " ".join(str(v) for v in schema.get("enum", [schema.get("const")]))
    kind = str(schema.get("type", "any"))
    if kind == "array":
        return f"list of {_schema_words(schema.get('items', {}))}"
    bounds = [f"{word} {schema[key]}" for key, word in _BOUNDS if key in schema]
    return ", ".join([kind, *bounds])


_BOUNDS = (("minimum", "from"), ("exclusiveMinimum", "above"), ("maximum", "to"), ("pattern", "like"))


def document(app: FastAPI) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of the API."""
    cached = getattr(app.state, "openapi", None)
    if isinstance(cached, dict):
        return cached
    found = get_openapi(
        title="leukoflow", version="1", routes=app.routes,
        description=f"{RESEARCH_USE}\n\nErrors are RFC 9457 problems. Send an API token as `Authorization: Bearer`.",
        servers=[{"url": app.state.settings.root_path or "/"}],
    )  # fmt: skip
    add_problem_schema(found)
    found["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    for path, operations in found["paths"].items():
        for operation in operations.values():
            operation["security"] = [] if path.endswith("/health") else [{"token": []}]
    app.state.openapi = found
    return found
