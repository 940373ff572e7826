"""Hands Flower the coordinator that is installed here."""

from server.app import app

__all__ = ["app"]
