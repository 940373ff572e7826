"""The dashboards as people see them: in Chromium, light and dark, on a phone, and kept up to date.

Screenshots go to the folder that FEDCOMET_SCREENSHOTS names, to be looked at.
"""

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from client.dashboard import dashboard
from server.dashboard import Dashboard
from server.ledger import Ledger
from server.run_entries import Phase, ReplyEntry, Status
from tests import services
from tests.chromium import PROGRAM, Tab, in_a_tab
from tests.watched import ANNA, SITES, Watched, coordinator_home, site_home

pytestmark = pytest.mark.skipif(PROGRAM is None, reason=services.CHROMIUM_MISSING)
PHONE = (("phone", 360, "dark"),)
LOOKS = (("light", 1200, "light"), ("dark", 1200, "dark"), ("phone", 360, "light"))
SIGN_IN = """
const name = document.getElementById("name");
if (name) name.value = {name!r};
document.getElementById("secret").value = {secret!r};
document.querySelector("form.fields").submit();
"""
# WCAG 2.2, 1.4.3: texts that stand out from their ground by less than 4.5 to 1.
CONTRAST = """
(() => {
  const part = (v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4);
  const light = (colour) => {
    const [r, g, b] = colour.match(/[\\d.]+/g).map(part);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (e) => {
    for (; e; e = e.parentElement) {
      const colour = getComputedStyle(e).backgroundColor;
      if (colour !== "rgba(0, 0, 0, 0)") return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const has_text = (e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
  const faint = [];
  for (const e of document.querySelectorAll("body *")) {
    if (!has_text(e) || !e.getClientRects().length || e.closest("svg")) continue;
    const [a, b] = [light(getComputedStyle(e).color), light(ground(e))].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) faint.push(e.tagName + " " + e.textContent.trim().slice(0, 30));
  }
  return faint;
})()
"""
# Wider than the screen, but for what scrolls in a box of its own.
OUTSIDE = """
[...document.querySelectorAll("body *")].filter((e) => e.getBoundingClientRect().right > innerWidth + 1
  && !e.closest(".scroll, pre, .skip")).map((e) => e.outerHTML.slice(0, 80))
"""

# Texts of tables that nobody sees who doesn't scroll sideways.
UNSEEN = """
[...document.querySelectorAll(".scroll td.text")].filter((e) => e.getClientRects().length
  && e.getBoundingClientRect().right > e.closest(".scroll").getBoundingClientRect().right + 1).map((e) => e.textContent)
"""


@contextmanager
def served(app: Any, pair: tuple[Path, Path] | None = None) -> Iterator[str]:
    """Serve an application on loopback, in a thread."""
    tls: dict[str, Any] = {"ssl_keyfile": str(pair[0]), "ssl_certfile": str(pair[1])} if pair else {}
    options: dict[str, Any] = {"log_config": None, "lifespan": "off", "ws": "none", "http": "h11"}
    server = uvicorn.Server(uvicorn.Config(app, timeout_graceful_shutdown=1, **options, **tls))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"{'https' if pair else 'http'}://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


async def looks_well(tab: Tab, url: str, name: str, looks: tuple[tuple[str, int, str], ...] = LOOKS) -> None:
    folder = os.environ.get("FEDCOMET_SCREENSHOTS", "")
    for look, width, scheme in looks:
        await tab.look(width, scheme)
        await tab.go(url)
        assert await tab.run("document.documentElement.scrollWidth <= innerWidth"), (name, look)
        assert await tab.run(OUTSIDE) == [], (name, look)
        assert await tab.run(UNSEEN) == [], (name, look)
        assert await tab.run(CONTRAST) == [], (name, look)
        if folder:
            await tab.shoot(Path(folder) / f"{name}-{look}.png")


def test_both_dashboards_work_in_a_browser_as_small_as_a_phone(ram_path: Path) -> None:
    """The quick core of what follows: sign in, read, and no complaint of the browser."""
    home, site = coordinator_home(ram_path / "home"), site_home(ram_path / "site")
    with Ledger.open(home.ledger_url) as ledger:
        watched = Watched(home, ledger)
        watched.fill()
        pair = home.server_key, home.server_certificate
        with served(Dashboard(home, ledger).app(), pair) as ours, served(dashboard(site, "token")) as theirs:

            async def visit(tab: Tab) -> None:
                for base, path, name, secret in ((ours, f"/runs/{watched.run}", *ANNA), (theirs, "/", "", "token")):
                    await tab.go(f"{base}/sign-in")
                    await tab.run(SIGN_IN.format(name=name, secret=secret))
                    await tab.until("location.pathname === '/' && document.readyState === 'complete'")
                    await looks_well(tab, base + path, "core", PHONE)
                    await tab.until("document.getElementById('live-told').textContent === 'Kept up to date.'")
                assert tab.said == [], "the browser complains of nothing"

            in_a_tab(visit)


@pytest.mark.slow
def test_a_federation_looks_well_and_is_kept_up_to_date(ram_path: Path) -> None:
    home = coordinator_home(ram_path / "home")
    with Ledger.open(home.ledger_url) as ledger:
        watched = Watched(home, ledger)
        watched.fill()
        app = Dashboard(home, ledger).app()
        with served(app, (home.server_key, home.server_certificate)) as base:

            async def visit(tab: Tab) -> None:
                await tab.go(f"{base}/runs/{watched.run}")
                await looks_well(tab, f"{base}/sign-in", "sign-in")
                await tab.run(SIGN_IN.format(name=ANNA[0], secret=ANNA[1]))
                await tab.until("location.pathname === '/' && document.readyState === 'complete'")
                with ledger.lead():
                    for path, name in (("/", "federation"), ("/runs", "runs"), (f"/runs/{watched.run}", "run"),
                                       ("/events", "events"), (f"/runs/{watched.run}/stop", "stop")):  # fmt: skip
                        await looks_well(tab, base + path, name)
                await kept_up_to_date(tab, base, watched)
                assert tab.said == [], "the browser complains of nothing"

            in_a_tab(visit)


async def kept_up_to_date(tab: Tab, base: str, watched: Watched) -> None:
    """What the ledger hears is on the page soon, in the sentence that is read aloud too, and open parts stay open."""
    await tab.go(f"{base}/runs/{watched.run}")
    await tab.run("document.getElementById('figures').open = true")
    await tab.until("document.getElementById('live-told').textContent === 'Kept up to date.'")
    assert "2 of 3 sites have answered" in await tab.run("document.getElementById('said').textContent")
    journal = watched.ledger.journal(watched.run)
    journal.note_reply(ReplyEntry(7, SITES[2], Status.ACCEPTED, "", "ab" * 32, 9, 9, 2.0, 1.0, 9, 9.0))
    await tab.until("document.getElementById('said').textContent.includes('3 of 3 sites have answered')")
    assert await tab.run("document.getElementById('figures').open")
    journal.enter(7, Phase.AGGREGATED, None, {"train.loss": 2.0})
    await tab.until("document.getElementById('said').textContent.includes('evaluating')")


@pytest.mark.slow
def test_a_site_s_page_looks_well_and_is_kept_up_to_date(ram_path: Path) -> None:
    home = site_home(ram_path / "site")
    with served(dashboard(home, "token")) as base:

        async def visit(tab: Tab) -> None:
            await tab.go(f"{base}/sign-in")
            await tab.run(SIGN_IN.format(name="", secret="token"))
            await tab.until("location.pathname === '/' && document.readyState === 'complete'")
            await looks_well(tab, base, "site")
            await tab.until("document.getElementById('live-told').textContent === 'Kept up to date.'")
            for path in (home.state / "waiting").iterdir():
                path.unlink()
            await tab.until("document.getElementById('said').textContent.includes('0 runs wait')")
            assert tab.said == [], "the browser complains of nothing"

        in_a_tab(visit)
