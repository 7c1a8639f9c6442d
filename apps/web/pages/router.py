"""All pages, in the order in which addresses are matched."""

from __future__ import annotations

from fastapi import APIRouter

from leukoflow.apps.web.pages import about, across_runs, admin, bench, fields, runs, sign_in, verdicts

router = APIRouter()
for room in (sign_in, runs, fields, verdicts, across_runs, bench, about, admin):
    router.include_router(room.router)
