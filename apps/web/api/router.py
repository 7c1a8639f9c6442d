"""The JSON API, version 1, except for what it says about runs."""

from __future__ import annotations

from fastapi import APIRouter

from leukoflow.apps.web.api import diagnoses, openapi, server, tokens

_ROOMS = (server, diagnoses, tokens, openapi)
router = APIRouter(routes=[route for room in _ROOMS for route in room.router.routes])
