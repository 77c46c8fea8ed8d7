"""A page in the browser that draws with a model."""

from page.board import Page
from page.server import serve

__all__ = ["Page", "serve"]
