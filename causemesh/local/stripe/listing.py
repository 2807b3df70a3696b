"""Pages of objects: Stripe's lists and search results."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from causemesh.local.stripe.refusals import Refused, no_such
from causemesh.local.stripe.store import Json, Store, Wanted

_DEFAULT_LIMIT = 10
_CLAUSES = 10
_CLAUSE = re.compile(
    r"""\s*(?:metadata\[(?P<q1>['"])(?P<key>.*?)(?P=q1)\]|(?P<field>[a-z_]+))
        \s*:\s*(?P<q2>['"])(?P<value>(?:\\.|(?!(?P=q2)).)*)(?P=q2)(?=\s|$)""",
    re.VERBOSE,
)
_AND = re.compile(r"\s+(?:AND\s+)?(?=\S)")


def listed(store: Store, url: str, wanted: Wanted, params: Json) -> Json:
    """Stripe's list object: one page, newest first."""
    before = None
    if "starting_after" in params:
        before = store.place(wanted.kind, params["starting_after"])
        if before is None:
            raise no_such(wanted.kind, params["starting_after"], param="starting_after")
    page, has_more = _page(store, wanted, params, before)
    return {"object": "list", "data": page, "has_more": has_more, "url": url}


def found(store: Store, url: str, wanted: Wanted, params: Json) -> Json:
    """Stripe's search result. Unlike Stripe's, which lags up to a minute, it is never behind."""
    before = None
    if "page" in params:
        if not params["page"].isdecimal():
            raise Refused("Invalid page: pass the next_page of a search result", param="page")
        before = int(params["page"])
    page, has_more = _page(store, wanted, params, before)
    following = str(store.place(wanted.kind, page[-1]["id"])) if has_more else None
    return {
        "object": "search_result",
        "data": page,
        "has_more": has_more,
        "next_page": following,
        "url": url,
    }


def _page(
    store: Store, wanted: Wanted, params: Json, before: int | None
) -> tuple[list[Json], bool]:
    limit = params.get("limit", _DEFAULT_LIMIT)
    rows = store.newest(wanted, limit + 1, before)
    return rows[:limit], len(rows) > limit


def query(kind: str, text: str, fields: Collection[str]) -> Wanted:
    """What a search query asks: `metadata['key']:'value'` and `field:'value'`, joined by AND.

    Raises Refused for the rest of Stripe's query language (comparisons, OR, negation, substrings).
    """
    wanted: dict[str, dict[str, Any]] = {"fields": {}, "metadata": {}}
    at = 0
    for _ in range(_CLAUSES):
        clause = _CLAUSE.match(text, at)
        if clause is None or (clause["field"] is not None and clause["field"] not in fields):
            break
        where, name = (
            ("metadata", clause["key"]) if clause["field"] is None else ("fields", clause["field"])
        )
        wanted[where][name] = re.sub(r"\\(.)", r"\1", clause["value"])
        at = clause.end()
        if not text[at:].strip():
            return Wanted(kind, **wanted)
        joined = _AND.match(text, at)
        at = joined.end() if joined else at
    raise Refused(
        f"Invalid query at {text[at:]!r}: this stand-in knows metadata['key']:'value' and "
        f"{', '.join(sorted(fields))} with :'value', joined by AND",
        param="query",
    )
