"""Answers over TLS arrive whole, however they are read."""

import secrets
import socket
import ssl
import threading
from pathlib import Path

import httpx
import pytest
from httpcore._backends.sync import SyncStream
from httpcore._sync.http11 import HTTP11Connection

from client.reads import read_more_at_a_time
from tests.superlink import write_certificates

BODY = secrets.token_bytes(3_000_001)


@pytest.fixture
def reading(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, name in ((SyncStream, "read"), (HTTP11Connection, "READ_NUM_BYTES")):
        monkeypatch.setattr(kind, name, getattr(kind, name))
    read_more_at_a_time()


def serve(folder: Path, sent: bytes) -> int:
    """Answer one request by some bytes of a body, over TLS; gives the port."""
    write_certificates(folder)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem", folder / "server.key")
    listener = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        with listener, context.wrap_socket(listener.accept()[0], server_side=True) as connection:
            connection.recv(1 << 16)
            connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(BODY))
            connection.sendall(sent)

    threading.Thread(target=answer, daemon=True).start()
    port: int = listener.getsockname()[1]
    return port


def ask(folder: Path, port: int) -> bytes:
    verify = ssl.create_default_context(cafile=str(folder / "ca.crt"))
    with httpx.Client(verify=verify, timeout=20.0) as client:
        return client.get(f"https://127.0.0.1:{port}/").content


def test_an_answer_of_many_records_arrives_whole(tmp_path: Path, reading: None) -> None:
    assert ask(tmp_path, serve(tmp_path, BODY)) == BODY


def test_an_answer_that_is_cut_short_is_an_error(tmp_path: Path, reading: None) -> None:
    with pytest.raises(httpx.TransportError):
        ask(tmp_path, serve(tmp_path, BODY[:-1]))
