import errno
import os
import re
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from besteffort.engines.reserved_port import ReservedPort
from tests.fake_engine import wait_for
from tests.test_serve import fake_vllm

__all__ = ["fake_vllm"]


def taken(port: int) -> bool:
    """Whether somebody without a claim to it is refused."""
    with socket.socket() as stranger:
        try:
            stranger.bind(("127.0.0.1", port))
        except OSError as error:
            return error.errno == errno.EADDRINUSE
    return False


@pytest.mark.parametrize("option", [socket.SO_REUSEADDR, socket.SO_REUSEPORT])
def test_a_server_can_listen_at_a_reserved_port_again_and_again_and_nobody_else_gets_it(option: int) -> None:
    port = ReservedPort()
    for _ in range(2):
        assert taken(port.number)
        with socket.socket() as server:
            server.setsockopt(socket.SOL_SOCKET, option, 1)
            server.bind(("127.0.0.1", port.number))
            server.listen()
            with (
                socket.create_connection(("127.0.0.1", port.number)) as client,
                server.accept()[0] as accepted,
            ):
                accepted.sendall(b"x")
                assert client.recv(1) == b"x"
    port.close()


def test_a_port_that_is_let_go_is_anybody_s() -> None:
    port = ReservedPort()
    port.close()
    assert not taken(port.number)


def test_no_two_are_the_same() -> None:
    with ExitStack() as stack:
        ports = [ReservedPort() for _ in range(200)]
        for port in ports:
            stack.callback(port.close)
        assert len({port.number for port in ports}) == 200


def test_while_a_server_does_not_listen_yet_its_port_is_kept(tmp_path: Path, fake_vllm: str) -> None:
    command = [
        sys.executable,
        "-m",
        "besteffort",
        "serve",
        str(tmp_path),
        "--policy",
        "random",
        "--port",
        "0",
    ]
    env = {**os.environ, "PYTHONPATH": fake_vllm, "NEVER_READY": "1"}
    with subprocess.Popen(command, env=env) as process, ExitStack() as stack:
        stack.callback(process.terminate)
        tethers = psutil.Process(process.pid).children
        wait_for(lambda: len(tethers()) == 2, 60.0)
        found = [re.search(r"--port (\d+)", " ".join(tether.cmdline())) for tether in tethers()]
        assert [one is not None and taken(int(one[1])) for one in found] == [True, True]
