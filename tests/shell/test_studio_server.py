"""The studio's server: what the page does not ask for is refused, and no file of the machine is readable through it."""

from __future__ import annotations

import http.client
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason="the studio's page needs the extra studio")

from dpm_scales.studio import server  # noqa: E402
from dpm_scales.studio.run import address, prepare, serving  # noqa: E402
from support.oracles import refused  # noqa: E402


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """The port of a running studio without models."""
    with server.listen("127.0.0.1", 0) as listening, serving(prepare([], {}), listening, "127.0.0.1") as serves:
        thread = threading.Thread(target=serves.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        assert address(listening) == f"http://127.0.0.1:{listening.getsockname()[1]}"
        yield listening.getsockname()[1]
        serves.should_exit = True
        thread.join(10)


def ask(port: int, path: str, method: str = "GET", body: bytes | None = None, **headers: str) -> tuple[int, str, bytes]:
    """Return the status, the policy and the body of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, path, body, {key.replace("_", "-"): value for key, value in headers.items()})
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, answer.headers.get("content-security-policy", ""), content


def test_the_page_is_served_with_a_policy_that_lets_nothing_be_fetched(port: int) -> None:
    status, policy, content = ask(port, "/")
    assert status == 200 and b"dpm_scales studio" in content
    assert "default-src 'self'" in policy and "http" not in policy
    config = json.loads(ask(port, "/config")[2])
    assert config["analytics_enabled"] is False and config["max_file_size"] == server.MAX_BYTES
    assert not config.get("is_space") and "googleapis" not in json.dumps(config)


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=/proc/self/environ",
        f"/gradio_api/file={Path(__file__)}",
        "/gradio_api/file=../../etc/passwd",
        "/gradio_api/file=http://example.org/",
        "/gradio_api/file=https://127.0.0.1/",
    ],
)
def test_files_of_the_machine_and_addresses_are_not_served(port: int, path: str) -> None:
    status, _, content = ask(port, path)
    assert status == 403 and content == b"refused: no file of the page\n"


@pytest.mark.parametrize(
    "path", ["/docs", "/gradio_api/proxy=http://example.org", "/gradio_api/info", "/monitoring", "/x"]
)
def test_paths_that_the_page_does_not_use_do_not_exist(port: int, path: str) -> None:
    assert ask(port, path)[0] == 404


def test_other_hosts_origins_and_methods_are_refused(port: int) -> None:
    assert ask(port, "/", Host="evil.example")[0] == 421
    assert ask(port, "/", Host=f"localhost:{port}")[0] == 200
    assert ask(port, "/config", Origin="https://evil.example")[0] == 403
    assert ask(port, "/config", Origin=f"http://127.0.0.1:{port}")[0] == 200
    assert ask(port, "/config", "DELETE")[0] == 405


def test_requests_that_name_files_which_were_not_uploaded_are_refused(port: int) -> None:
    for path in ("/etc/passwd", "http://127.0.0.1/x", str(Path(__file__)), 3):
        data = {"data": [{"path": path, "meta": {"_type": "gradio.FileData"}}, 256], "fn_index": 1, "session_hash": "a"}
        status, _, content = ask(port, "/gradio_api/queue/join", "POST", json.dumps(data).encode())
        assert (status, content) == (403, b"refused: a file that was not uploaded\n")
    assert ask(port, "/gradio_api/queue/join", "POST", b"[" * 100_000)[0] == 403


def test_larger_bodies_are_refused_with_and_without_a_length(port: int) -> None:
    assert ask(port, "/gradio_api/upload", "POST", None, Content_Length=str(10**9))[0] == 413
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.putrequest("POST", "/gradio_api/queue/join")
    connection.putheader("Transfer-Encoding", "chunked")
    connection.endheaders()
    part = b"x" * 2**20
    try:
        for _ in range(server.MAX_BODY // len(part) + 2):
            connection.send(f"{len(part):x}\r\n".encode() + part + b"\r\n")
    except (BrokenPipeError, ConnectionResetError):  # refused before all was sent
        pass
    else:
        assert connection.getresponse().status == 413
    connection.close()


def test_uploads_lie_in_a_private_folder_that_goes_with_the_server() -> None:
    before = dict(os.environ)
    with server.private_folder() as folder:
        assert os.environ["GRADIO_TEMP_DIR"] == str(folder) and folder.stat().st_mode & 0o077 == 0
        assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    assert not folder.exists() and dict(os.environ) == before


def test_a_port_that_is_taken_and_a_host_that_is_none_are_refused() -> None:
    with server.listen("127.0.0.1", 0) as listening:
        taken = listening.getsockname()[1]
        refused(lambda: server.listen("127.0.0.1", taken), f"port={taken}", "port=0 for any free one")
    refused(lambda: server.listen("no.such.host.invalid", 0), "host=no.such.host.invalid")
    assert server.is_loopback("localhost") and server.is_loopback("127.0.0.2") and server.is_loopback("::1")
    assert not server.is_loopback("0.0.0.0") and not server.is_loopback("example.org")
