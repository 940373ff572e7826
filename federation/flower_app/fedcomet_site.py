"""Hands Flower the site that is installed here."""

from client.app import app

__all__ = ["app"]
