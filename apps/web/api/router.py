"""The JSON API, version 1, but for what it says of runs."""

from __future__ import annotations

from fastapi import APIRouter

from leukoflow.apps.web.api import diagnoses, openapi, server, tokens

router = APIRouter()
for room in (server, diagnoses, tokens, openapi):
    router.include_router(room.router)
