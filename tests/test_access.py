"""Who and what is not let in: bad starts, keys, TLS, addresses with many connections, clients that do not read."""

import os
import re
import socket
import ssl
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_openpi
import websockets.sync.client
from live_server import DEADLINE_S, KEY, until
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from websockets.exceptions import InvalidMessage, InvalidStatus

from safe_pruner_jax.cli import main as cli
from safe_pruner_jax.serving import Access, ServerError, pack, running
from safe_pruner_jax.serving.access import is_loopback, read_key, tls_context
from safe_pruner_jax.serving.episodes import MAGIC, EpisodeError, read_episode

DATA = Path(__file__).parent / "data"


# --- bad starts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--serving.tls-cert", "/no/such.pem", "--serving.tls-key", "/no/such.pem"], "give PEM files"),
        (["--serving.tls-cert", str(DATA / "tls_cert.pem")], "expected both a certificate and its private key"),
        (["--serving.api-key-file", "/no/such/key"], "API key cannot be read"),
        (["--host", "0.0.0.0"], "expected an API key to listen on 0.0.0.0"),
        (["--serving.max-queue", "0"], "max_queue: expected at least 1"),
        (["policy:checkpoint", "--policy.config=pi05_libro", "--policy.dir=x"], "did you mean pi05_libero"),
        (
            ["policy:checkpoint", "--policy.config=pi05_libero", f"--policy.dir={DATA / 'ckpt_tiny_pi05'}"],
            "does not fit",
        ),
    ],
)
def test_a_bad_start_is_told_and_ends_with_exit_code_2(argv, says, capsys, monkeypatch):
    monkeypatch.delenv("OPENPI_API_KEY", raising=False)
    assert cli.main(["serve", *argv]) == 2
    told = capsys.readouterr().err
    assert says in told and "Traceback" not in told and "openpi serve: " in told


def test_a_port_in_use_ends_the_process_with_exit_code_2(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        command = [sys.executable, tiny_openpi.__file__, "serve", *tiny_openpi.policy(), *tiny_openpi.MODEL]
        command += ["--port", str(taken.getsockname()[1])]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=DEADLINE_S)
    assert result.returncode == 2
    assert re.search(r"openpi serve: cannot bind .*try another port", result.stderr.splitlines()[-1])


def test_what_is_no_episode_is_one_line_and_exit_code_2(tmp_path, capsys):
    for name, content, says in (
        ("other", b"PK", "another file"),
        ("version", MAGIC.replace(b"1", b"9"), "another version"),
        ("empty", MAGIC, "nothing was recorded"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(EpisodeError, match=says):
            read_episode(tmp_path / name)
        assert cli.main(["inspect", str(tmp_path / name)]) == 2
        assert says in capsys.readouterr().err.splitlines()[-1]
    assert cli.main(["inspect", str(tmp_path / "absent")]) == 2


# --- access ------------------------------------------------------------------------------------------------


class Echo:
    """Serves without a model."""

    def __init__(self):
        self.metadata = {}

    def warmup(self): ...

    def session(self):
        return self

    def infer(self, request):
        return {"echo": request}


def test_tls_with_openpis_client(tmp_path, monkeypatch):
    context = tls_context(DATA / "tls_cert.pem", DATA / "tls_key.pem")
    with running(Echo(), access=Access(key=KEY, tls=context)) as server:
        monkeypatch.setenv("SSL_CERT_FILE", str(DATA / "tls_cert.pem"))
        client = WebsocketClientPolicy(f"wss://localhost:{server.port}", api_key=KEY)
        assert client.infer({"i": 1})["echo"] == {"i": 1}
        client._ws.close()
        with pytest.raises((OSError, InvalidMessage)):
            websockets.sync.client.connect(f"ws://localhost:{server.port}", open_timeout=60)
        checking = ssl.create_default_context()
        checking.load_verify_locations(DATA / "tls_cert.pem")
        plain = socket.create_connection(("127.0.0.1", server.port))
        with checking.wrap_socket(plain, server_hostname="localhost") as secure:
            assert secure.version() in ("TLSv1.2", "TLSv1.3")


def test_connections_of_one_address_are_limited():
    with running(Echo(), access=Access(per_address=2)) as server:
        address = f"ws://127.0.0.1:{server.port}"
        with websockets.sync.client.connect(address) as one, websockets.sync.client.connect(address):
            with pytest.raises(InvalidStatus) as refused:
                websockets.sync.client.connect(address)
            assert refused.value.response.status_code == 429
            one.recv()
        until(lambda: server._open.total() == 0)
        with websockets.sync.client.connect(address) as again:
            again.recv()


def test_a_client_that_takes_no_replies_is_cut_off_and_nobody_else_notices():
    with running(Echo(), send_s=0.3) as server, socket.create_connection(("127.0.0.1", server.port)) as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        key = b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n"
        slow.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n" + key + b"\r\n")
        message = pack({"x": np.zeros(2**22, np.uint8)})
        frame = b"\x82\xff" + len(message).to_bytes(8, "big") + b"\0\0\0\0" + message
        slow.settimeout(DEADLINE_S)
        slow.sendall(frame * 2)
        other = WebsocketClientPolicy("127.0.0.1", server.port)
        until(lambda: server.metrics.errors.labels("slow_reader")._value.get() == 1)
        assert other.infer({"i": 1})["echo"] == {"i": 1}
        other._ws.close()


def test_a_key_comes_from_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENPI_API_KEY", "from-the-environment")
    assert read_key(None) == "from-the-environment"
    (tmp_path / "key").write_text("from-the-file\n")
    assert read_key(tmp_path / "key") == "from-the-file"
    for bad in ("", "short", "has a space", "ключ-ключ-ключ"):
        (tmp_path / "key").write_text(bad)
        with pytest.raises(ServerError, match="at least 8 printable ASCII"):
            read_key(tmp_path / "key")
    monkeypatch.delenv("OPENPI_API_KEY")
    assert read_key(None) is None


def test_beyond_this_machine_a_key_is_needed():
    for host in ("0.0.0.0", "::", "192.168.1.2", "robot.lan", ""):
        assert not is_loopback(host)
        with pytest.raises(ServerError, match="expected an API key"):
            Access().check(host)
        Access(key=KEY).check(host)
        Access(insecure=True).check(host)
    Access().check("127.0.0.1")


def test_only_the_exact_key_is_admitted():
    access = Access(key=KEY)
    assert access.admits(f"Api-Key {KEY}")
    for wrong in (None, "", KEY, f"Bearer {KEY}", f"Api-Key {KEY} ", f"api-key {KEY}", "Api-Key ", "Api-Key \udcff"):
        assert not access.admits(wrong)
