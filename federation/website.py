"""Pages for people who have signed in: of a coordinator (`server.dashboard`) and of a site (`client.dashboard`).

A page is a plain function from a `Visit` to an answer; what surrounds it stands here, once, so that no page can forget
it: who may see it, tokens on forms, what a browser may load and where it may send (Content-Security-Policy), which host
names are answered. Nothing is loaded from elsewhere, and every page works without its one script, which only keeps what
is shown up to date.
"""

import asyncio
import logging
import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, urlsplit

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from federation import page
from federation.sessions import Person, Sessions, Throttle
from tokenizer.errors import FedcometError

HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
"""On every answer."""

_MOST_FORM_BYTES, _MOST_FIELDS = 64 << 10, 20
_MOST_STREAMS, _TICK_S, _ALIVE_S = 40, 1.0, 15.0
_TEMPLATES = Path(__file__).parent / "templates"
_STATIC = {
    "page.css": "text/css",
    "website.css": "text/css",
    "live.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}

_log = logging.getLogger(__name__)


class Missing(FedcometError):
    """There is no such page, or nothing of this name."""


@dataclass(frozen=True)
class Visit:
    """A request of somebody who has signed in, as a page sees it.

    Attributes:
        person: who it is.
        path: the parts of the address that vary.
        query: what stands behind the question mark.
        form: what was filled in.
        form_token: for the forms of the answer.
    """

    person: Person
    path: Mapping[str, str] = field(default_factory=dict)
    query: Mapping[str, str] = field(default_factory=dict)
    form: Mapping[str, str] = field(default_factory=dict)
    form_token: str = ""


Page = Callable[[Visit], Response]


@dataclass(frozen=True)
class Door:
    """Who may come in, and how.

    Attributes:
        hosts: names and addresses that this page is visited under; others are refused (DNS rebinding).
        check: gives who a name and a secret belong to, or None; may take its time.
        holds: tells whether a person who signed in before still may; asked at every visit.
        named: the form asks for a name, too.
        secure: the page is served by TLS.
        told: is told of events ("signed_in", "signed_out", "throttled"), the person's name if known, and the address.
    """

    hosts: frozenset[str]
    check: Callable[[str, str], Person | None]
    holds: Callable[[Person], bool] = lambda _: True
    named: bool = True
    secure: bool = True
    told: Callable[[str, str, str], None] = lambda *_: None

    @property
    def cookie(self) -> str:
        """The cookie's name; with this prefix, browsers take it only from this host, and only by TLS."""
        return "__Host-fedcomet" if self.secure else "fedcomet-site"


class Website:
    """Collects pages, and gives the ASGI application that serves them."""

    def __init__(self, title: str, templates: Path, door: Door, statuses: Mapping[type[Exception], int]) -> None:
        """Set up.

        Args:
            title: stands on every page.
            templates: the folder of the pages' templates; they extend `layout.html.j2`.
            door: who may come in.
            statuses: HTTP statuses of errors that pages raise, others are 409.
        """
        self.sessions, self._throttle = Sessions(), Throttle()
        self._door = door
        self._statuses: dict[type[Exception], int] = {Missing: 404, **statuses}
        self._routes: list[Route] = []
        self._streams, self._checking = 0, asyncio.Semaphore(1)
        self.templates = page.environment(templates)
        self.templates.globals.update(site_title=title, named=door.named, navigation=[])
        self._routes.append(Route("/static/{name}", self._static))
        self._routes.append(Route("/sign-in", self._sign_in, methods=["GET", "POST"]))
        self._routes.append(Route("/sign-out", self._sign_out, methods=["POST"]))

    def navigate(self, *links: tuple[str, str]) -> None:
        """Say which pages stand in the navigation: addresses and words."""
        self.templates.globals["navigation"] = list(links)

    def get(self, path: str, answer: Page, roles: frozenset[str] | None = None) -> None:
        """Add a page; `roles` may see it, None is whoever has signed in."""
        self._routes.append(Route(path, self._guarded(answer, roles), methods=["GET"]))

    def post(self, path: str, answer: Page, roles: frozenset[str]) -> None:
        """Add what a form does; only `roles` may, and only from a form of this site."""
        self._routes.append(Route(path, self._guarded(answer, roles), methods=["POST"]))

    def live(self, path: str, latest: Callable[[Visit], str]) -> None:
        """Add a stream of server-sent events that tells whenever what `latest` gives has changed."""

        async def stream(request: Request) -> Response:
            visit = await self._visit(request, None)
            if isinstance(visit, Response):
                return visit
            if self._streams >= _MOST_STREAMS:
                return Response("too many pages are kept up to date; reload by hand", 503)
            events = self._changes(request, visit, latest)
            return StreamingResponse(events, media_type="text/event-stream")

        self._routes.append(Route(path, stream, methods=["GET"]))

    def render(self, template: str, visit: Visit | None, status: int = 200, **values: Any) -> HTMLResponse:
        """Give a page of a template, for a visitor."""
        person = visit.person if visit else None
        values = {"person": person, "form_token": visit.form_token if visit else "", "here": "", **values}
        return HTMLResponse(self.templates.get_template(template).render(values), status)

    def app(self) -> ASGIApp:
        """Give the application."""
        app = Starlette(routes=self._routes, exception_handlers={HTTPException: self._http_error, 500: self._broken})
        return _Headers(app, self._door)

    # --- the door ---

    def _guarded(self, answer: Page, roles: frozenset[str] | None) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            visit = await self._visit(request, roles)
            if isinstance(visit, Response):
                return visit
            try:
                return await run_in_threadpool(answer, visit)
            except FedcometError as problem:
                status = next((code for kind, code in self._statuses.items() if isinstance(problem, kind)), 409)
                return self._tell(visit, status, "This can't be done", str(problem))

        return endpoint

    async def _visit(self, request: Request, roles: frozenset[str] | None) -> Visit | Response:
        """Give the visit, or the answer to somebody who may not come in."""
        mark = request.cookies.get(self._door.cookie, "")
        by_hand = "x-live" not in request.headers and "text/event-stream" not in request.headers.get("accept", "")
        person = self.sessions.find(mark, by_hand=by_hand)
        if person is None or not self._door.holds(person):
            self.sessions.end(mark)
            if request.method == "GET":
                wanted = request.url.path + (f"?{request.url.query}" if request.url.query else "")
                return RedirectResponse(f"/sign-in?next={quote(wanted, safe='')}", 303)
            return self._tell(None, 403, "Signed out", "Your session has ended. Sign in, and do it again.")
        form: Mapping[str, str] = {}
        token = self.sessions.form_token(mark)
        visit = Visit(person, request.path_params, dict(request.query_params), form, token)
        if request.method == "POST":
            read = await self._form(request, mark)
            if read is None:
                return self._tell(visit, 403, "Not from here", "This form was not from this page. Load it anew.")
            visit = Visit(person, visit.path, visit.query, read, token)
        if roles is not None and person.role not in roles:
            needed = " or ".join(sorted(roles))
            return self._tell(visit, 403, "Not for you", f"This takes a {needed}; {person.name} is a {person.role}.")
        return visit

    async def _form(self, request: Request, mark: str) -> Mapping[str, str] | None:
        """Read a form; None unless it was shown by this page to whoever has this mark."""
        origin, fetched = request.headers.get("origin"), request.headers.get("sec-fetch-site", "same-origin")
        if fetched != "same-origin" or (origin and urlsplit(origin).netloc != request.headers.get("host")):
            return None
        body = b""
        async for piece in request.stream():
            body += piece
            if len(body) > _MOST_FORM_BYTES:
                raise HTTPException(413, "This form is too long.")
        try:
            form = dict(parse_qsl(body.decode(), keep_blank_values=True, max_num_fields=_MOST_FIELDS))
        except ValueError:
            raise HTTPException(400, "This form can't be read.") from None
        return form if mark and self.sessions.is_form_token(mark, form.get("form_token", "")) else None

    async def _sign_in(self, request: Request) -> Response:
        mark = request.cookies.get(self._door.cookie, "")
        if request.method == "GET":
            wanted = request.query_params.get("next", "/")
            known = self.sessions.find(mark)
            if known is not None and self._door.holds(known):
                return RedirectResponse(_inside(wanted), 303)
            return self._sign_in_form(wanted, mark)
        form = await self._form(request, mark)
        address = request.client.host if request.client else ""
        if form is None:
            return self._sign_in_form("/", mark, 403, "The form had run out. Try again.")
        wanted, name = form.get("next", "/"), form.get("name", "")
        async with self._checking:  # one at a time: it takes memory and time on purpose
            if (wait_s := self._throttle.wait_s(address)) > 0:
                told = f"Too many wrong tries. Try again in {max(1, round(wait_s / 60))} minutes."
                return self._sign_in_form(wanted, mark, 429, told)
            last = self._throttle.count(address)
            person = await run_in_threadpool(self._door.check, name, form.get("secret", ""))
        if person is None:
            if last:
                await run_in_threadpool(self._door.told, "throttled", "", address)
            return self._sign_in_form(wanted, mark, 403, "That was not right. Nothing tells which part.")
        self._throttle.forget(address)
        self.sessions.end(mark)
        answer = RedirectResponse(_inside(wanted), 303)
        self._give_mark(answer, self.sessions.begin(person))
        await run_in_threadpool(self._door.told, "signed_in", person.name, address)
        return answer

    def _sign_in_form(self, wanted: str, mark: str, status: int = 200, told: str = "") -> Response:
        known = bool(re.fullmatch(r"[\w-]{43}", mark, re.ASCII)) and self.sessions.find(mark, by_hand=False) is None
        fresh = mark if known else secrets.token_urlsafe(32)
        values = {"form_token": self.sessions.form_token(fresh), "next": _inside(wanted), "told": told}
        answer = self.render("sign_in.html.j2", None, status, **values)
        self._give_mark(answer, fresh)
        return answer

    async def _sign_out(self, request: Request) -> Response:
        visit = await self._visit(request, None)
        if isinstance(visit, Response):
            return visit
        self.sessions.end(request.cookies.get(self._door.cookie, ""))
        address = request.client.host if request.client else ""
        await run_in_threadpool(self._door.told, "signed_out", visit.person.name, address)
        answer = RedirectResponse("/sign-in", 303)
        answer.delete_cookie(self._door.cookie, path="/", secure=self._door.secure, httponly=True, samesite="strict")
        return answer

    def _give_mark(self, answer: Response, mark: str) -> None:
        answer.set_cookie(self._door.cookie, mark, path="/", secure=self._door.secure, httponly=True, samesite="strict")

    # --- what else is answered ---

    async def _static(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in _STATIC:
            raise HTTPException(404, "There is no such file.")
        return Response((_TEMPLATES / name).read_bytes(), media_type=_STATIC[name])

    async def _changes(self, request: Request, visit: Visit, latest: Callable[[Visit], str]) -> AsyncIterator[str]:
        mark, quiet_s = request.cookies.get(self._door.cookie, ""), 0.0
        told: str | None = None
        self._streams += 1
        try:
            while self.sessions.find(mark, by_hand=False) is not None and self._door.holds(visit.person):
                try:
                    now: str | None = await run_in_threadpool(latest, visit)
                except FedcometError as problem:
                    _log.warning("a page can't be kept up to date: %s", problem)
                    now = told
                if now != told:
                    told, quiet_s = now, 0.0
                    yield f"event: changed\ndata: {now}\n\n"
                elif quiet_s >= _ALIVE_S:
                    quiet_s = 0.0
                    yield ": still here\n\n"
                await asyncio.sleep(_TICK_S)
                quiet_s += _TICK_S
            yield "event: ended\ndata: signed out\n\n"
        finally:
            self._streams -= 1

    def _tell(self, visit: Visit | None, status: int, title: str, told: str) -> Response:
        return self.render("told.html.j2", visit, status, title=title, told=told)

    async def _http_error(self, _: Request, problem: Exception) -> Response:
        status = problem.status_code if isinstance(problem, HTTPException) else 500
        known = {404: "There is no such page.", 405: "This can't be asked for in this way."}
        return self._tell(None, status, "This can't be shown", known.get(status, getattr(problem, "detail", "")))

    async def _broken(self, request: Request, problem: Exception) -> Response:
        _log.error("%s %s: %s: %s", request.method, request.url.path, type(problem).__name__, problem)
        return self._tell(None, 500, "Something broke", "The page's own log says what. Nothing was changed.")


class _Headers:
    """Answers only under known host names, and puts what browsers must know on every answer."""

    def __init__(self, app: ASGIApp, door: Door) -> None:
        self._app, self._door = app, door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        host = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
        if host_name(host) not in self._door.hosts:
            refused = Response("This page is not served under this name.", 421)
            await refused(scope, receive, send_with_headers)
            return
        await self._app(scope, receive, send_with_headers)


def host_name(host: str) -> str:
    """Give the name in a Host header or an address, without a port: `[::1]:8446` is `::1`."""
    match = re.fullmatch(r"\[([0-9a-fA-F:.]+)\](?::\d+)?|([^:\[\]]+)(?::\d+)?", host)
    return ((match.group(1) or match.group(2)) if match else host).lower()


def _inside(wanted: str) -> str:
    """Give an address of this site, whatever was asked for."""
    parts = urlsplit(wanted)
    plain = wanted.startswith("/") and not wanted.startswith(("//", "/\\")) and wanted.isprintable()
    return wanted if plain and not parts.scheme and not parts.netloc else "/"


def hosts(*names: str) -> frozenset[str]:
    """Give the names that a page on this machine is visited under, and others."""
    return frozenset({"localhost", "127.0.0.1", "::1", *map(host_name, names)})
