"""`kvlite fleet` with real processes on the shipped model: moves, deaths, signals; and what a wrong command says."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from typer.testing import CliRunner

from kvlite import Engine, SamplingParams
from kvlite.cli import app
from tests.e2e.conftest import DEADLINE_S
from tests.fleet.real_fleet import LONG, SHORT, Answer, FleetServer, is_running, send, until_gone

Check = Callable[[Answer], None]


@pytest.fixture(scope="module")
def check_unmoved() -> Iterator[Check]:
    """Compares with what one engine of its own says, as far as the answer was read."""
    with Engine(None, deterministic=True, kv_cache_bytes=32 << 20, max_num_seqs=16, num_threads=1) as engine:

        def check(answer: Answer) -> None:
            params = SamplingParams(
                max_tokens=len(answer.ids), ignore_eos=True, temperature=LONG["temperature"], seed=LONG["seed"]
            )
            assert answer.ids == list(engine.generate(LONG["prompt"], params).token_ids)

        yield check


@pytest.fixture
def start() -> Iterator[Callable[..., FleetServer]]:
    servers: list[FleetServer] = []

    def make(*arguments: str) -> FleetServer:
        servers.append(FleetServer(*arguments))
        servers[-1].wait_until_ready()
        return servers[-1]

    yield make
    for server in servers:
        server.stop()


@pytest.fixture(scope="module")
def fleet() -> Iterator[FleetServer]:
    server = FleetServer("--silence-s", "2")
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()


def begun(server: FleetServer, **body: Any) -> tuple[dict[int, int], Answer, int]:
    """Process ids, an answer under way, and the engine that has it."""
    pids = server.until_up()
    answer = Answer(server, body)
    answer.read(5)
    request = server.request(answer.name)
    assert request is not None, "the request ended before it could be looked at"
    return pids, answer, request["engine"]


def test_a_request_that_the_command_moves_has_the_tokens_of_an_unmoved_one(fleet: FleetServer, check_unmoved: Check):
    _, answer, source = begun(fleet)
    shown = fleet.command("status")
    assert shown.returncode == 0 and answer.name in shown.stdout and "engine 1  up" in shown.stdout
    to = 1 - source
    moved = fleet.command("move", answer.name, str(to))
    assert moved.returncode == 0, moved.stderr
    assert f"engine {source} -> {to} by" in moved.stdout and ": moved" in moved.stdout
    answer.read(len(answer.ids) + 5)
    again = fleet.command("move", answer.name, str(to))
    assert again.returncode == 1 and "already" in again.stderr
    for how in ("copy", "replay", "copy", "copy", "replay"):
        to = 1 - to
        status, report = fleet.call("POST", "/v1/fleet/move", {"request": answer.name, "engine": to, "how": how})
        assert (status, report["result"], report["how"]) == (200, "moved", how), report
        assert report["gap_s"] > 0
        answer.read(len(answer.ids) + 5)
        request = fleet.request(answer.name)
        assert request is not None and (request["engine"], request["replays"]) == (to, 0)
    answer.leave()
    check_unmoved(answer)


def test_an_answer_with_everything_asked_is_the_same_whether_it_moves_or_not(fleet: FleetServer):
    fleet.until_up()
    body = {
        "prompt": LONG["prompt"], "n": 3, "max_tokens": 60, "logprobs": 2, "seed": 3, "temperature": 1.0,
        "repetition_penalty": 1.2, "min_tokens": 4, "stop": ["a", "zz"], "ignore_eos": True,
    }  # fmt: skip
    _, unmoved = fleet.call("POST", "/v1/completions", body | {"stop": ["zz"]})
    stop = unmoved["choices"][0]["text"][-40:-36]
    body["stop"] = [stop, "zz"]
    _, unmoved = fleet.call("POST", "/v1/completions", body)
    assert unmoved["choices"][0]["stop_reason"] == stop
    with ThreadPoolExecutor(1) as pool:
        moved = pool.submit(fleet.call, "POST", "/v1/completions", body)
        num_moves = 0
        while not moved.done():
            requests = [request for engine in fleet.status()["engines"] for request in engine["requests"]]
            for request in requests:
                order = {"request": request["name"], "engine": 1 - request["engine"]}
                status, report = fleet.call("POST", "/v1/fleet/move", order)
                num_moves += status == 200 and report["result"] == "moved"
        assert num_moves > 0
        assert moved.result()[1]["choices"] == unmoved["choices"]


def test_kill_9_of_its_engine_loses_no_token_of_a_stream_and_the_engine_comes_back(
    fleet: FleetServer, check_unmoved: Check
):
    pids, answer, source = begun(fleet, **SHORT)
    send(pids[source], signal.SIGKILL)
    answer.read()
    assert (len(answer.ids), answer.finish, answer.error) == (SHORT["max_tokens"], "length", None)
    check_unmoved(answer)
    assert fleet.until_up()[source] != pids[source]


def test_a_stopped_engine_is_given_up_for_dead_and_its_stream_goes_on(fleet: FleetServer, check_unmoved: Check):
    pids, answer, source = begun(fleet, **SHORT)
    send(pids[source], signal.SIGSTOP)
    answer.read()
    assert (len(answer.ids), answer.finish, answer.error) == (SHORT["max_tokens"], "length", None)
    check_unmoved(answer)
    fleet.until_up()
    until_gone([pids[source]])


def test_a_client_that_leaves_frees_its_request_wherever_it_has_moved(fleet: FleetServer):
    _, answer, source = begun(fleet)
    order = {"request": answer.name, "engine": 1 - source}
    assert fleet.call("POST", "/v1/fleet/move", order)[1]["result"] == "moved"
    answer.leave()
    fleet.until(lambda status: not any(engine["requests"] for engine in status["engines"]))
    fleet.wait_until_idle()


def test_sigterm_lets_a_running_stream_finish_and_leaves_no_process(fleet: FleetServer, check_unmoved: Check):
    """The last one with this server."""
    pids, answer, _ = begun(fleet, **SHORT)
    fleet.process.send_signal(signal.SIGTERM)
    answer.read()
    assert (len(answer.ids), answer.finish, answer.error) == (SHORT["max_tokens"], "length", None)
    check_unmoved(answer)
    assert fleet.process.wait(DEADLINE_S) == 0
    until_gone(list(pids.values()))
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", fleet.port))
    assert "Traceback" not in fleet.said


def test_a_zombie_that_wakes_up_changes_no_stream_and_a_second_ctrl_c_aborts(start, check_unmoved: Check):
    server = start("--silence-s", "2", "--restarts", "0", "--drain-s", "3600")
    pids, answer, source = begun(server)
    send(pids[source], signal.SIGSTOP)
    server.until(lambda status: status["engines"][source]["state"] == "given up")
    answer.read(len(answer.ids) + 5)
    send(pids[source], signal.SIGCONT)
    until_gone([pids[source]])
    answer.read(len(answer.ids) + 5)
    check_unmoved(answer)
    server.process.send_signal(signal.SIGINT)
    with pytest.raises(OSError):
        while True:
            socket.create_connection(("127.0.0.1", server.port), timeout=DEADLINE_S).close()
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(DEADLINE_S) == 1
    until_gone(list(pids.values()))
    assert "Traceback" not in server.said
    answer.read()
    assert (answer.finish, answer.error["code"]) == ("cancelled", "shutting_down")


def test_workers_do_not_outlive_a_front_end_that_is_killed(start):
    server = start("--engines", "1")
    pids = server.until_up()
    assert all(map(is_running, pids.values()))
    server.process.kill()
    until_gone(list(pids.values()))


def invoke(*arguments: str):
    return CliRunner().invoke(app, ["fleet", *arguments], env={"COLUMNS": "100"})


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["serve", "--engines", "0"], "--engines: 0 is out of range: must be 1 to 64"),
        (["serve", "--engines", "65"], "--engines: 65 is out of range"),
        (["serve", "--transport", "carrier"], "--transport: 'carrier' is not allowed: must be shm | tcp"),
        (["serve", "--silence-s", "0.1"], "--silence-s: 0.1 is out of range"),
        (["serve", "--silence-s", "nan"], "--silence-s: nan is out of range"),
        (["serve", "--restarts", "-1"], "--restarts: -1 is out of range"),
        (["serve", "--host", "0.0.0.0"], "--host: '0.0.0.0' is reachable from other machines"),
        (["serve", "--max-num-seqs", "many"], "--max-num-seqs: 'many' is not allowed"),
        (["move", "x", "1", "--url", "ftp://host"], "--url: 'ftp://host' is not allowed"),
        (["move", "x", "1", "--url", "http://host:99999"], "--url: 'http://host:99999' is not allowed"),
        (["status", "--url", "localhost:8000"], "--url: 'localhost:8000' is not allowed"),
    ],
)
def test_a_bad_flag_is_one_line_and_status_2(arguments: list[str], says: str):
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert done.stderr.startswith(f"kvlite: {says}")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [["move"], ["move", "x"], ["move", "x", "one"], ["serve", "--engines", "two"], ["paint"]],
)
def test_what_is_no_command_is_status_2(arguments: list[str]):
    assert invoke(*arguments).exit_code == 2


def test_a_server_that_is_not_there_is_one_line_and_status_1():
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        done = invoke("status", "--url", f"http://127.0.0.1:{nobody.getsockname()[1]}")
    assert done.exit_code == 1
    assert "does not answer" in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["serve", "missing-model"], "kvlite: missing-model: no such directory"),
        (["serve", "--max-model-len", "4096"], "kvlite: --max-model-len: 4096 is above the 2048 positions"),
    ],
)
def test_what_no_engine_can_be_made_of_is_one_line(arguments: list[str], says: str):
    done = invoke(*arguments, "--port", "0", "--engines", "1")
    assert done.exit_code == (2 if "--max" in says else 1)
    assert done.stderr.startswith(says)
    assert len(done.stderr.splitlines()) == 1
