"""Parameters of lists: filters, order, page, and search terms, which are kept on the server."""

from __future__ import annotations

import secrets
from collections import OrderedDict
from dataclasses import dataclass
from urllib.parse import urlencode

from fastapi import Request

from leukoflow.apps.web.gate.principals import Principal
from leukoflow.apps.web.pages.rendering import translate_errors
from leukoflow.tasks.review.query import Query, Sort

PAGE = 50
"""Rows of a page."""
_SEARCHES = 2000


@dataclass(slots=True)
class Searches:
    """Search terms, which may be a patient's pseudonym, kept out of addresses and logs."""

    kept: OrderedDict[str, tuple[str, str]]

    def put(self, who: str, text: str) -> str:
        """Keep a person's search term; return its key."""
        key = secrets.token_urlsafe(12)
        self.kept[key] = (who, text)
        while len(self.kept) > _SEARCHES:
            self.kept.popitem(last=False)
        return key

    def get(self, who: str, key: str) -> str:
        """Return the term, empty if it is gone or somebody else's."""
        owner, text = self.kept.get(key, ("", ""))
        return text if owner == who else ""


searches = Searches(OrderedDict())


@dataclass(frozen=True, slots=True)
class ListRequest:
    """A requested list: its query, and the parameters that lead to it again."""

    query: Query
    parameters: tuple[tuple[str, str], ...]

    def link(self, **changes: object) -> str:
        """Return the parameters as part of an address, some of them changed; None and empty ones are left out."""
        merged: dict[str, object] = dict(self.parameters) | changes
        return urlencode({k: v for k, v in merged.items() if v not in (None, "")})


def list_request(request: Request, who: Principal, tab: str, limit_: int = PAGE, **fixed: str) -> ListRequest:
    """Read the parameters of a list from its address. Raises Refused (400) for an unknown status, order or review."""
    given = request.query_params
    known = ("label", "status", "site", "scanner", "review", "sort", "order", "find", "page")
    chosen = {name: given[name][:200] for name in known if given.get(name)}
    page = int(chosen["page"]) if chosen.get("page", "").isdecimal() and len(chosen["page"]) < 9 else 1
    sort = chosen.get("sort", Sort.URGENCY)
    order = chosen.get("order") or ("up" if sort in (Sort.NAME, Sort.ORDER) else "down")
    with translate_errors():
        query = Query(
            text=searches.get(who.name, chosen.get("find", "")),
            label=chosen.get("label"),
            status=chosen.get("status"),  # type: ignore[arg-type]
            site=chosen.get("site"),
            scanner=chosen.get("scanner"),
            review=chosen.get("review"),  # type: ignore[arg-type]
            slide=fixed.get("slide") or (given.get("slide") if tab == "fields" else None),
            patient=fixed.get("patient") or (given.get("patient") if tab == "fields" else None),
            sort=sort,  # type: ignore[arg-type]
            descending=order != "up",
            offset=(max(1, page) - 1) * limit_,
            limit=limit_,
        )
    for name in ("slide", "patient"):
        if value := getattr(query, name):
            chosen[name] = value
    return ListRequest(query, tuple(chosen.items()))
