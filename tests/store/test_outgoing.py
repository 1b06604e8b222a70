"""Where a server's process may connect to."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from mlxkv.errors import UsageError
from mlxkv.store.outgoing import is_public, only_public, operator_hosts
from tests.support import hub_server

FETCH = """
import socket, sys
from mlxkv.store import outgoing, resolve
outgoing.only_public(sys.argv[2:])
try:
    print(resolve.pull(sys.argv[1]))
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "64:ff9b::808:808"])
def test_addresses_of_the_internet_are_public(address):
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
        "0.0.0.0", "224.0.0.1", "255.255.255.255", "::1", "::", "fe80::1", "fe80::1%lo", "fd00::1",
        "::ffff:127.0.0.1", "::ffff:10.0.0.1", "2002:7f00:1::", "64:ff9b::7f00:1", "ff02::1",
        "fd00:ec2::254", "localhost", "",
    ],
)  # fmt: skip
def test_addresses_inside_a_network_are_not_public(address):
    assert not is_public(address)


def test_the_hub_and_the_proxies_of_the_environment_are_the_operators():
    environment = {"HF_ENDPOINT": "http://mirror:8080/hf", "HTTPS_PROXY": "proxy:3128", "HOME": "/"}
    assert operator_hosts(environment) == [("mirror", 8080), ("proxy", 3128)]
    assert operator_hosts({"HF_ENDPOINT": "https://mirror"}) == [("mirror", 443)]
    assert operator_hosts({}) == []


@pytest.mark.parametrize("host", ["", "http://a", "a/b", "a:b", "u@a", "a:99999"])
def test_a_host_that_is_none_is_refused(host):
    with pytest.raises(UsageError, match="HOST:PORT"):
        only_public([host])


def test_a_redirect_into_the_network_is_refused_unless_the_operator_allows_it(tmp_path):
    files = {"org/name": {"config.json": b"{}", "model.safetensors": b"\0" * 16}}
    outer, inner = hub_server.Hub(files, elsewhere=True), hub_server.Hub(files)
    with hub_server.serve(outer), hub_server.serve(inner):
        endpoint, outer.url = outer.url, inner.url
        port = inner.url.rpartition(":")[2]

        def fetch(*allowed: str) -> str:
            command = [sys.executable, "-c", FETCH, "org/name", *allowed]
            env = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf")}
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
            return done.stdout

        refused = fetch()
        assert refused.startswith("DownloadError") and f"port {port} is inside" in refused
        assert outer.requests and not inner.requests
        assert "snapshots" in fetch(f"localhost:{port}") and inner.requests


def test_the_check_is_of_the_address_that_a_name_resolves_to():
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = (
            "import socket; from mlxkv.store.outgoing import only_public; only_public();"
            f"socket.create_connection(('localhost', {server.getsockname()[1]}), 5)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "DownloadError: 127.0.0.1 port" in done.stderr or "DownloadError: ::1" in done.stderr
