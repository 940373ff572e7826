// Keeps what stands in #live up to date: a stream tells that something changed, and the page itself is fetched again.
// Without this script, or when the stream ends, reloading does the same.
"use strict";
(() => {
  const live = document.getElementById("live");
  const said = document.getElementById("said");
  const told = document.getElementById("live-told");
  if (!live || !window.EventSource) return;
  let busy = false, behind = false, ended = false;

  const tell = (text) => { if (told && told.textContent !== text) told.textContent = text; };

  const end = (text) => { ended = true; source.close(); tell(text); };

  const take = (next) => {
    const open = new Set([...live.querySelectorAll("details[open][id]")].map((each) => each.id));
    const at = new Map([...live.querySelectorAll(".scroll")].map((each) => [each.getAttribute("aria-label"), each.scrollLeft]));
    const focused = live.contains(document.activeElement) ? document.activeElement : null;
    const link = focused && focused.getAttribute("href");
    const label = focused && focused.getAttribute("aria-label");
    live.replaceChildren(...next.childNodes);
    live.dataset.latest = next.dataset.latest;
    for (const each of live.querySelectorAll("details[id]")) if (open.has(each.id)) each.open = true;
    for (const each of live.querySelectorAll(".scroll")) each.scrollLeft = at.get(each.getAttribute("aria-label")) || 0;
    if (link || label) {
      const same = (each) => (link ? each.getAttribute("href") === link : each.getAttribute("aria-label") === label);
      const again = [...live.querySelectorAll("a[href], .scroll")].find(same);
      if (again) again.focus({ preventScroll: true });
    }
  };

  const refresh = async () => {
    if (ended) return;
    if (busy || document.hidden) { behind = true; return; }
    busy = true;
    behind = false;
    try {
      const answer = await fetch(location.href, { headers: { "X-Live": "1" }, cache: "no-store" });
      if (answer.redirected) { end("You are signed out: reload to sign in again."); return; }
      if (answer.ok) {
        const page = new DOMParser().parseFromString(await answer.text(), "text/html");
        const next = page.getElementById("live"), words = page.getElementById("said");
        if (next) take(next);
        if (said && words && said.textContent !== words.textContent) said.textContent = words.textContent;
        tell("Kept up to date.");
      }
    } catch {
      tell("The coordinator can't be reached; trying again.");
    } finally {
      setTimeout(() => { busy = false; if (behind) refresh(); }, 1000);
    }
  };

  const source = new EventSource(live.dataset.events);
  source.addEventListener("changed", (event) => {
    if (event.data !== live.dataset.latest) refresh(); else tell("Kept up to date.");
  });
  source.addEventListener("ended", () => end("You are signed out: reload to sign in again."));
  source.addEventListener("error", () => {
    if (ended) return;
    tell(source.readyState === EventSource.CLOSED ? "Not kept up to date any more: reload." : "Connecting again …");
  });
  document.addEventListener("visibilitychange", () => { if (!document.hidden && behind) refresh(); });
})();
