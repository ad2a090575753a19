"""The processes of one run meet; other runs and other programs are kept out."""

import contextlib
import os
import re
import selectors
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from jaxcl.host import meeting, ports
from jaxcl.host.meeting import INVITATION_FILE, Meeting, meet
from jaxcl.host.paths import as_path
from jaxcl.host.ports import guard_port, listen, split_address
from tests import buckets

ROOT = Path(__file__).parents[2]


@pytest.fixture
def pool():
    """Threads that act as processes."""
    with ThreadPoolExecutor() as threads:
        yield threads


@pytest.fixture
def hurried(monkeypatch):
    """Shorten the timeouts for tests."""
    monkeypatch.setattr(meeting, "MEETING_SECONDS", 3)
    monkeypatch.setattr(meeting, "GRACE_SECONDS", 0.5)
    monkeypatch.setattr(meeting, "_SECONDS_BETWEEN_TRIES", 0.05)


def met(workdir: Path, coordinator: str, number: int, count: int, **more) -> Meeting:
    given = {"num_processes": count, "process_id": number, "bind": None, **more}
    with meet(workdir, coordinator, **given) as found:
        return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def error_of(future: Future) -> str:
    with pytest.raises(ValueError) as raised:  # noqa: PT011 # callers look at the message
        future.result(timeout=20)
    return str(raised.value)


def test_processes_meet_on_an_object_store(pool, tmp_path, monkeypatch, hurried):
    buckets.install(monkeypatch, tmp_path)
    workdir = as_path("gs://bucket/runs/a")
    meetings = [pool.submit(met, workdir, "127.0.0.1:0", number, 2) for number in range(2)]
    assert len({future.result(timeout=20).address for future in meetings}) == 1
    assert (f"bucket/runs/a/{INVITATION_FILE}", "wb") in buckets.Buckets.opened
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("port", ["free", "given"])
def test_processes_meet_whatever_their_path_of_the_workdir_is(pool, tmp_path, port):
    (tmp_path / "mount").symlink_to(tmp_path / "disk")
    (tmp_path / "disk").mkdir()
    coordinator = f"127.0.0.1:{free_port() if port == 'given' else 0}"
    workdirs = [tmp_path / "disk" / "run", tmp_path / "mount" / "run", tmp_path / "disk" / "run"]
    order = (2, 0, 1)
    futures = [pool.submit(met, workdirs[n], coordinator, n, 3) for n in order]
    found = dict(zip(order, (future.result(timeout=20) for future in futures), strict=True))
    assert len({one.address for one in found.values()}) == 1
    assert found[0].bind_address == found[0].address
    assert found[1].bind_address is None
    assert found[0].address == coordinator or port == "free"
    assert list((tmp_path / "disk").iterdir()) == [], "a meeting leaves nothing"


def test_an_existing_workdir_keeps_its_files(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    met(tmp_path, "127.0.0.1:0", 0, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_the_port_is_kept_until_the_coordinator_has_it(tmp_path):
    with meet(tmp_path, "127.0.0.1:0", num_processes=1, process_id=0, bind=None) as found:
        with pytest.raises(ValueError, match=f"cannot listen at {found.address}"):
            listen(found.address)
        with socket.socket() as coordinator:  # as JAX's coordinator does
            for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
                coordinator.setsockopt(socket.SOL_SOCKET, option, 1)
            coordinator.bind(("127.0.0.1", split_address(found.address)[1]))
            coordinator.listen()
    listen(found.address).close()


def test_a_port_in_use_is_one_line_and_its_program_is_left_alone(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ValueError, match=rf"cannot listen at 127\.0\.0\.1:{port} \(Address a"):
            met(tmp_path / "run", f"127.0.0.1:{port}", 0, 2)
        server.settimeout(0.2)
        with pytest.raises(TimeoutError):
            server.accept()
    assert list(tmp_path.iterdir()) == []


def test_two_runs_that_start_on_one_port_exchange_no_process(pool, hurried, tmp_path):
    coordinator = f"127.0.0.1:{free_port()}"
    first = pool.submit(met, tmp_path / "a", coordinator, 0, 2)
    while not (tmp_path / "a" / INVITATION_FILE).exists():
        time.sleep(0.01)
    strangers = [pool.submit(met, tmp_path / "b", coordinator, number, 2) for number in (0, 1)]
    assert "Address already in use" in error_of(strangers[0])
    time.sleep(0.2)
    second = pool.submit(met, tmp_path / "a", coordinator, 1, 2)
    assert first.result(timeout=20).address == second.result(timeout=20).address
    strangers[1].exception(timeout=20)
    assert isinstance(strangers[1].exception(), ValueError)


def test_a_process_whose_run_found_the_port_in_use_does_not_wait_long(pool, hurried, tmp_path):
    coordinator = f"127.0.0.1:{free_port()}"
    first = pool.submit(met, tmp_path / "a", coordinator, 0, 2)
    while not (tmp_path / "a" / INVITATION_FILE).exists():
        time.sleep(0.01)
    stranger = pool.submit(met, tmp_path / "b", coordinator, 1, 2)
    time.sleep(0.2)
    pool.submit(met, tmp_path / "a", coordinator, 1, 2).result(timeout=20)
    first.result(timeout=20)  # the port is free now, and no process connects
    assert f"{coordinator} belongs to the run in {tmp_path / 'a'}" in error_of(stranger)


def test_different_workdirs_are_named_on_both_sides(pool, hurried, tmp_path):
    coordinator = f"127.0.0.1:{free_port()}"
    futures = [pool.submit(met, tmp_path / name, coordinator, n, 2) for n, name in enumerate("ab")]
    for future in futures:
        message = error_of(future)
        assert str(tmp_path / "a") in message
        assert str(tmp_path / "b") in message
        assert "start all processes of a run with the same --workdir" in message
    assert list(tmp_path.iterdir()) == []


def test_an_invitation_of_a_start_that_was_killed_is_overcome(pool, hurried, tmp_path):
    port = free_port()
    (tmp_path / INVITATION_FILE).write_text(f'{{"port": {port}, "token": "old"}}')
    second = pool.submit(met, tmp_path, f"127.0.0.1:{port}", 1, 2)
    time.sleep(0.3)
    first = pool.submit(met, tmp_path, f"127.0.0.1:{port}", 0, 2)
    assert first.result(timeout=20).address == second.result(timeout=20).address


@pytest.mark.parametrize("content", ["", "[]", '{"port": "x"}', "\0"])
def test_a_damaged_invitation_is_overcome(pool, hurried, tmp_path, content):
    (tmp_path / INVITATION_FILE).write_text(content)
    second = pool.submit(met, tmp_path, "127.0.0.1:0", 1, 2)
    time.sleep(0.2)
    first = pool.submit(met, tmp_path, "127.0.0.1:0", 0, 2)
    assert first.result(timeout=20).address == second.result(timeout=20).address


def test_a_process_that_never_connects_is_named(pool, hurried, tmp_path):
    coordinator = f"127.0.0.1:{free_port()}"
    futures = [pool.submit(met, tmp_path / "run", coordinator, number, 4) for number in (0, 2)]
    assert "of 4 processes, 1, 3 did not connect within 3 s" in error_of(futures[0])
    assert re.search(r"process 0 did not appear in .*run within 3 s", error_of(futures[1]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "count", "message"),
    [
        (1, 3, "there are two processes with number 1; give each process its own number"),
        (2, 4, "process 0 is one of 3 processes, process 2 one of 4"),
    ],
)
def test_a_process_that_does_not_fit_is_refused_and_the_others_meet(
    pool, hurried, tmp_path, capsys, number, count, message
):
    coordinator = f"127.0.0.1:{free_port()}"
    first, second = (pool.submit(met, tmp_path, coordinator, n, 3) for n in (0, 1))
    time.sleep(0.3)
    assert message in error_of(pool.submit(met, tmp_path, coordinator, number, count))
    third = pool.submit(met, tmp_path, coordinator, 2, 3)
    assert len({one.result(timeout=20).address for one in (first, second, third)}) == 1
    assert "a process was refused: " in capsys.readouterr().err


class _ArrivalsFirst(selectors.DefaultSelector):
    """Return a closed connection together with the next arrival, the arrival first."""

    def select(self, timeout=None):
        deadline = time.monotonic() + 1
        events = []
        while time.monotonic() < deadline and all(key.data is not None for key, _ in events):
            events = super().select(timeout=0.05)
        return sorted(events, key=lambda event: event[0].data is not None)


@pytest.mark.parametrize("selector", [selectors.DefaultSelector, _ArrivalsFirst])
def test_a_process_that_ends_while_it_waits_may_connect_again(
    pool, hurried, tmp_path, monkeypatch, selector
):
    monkeypatch.setattr(meeting.selectors, "DefaultSelector", selector)
    first = pool.submit(met, tmp_path, "127.0.0.1:0", 0, 3)
    while not (invitation := meeting._read_invitation(tmp_path)):
        time.sleep(0.01)
    with socket.create_connection(("127.0.0.1", invitation["port"])) as one:
        asked = {"process_id": 1, "num_processes": 3, "token": invitation["token"]}
        meeting._send(one, asked)
        assert meeting._read(one) == {"welcome": 1}
    second = pool.submit(met, tmp_path, "127.0.0.1:0", 1, 3)
    time.sleep(0.5)  # so that number 1 arrives before number 2
    third = pool.submit(met, tmp_path, "127.0.0.1:0", 2, 3)
    assert len({one.result(timeout=20).address for one in (first, second, third)}) == 1


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b"{}\n", b"x" * 100_000])
def test_other_programs_do_not_disturb_a_meeting(pool, hurried, tmp_path, said):
    first = pool.submit(met, tmp_path, "127.0.0.1:0", 0, 2)
    while not (invitation := meeting._read_invitation(tmp_path)):
        time.sleep(0.01)
    with socket.create_connection(("127.0.0.1", invitation["port"])) as one:
        with contextlib.suppress(OSError):  # the connection may be cut off
            one.sendall(said)
            one.shutdown(socket.SHUT_WR)
        second = pool.submit(met, tmp_path, "127.0.0.1:0", 1, 2)
        assert first.result(timeout=20).address == second.result(timeout=20).address


def test_another_program_at_the_port_is_not_taken_for_process_0(pool, hurried, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def greet():
            with contextlib.suppress(OSError):
                while True:
                    with server.accept()[0] as connection:
                        connection.sendall(b"220 mail\r\n")

        thread = threading.Thread(target=greet, daemon=True)
        thread.start()
        message = error_of(pool.submit(met, tmp_path, f"127.0.0.1:{port}", 1, 2))
        server.shutdown(socket.SHUT_RDWR)
    assert f"127.0.0.1:{port} belongs to another run or program" in message


@pytest.mark.parametrize("address", ["host", ":1", "host:", "host:x", "host:65536", "host:-1"])
def test_an_invalid_address_is_named(address):
    with pytest.raises(ValueError, match=re.escape(f"{address!r} is not HOST:PORT")):
        split_address(address)
    assert split_address("[::1]:80") == ("[::1]", 80)


def test_a_host_that_is_unknown_or_elsewhere_is_named():
    with pytest.raises(ValueError, match=r"the coordinator's host 'no\.invalid' is unknown here"):
        listen("no.invalid:0")
    with pytest.raises(ValueError, match=r"process 0 cannot listen at 192\.0\.2\.1:"):
        listen(f"192.0.2.1:{free_port()}")  # an address reserved for documentation


@pytest.mark.parametrize(
    ("host", "address"),
    [("127.0.0.1", "127.0.0.1"), ("localhost", "127.0.0.1"), ("machine", "0.0.0.0")],
)
def test_the_coordinator_listens_at_the_address_that_is_given(monkeypatch, capsys, host, address):
    known = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))]
    monkeypatch.setattr(ports.socket, "getaddrinfo", lambda *_, **__: known)
    with contextlib.closing(listen(f"{host}:0")) as listener:
        assert listener.getsockname()[0] == address
    warned = "warning: machine is 127.0.0.1 here" in capsys.readouterr().err
    assert warned == (address == "0.0.0.0")


def test_an_address_to_listen_at_may_be_given_separately(tmp_path):
    port = free_port()
    found = met(tmp_path, f"machine:{port}", 0, 1, bind="127.0.0.1:0")
    assert found.address == f"machine:{port}"
    assert re.fullmatch(r"127\.0\.0\.1:\d+", found.bind_address)


def test_without_shared_ports_there_is_no_guard(monkeypatch):
    monkeypatch.delattr(socket, "SO_REUSEPORT")
    with contextlib.closing(listen("127.0.0.1:0")) as listener, guard_port(listener):
        address = "{}:{}".format(*listener.getsockname())
        listener.close()
        listen(address).close()


ALONE = """
import sys
from pathlib import Path
from jaxcl.host.processes import start_processes
start_processes(coordinator=sys.argv[1], num_processes=1, process_id=0, workdir=Path(sys.argv[2]))
print("met", flush=True)
input()
"""


def listening_addresses(port: int) -> set[str]:
    """The hexadecimal addresses with a listener at a port."""
    lines = [
        line.split()
        for name in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    return {
        line[1].partition(":")[0]
        for line in lines
        if line[3] == "0A" and int(line[1].partition(":")[2], 16) == port
    }


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_jax_listens_at_the_given_address_alone_and_a_second_run_leaves_it_alone(tmp_path):
    port = free_port()
    command = [sys.executable, "-c", ALONE, f"127.0.0.1:{port}"]
    options = {
        "cwd": ROOT,
        "env": os.environ | {"JAX_PLATFORMS": "cpu"},
        "text": True,
        "stdin": subprocess.PIPE,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
    }
    with subprocess.Popen([*command, str(tmp_path / "a")], **options) as first:
        assert first.stdout.readline() == "met\n", first.stderr.read()
        assert listening_addresses(port) <= {"0100007F", "0000000000000000FFFF00000100007F"}
        assert listening_addresses(port)
        second = subprocess.run(
            [*command, str(tmp_path / "b")], **options | {"stdin": None}, timeout=60, check=False
        )
        assert "Address already in use" in second.stderr
        assert first.poll() is None
        first.communicate("\n", timeout=60)
    assert first.returncode == 0
