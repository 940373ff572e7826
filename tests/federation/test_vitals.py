"""Claims about how a daemon tells that it lives, and what its log says."""

import json
import logging
import os
import socket
import stat
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from federation import logs
from federation.vitals import Vitals, notify
from tokenizer.errors import ConfigError


def get(vitals: Vitals, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{vitals.port}{path}") as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_health_and_metrics_are_told_on_loopback() -> None:
    state = [True]
    vitals = Vitals(0, lambda: (state[0], {"node": "waiting"}), "fedcomet_site")
    try:
        vitals.set("healthy", 1, "Whether all is well")
        vitals.set("site_online", 1, "Who is there", site="icu")
        vitals.set("site_online", 0, "Who is there", site="ward")
        assert get(vitals, "/health") == (200, '{"healthy": true, "node": "waiting"}')
        state[0] = False
        assert get(vitals, "/health")[0] == 503
        status, text = get(vitals, "/metrics")
        assert status == 200
        assert "# HELP fedcomet_site_healthy Whether all is well" in text
        assert 'fedcomet_site_site_online{site="ward"} 0.0' in text
        vitals.drop("site_online", site="ward")
        text = get(vitals, "/metrics")[1]
        assert 'site="ward"' not in text
        assert 'fedcomet_site_site_online{site="icu"} 1.0' in text
        assert get(vitals, "/")[0] == 404
        with pytest.raises(ConfigError, match="can't be used"):
            Vitals(vitals.port, lambda: (True, {}), "x")
    finally:
        vitals.close()


def test_systemd_is_told_if_it_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notify("READY=1")
    for address in (str(tmp_path / "notify"), "\0fedcomet-test-" + str(os.getpid())):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
            listener.bind(address)
            monkeypatch.setenv("NOTIFY_SOCKET", address.replace("\0", "@"))
            notify("READY=1")
            assert listener.recv(100) == b"READY=1"


@pytest.fixture
def quiet() -> Iterator[None]:
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    yield
    for handler in list(root.handlers):
        if handler not in before:
            root.removeHandler(handler)
            handler.close()
    for handler in before:
        if handler not in root.handlers:
            root.addHandler(handler)
    root.setLevel(level)


@pytest.mark.usefixtures("quiet")
def test_a_log_is_json_for_its_owner_only_and_does_not_grow_without_end(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        logs.to_files(tmp_path / "logs", "site", most_bytes=2000, keep=2)
        for number in range(100):
            logging.getLogger("program.supernode").info("line %d", number)
        logging.getLogger("client.daemon").warning('a "quote"\nand more')
    finally:
        os.umask(before)
    files = sorted((tmp_path / "logs").iterdir())
    assert [file.name for file in files] == ["site.jsonl", "site.jsonl.1", "site.jsonl.2"]
    assert all(file.stat().st_size <= 2000 for file in files)
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in files)
    last = [json.loads(line) for line in files[0].read_text().splitlines()]
    assert last[-1]["message"] == 'a "quote"\nand more'
    assert (last[-1]["program"], last[-1]["level"]) == ("daemon", "warning")
    assert (last[-2]["program"], last[-2]["message"]) == ("supernode", "line 99")
