"""A site's own page: `fedcomet site ui HOME`, on loopback only, for whoever has the token that the command prints.

It reads; it changes nothing. Approving a run stays a command, so that nobody approves one by a click in a browser that
was left open.
"""

import hmac
import secrets
from hashlib import sha256
from pathlib import Path

from starlette.responses import Response
from starlette.types import ASGIApp

from client.home import SiteHome
from client.site_view import Window
from federation.sessions import Person
from federation.website import Door, Visit, Website, hosts


def new_token() -> str:
    """Give a token to sign in with."""
    return secrets.token_urlsafe(24)


def dashboard(home: SiteHome, token: str) -> ASGIApp:
    """Give the application of a site's page.

    Args:
        home: the site's.
        token: whoever has it may look.
    """
    window, person = Window(home), Person(home.name, "site", sha256(token.encode()).hexdigest())

    def check(_: str, secret: str) -> Person | None:
        return person if hmac.compare_digest(secret.strip().encode(), token.encode()) else None

    door = Door(hosts=hosts(), check=check, named=False, secure=False)
    site = Website(home.name, Path(__file__).parent / "templates", door, {})

    def show(visit: Visit) -> Response:
        stamp = window.stamp()
        return site.render("site_page.html.j2", visit, here="/", found=window.look(), latest=stamp)

    site.get("/", show)
    site.live("/live", lambda _: window.stamp())
    return site.app()
