"""The admin API that every service has: errors as problem+json, a bearer token, pages, health."""

from causemesh.admin.app import create_app
from causemesh.admin.pages import Page, PageParams, decode_cursor, page_of
from causemesh.admin.problems import Problem, failures

__all__ = ["Page", "PageParams", "Problem", "create_app", "decode_cursor", "failures", "page_of"]
