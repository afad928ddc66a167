"""The proxy configurations of the documentation, in front of a server."""

from __future__ import annotations

import datetime
import json
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from scripted_engine import ScriptedEngine, scripted_server

PAGE = Path(__file__).parents[3] / "docs" / "how-to" / "reverse-proxy.md"
CHAT = "/v1/chat/completions"
TOKENS = 5
SERVER = "127.0.0.1:8000"


def configuration(language: str) -> str:
    (block,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert block.count(SERVER) == 1
    return str(block)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def write_certificate(folder: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "llm.example.com")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    (folder / "fullchain.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    (folder / "privkey.pem").write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))


@contextmanager
def proxy(command: Sequence[str], url: str) -> Iterator[httpx.Client]:
    """Run a proxy in the foreground, and yield a client of it once it answers."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            with httpx.Client(base_url=url, verify=False, trust_env=False, timeout=60) as client:
                end = time.monotonic() + 120
                while True:
                    try:
                        client.get("/")
                        break
                    except httpx.ConnectError:
                        if process.poll() is not None or time.monotonic() > end:
                            process.kill()
                            pytest.fail(process.communicate()[0])
                        time.sleep(0.05)
                yield client
        finally:
            process.terminate()
            process.communicate(timeout=120)


def check(client: httpx.Client, engine: ScriptedEngine) -> None:
    """A stream passes token by token; what is not the API's, and what is too large, does not."""
    body = {"model": "base", "messages": [{"role": "user", "content": "hello"}]}
    assert client.post(CHAT, json=body).status_code == 200
    engine.waits = [0.0] * (TOKENS - 1) + [3600.0]  # the last token never comes
    with client.stream("POST", CHAT, json={**body, "stream": True}) as reply:
        assert reply.status_code == 200
        received = 0
        for line in reply.iter_lines():
            if line.startswith("data: "):
                received += bool(json.loads(line[6:])["choices"][0]["delta"].get("content"))
            if received == TOKENS - 1:
                break
    end = time.monotonic() + 30  # half the time after which the server itself ends the request
    while engine.aborted != 1:
        assert time.monotonic() < end, "the proxy has not passed the disconnect on"
        time.sleep(0.01)
    engine.waits = [0.0]
    for path in ("/ready", "/health", "/metrics"):
        assert client.get(path).status_code == 404
    assert client.get("/v1/models", headers={"a": "x" * 100_000}).status_code in (400, 431)
    assert client.post(CHAT, content=b"x" * 2_000_000).status_code in (413, 502)  # Caddy 2.6 says 502
    assert client.post(CHAT, json=body).status_code == 200


def test_nginx_configuration_of_the_docs_serves_streams(tmp_path: Path) -> None:
    nginx = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if nginx is None:
        pytest.skip("nginx is not installed")
    write_certificate(tmp_path)
    engine, port = ScriptedEngine(), free_port()
    with scripted_server(engine) as server:
        site = configuration("nginx").replace(SERVER, f"127.0.0.1:{server.base_url.port}")
        site = site.replace("listen 443 ssl;", f"listen 127.0.0.1:{port} ssl;")
        (tmp_path / "site.conf").write_text(site.replace("/etc/ssl/llm.example.com", str(tmp_path)))
        folders = "".join(
            f"{kind}_temp_path {tmp_path / kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        main = tmp_path / "nginx.conf"
        main.write_text(
            f"daemon off;\npid {tmp_path / 'pid'};\nerror_log stderr;\nevents {{}}\n"
            f"http {{\naccess_log off;\n{folders}include {tmp_path / 'site.conf'};\n}}\n"
        )
        with proxy([nginx, "-c", str(main), "-e", "stderr"], f"https://127.0.0.1:{port}") as client:
            check(client, engine)


def test_caddy_configuration_of_the_docs_serves_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    caddy = shutil.which("caddy")
    if caddy is None:
        pytest.skip("caddy is not installed")
    for variable in ("HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"):
        monkeypatch.setenv(variable, str(tmp_path))
    file = tmp_path / "Caddyfile"
    file.write_text(configuration("caddyfile"))
    command = [caddy, "validate", "--config", str(file), "--adapter", "caddyfile"]
    validated = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert validated.returncode == 0, validated.stderr
    engine, url = ScriptedEngine(), f"http://127.0.0.1:{free_port()}"
    with scripted_server(engine) as server:
        # No certificate is fetched for a name that is only an example.
        site = file.read_text().replace(SERVER, f"127.0.0.1:{server.base_url.port}")
        site = site.replace("llm.example.com {", f"{url} {{").replace("{\n", "{\n\tadmin off\n", 1)
        file.write_text(site)
        with proxy([caddy, "run", "--config", str(file), "--adapter", "caddyfile"], url) as client:
            check(client, engine)
