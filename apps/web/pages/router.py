"""All pages, in the order in which addresses are matched."""

from __future__ import annotations

from fastapi import APIRouter

from leukoflow.apps.web.pages import about, across_runs, admin, bench, fields, runs, sign_in, verdicts

_ROOMS = (sign_in, runs, fields, verdicts, across_runs, bench, about, admin)
router = APIRouter(routes=[route for room in _ROOMS for route in room.router.routes])
