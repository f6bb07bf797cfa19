"""The benchmark of servers: what clients saw, whether it is right, and one clear error where a server fails."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Thread

import h11
import psutil
import pytest

from fastmtp.cli.main import main
from fastmtp.evaluate.serving import bench
from fastmtp.evaluate.serving.clients import Request, Server, described
from fastmtp.evaluate.serving.competitors import ways
from fastmtp.evaluate.serving.figures import Pass, Quantiles, Reply, by_level, compare, figures
from fastmtp.evaluate.serving.questions import JSON, TEXT, questions
from fastmtp.others import llama_cpp
from fastmtp.others.process import EngineProcess
from fastmtp.progress import QUIET
from tests.conftest import tiny_target
from tests.engines import NATIVE
from tests.models.test_target import write_gguf
from tests.serve.serving import REPLY, FakeScheduler, eventually, service, serving

TOKENS = len(REPLY.encode()) + 1
SMALL = ["--concurrency", "1,2", "--prompts", "3", "--max-new-tokens", "12", "--turns", "2"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    write_gguf(path, tiny_target("llama"))
    return path


def reply(asked: str, text: str = "yes", tokens: int = 11, first: float = 0.1, seconds: float = 0.6) -> Reply:
    return Reply(asked, text, 7, 2, tokens, first, seconds, rounds=5, forced=3)


def a_pass(*replies: Reply, name: str = "auto", turn: int = 0, seconds: float = 2.0) -> Pass:
    return Pass(name, 2, turn, seconds, list(replies))


def ask(url: str, requests: int, concurrency: int) -> Pass:
    asked = [Request(str(index), {"messages": [{"role": "user", "content": "hi"}]}) for index in range(requests)]
    with QUIET.bar("", 0) as bar:
        return Server("it", url).ask_all(asked, concurrency, 0, bar)


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of `fastmtp bench-serve`."""
    monkeypatch.setattr("sys.argv", ["fastmtp", "bench-serve", *arguments])
    handler = signal.getsignal(signal.SIGTERM)
    try:
        main()
    except SystemExit as ended:
        return int(ended.code or 0)
    finally:
        signal.signal(signal.SIGTERM, handler)
    return 0


def test_figures_of_a_pass() -> None:
    """Quantiles are over answers: of waits the long ones, of rates the low ones; tau leaves out first tokens."""
    replies = [reply(str(first), first=first / 1e3, seconds=first / 1e3 + 10 / first) for first in range(100, 201)]
    found = figures(a_pass(*replies, seconds=10.0))
    assert found.first_token_ms == Quantiles(pytest.approx(150), pytest.approx(195))
    assert found.answer_tokens_per_second == Quantiles(pytest.approx(150), pytest.approx(105))
    assert found.tokens_per_second == pytest.approx(101 * 11 / 10)
    assert found.tau == 2.0
    assert found.forced_share == pytest.approx(3 / 11)
    assert (found.prompt_tokens, found.cached_tokens) == (707, 202)


def test_what_a_server_does_not_tell_is_not_known() -> None:
    found = figures(a_pass(reply("1"), replace(reply("2", tokens=1, first=0.6), rounds=None, forced=None)))
    assert (found.tau, found.forced_share) == (None, None)
    assert found.answer_tokens_per_second == Quantiles(20, 20)


def test_a_slow_turn_does_not_count() -> None:
    """Figures are medians over turns."""
    passes = [a_pass(reply("1"), turn=turn, seconds=seconds) for turn, seconds in enumerate((1.0, 1.1, 50.0))]
    assert by_level(passes)[2]["auto"].tokens_per_second == pytest.approx(10)


@pytest.mark.parametrize(("changed", "at"), [({"text": "yet"}, 2), ({"text": "yes!"}, 3), ({"tokens": 12}, 3)])
def test_one_wrong_answer_is_found(changed: dict[str, object], at: int) -> None:
    """In its text or its number of tokens."""
    right = [reply(str(number)) for number in range(4)]
    wrong = [*right[:2], replace(right[2], **changed), right[3]]
    same, differing = compare({one.asked: one for one in right}, [a_pass(*right), a_pass(*wrong, turn=1)])
    assert (same.same, same.total) == (7, 8)
    assert [(one.asked, one.turn, one.at) for one in differing] == [("2", 1, at)]


def test_clients_are_never_more_nor_fewer() -> None:
    """Each asks again as soon as it is answered, and replies stay in the order of the questions."""
    scheduler, most = FakeScheduler(pace=0.008), 0
    submit = scheduler.submit

    def counted(*arguments: object) -> object:
        nonlocal most
        answer = submit(*arguments)  # type: ignore[arg-type]
        most = max(most, scheduler.running)
        return answer

    scheduler.submit = counted  # type: ignore[method-assign, assignment]
    with serving(lambda: service(scheduler)) as url:
        found = ask(url, 7, 3)
    assert most == 3
    assert [one.asked for one in found.replies] == list("0123456")
    assert {(one.text, one.tokens) for one in found.replies} == {(REPLY, TOKENS)}
    assert all(0 < one.first_token_seconds < one.seconds < found.seconds for one in found.replies)


@contextmanager
def broken(said: bytes) -> Iterator[str]:
    """A server that says so much to everybody and hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(65536)
                    connection.sendall(said)

        thread = Thread(target=answer, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(5)


STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (b"", "the connection broke: "),
        (STREAM + b"data: [DONE]\n\n", "failed: the stream ended before the answer"),
        (b"HTTP/1.1 404 No\r\nContent-Length: 4\r\n\r\nnone", "failed: status 404: none"),
    ],
)
def test_a_broken_server_is_one_error(said: bytes, message: str) -> None:
    """However many clients it hits; the error names the server."""
    with broken(said) as url, pytest.raises(ValueError, match=f"it at {url}.*{message}"):
        ask(url, 4, 2)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (FakeScheduler(room=0), "status 429: the queue is full"),
        (FakeScheduler(fails=3), "failed: out of luck"),
    ],
)
def test_errors_of_a_server_are_told(scheduler: FakeScheduler, message: str) -> None:
    """Those instead of an answer, and those within one."""
    with serving(lambda: service(scheduler)) as url, pytest.raises(ValueError, match=message):
        ask(url, 4, 2)


def test_a_running_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Everything is measured that it tells, and written."""
    scheduler = FakeScheduler()
    with serving(lambda: service(scheduler)) as url:
        assert command(monkeypatch, "--url", url + "/v1", *SMALL, "--out", str(tmp_path)) == 0
    found = json.loads((tmp_path / "bench-serve.json").read_text())
    assert (found["target"], found["identical"], list(found["levels"])) == ("tiny", None, ["1", "2"])
    # The fake scheduler says five rounds of each answer, of 12 tokens here.
    assert found["levels"]["2"]["server"]["tau"] == pytest.approx(11 / 5)
    assert f">{url}<" in (tmp_path / "report.html").read_text()
    assert "server tokens/s: " in (tmp_path / "report.md").read_text()
    # Warm-ups, and then the prompts of each level and turn.
    assert len(scheduler.requests) == (1 + 2 * 3) + (2 + 2 * 4)


def test_schemas_are_asked_for() -> None:
    """As OpenAI's `response_format`, and beside them the same questions as free text."""
    asked = questions(JSON, "")
    assert len({one.id for one in asked}) == len(asked) >= 16
    kept, free = ways("it", "http://x", {"draft": False}, 0.0, schemas=True)
    requests = [way._request(asked[0], 9) for way in (kept, free)]
    assert [one.asked for one in requests] == ["booking+schema", "booking"]
    form = requests[0].body["response_format"]
    assert form == {
        "type": "json_schema",
        "json_schema": {"name": "record", "strict": True, "schema": asked[0].schema},
    }
    assert "response_format" not in requests[1].body
    assert (requests[1].body["draft"], requests[1].body["max_tokens"]) == (False, 9)


def test_drawn_answers_are_asked_for_with_seeds() -> None:
    """The same for a question in every turn and way; greedy answers need none."""
    asked = questions(TEXT, "builtin")
    (drawn,), (greedy,) = (ways("it", "http://x", {}, temperature, schemas=False) for temperature in (0.7, 0.0))
    bodies = [drawn._request(question, 9).body for question in (*asked, *asked)]
    assert {body["temperature"] for body in bodies} == {0.7}
    seeds = [body["seed"] for body in bodies]
    assert seeds[: len(asked)] == seeds[len(asked) :]
    assert len(set(seeds)) == len(asked)
    assert "seed" not in greedy._request(asked[0], 9).body


def test_kinds_of_questions_take_turns() -> None:
    """So that few prompts are of all kinds."""
    assert [one.id.partition("-")[2] for one in questions(TEXT, "builtin")[:8]] == ["1"] * 7 + ["2"]


def test_ctrl_c_while_an_engine_loads_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody knows it yet who could close it."""
    (tmp_path / "never_ready.py").write_text("import time; time.sleep(60)")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(EngineProcess, "ask", interrupted)
    before = psutil.Process().children()
    with pytest.raises(KeyboardInterrupt):
        EngineProcess("never_ready", {}, "it", {"PYTHONPATH": str(tmp_path)})
    assert psutil.Process().children() == before


def _has_clients(process: psutil.Process) -> bool:
    return any(one.status == psutil.CONN_ESTABLISHED for one in process.net_connections())


@pytest.mark.skipif(not NATIVE, reason="the promise is the native engine's")
class TestOwnServer:
    """`fastmtp serve` beside `generate` on a tiny model."""

    def test_keeps_the_promise(self, model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """Every answer is plain decoding's, nothing comes from a cache, and all servers end with the command."""
        before = psutil.Process().children(recursive=True)
        others = ["llama-server"] if llama_cpp.version() else []
        options = ["--target", str(model), "--threads", "1", "--draft", "lookup", "--out", str(tmp_path)]
        against = [word for name in others for word in ("--against", name)]
        assert command(monkeypatch, *options, *SMALL, *against) == 0
        found = json.loads((tmp_path / "bench-serve.json").read_text())
        # In both turns: of three competitors at one client three questions each, of two at two clients four.
        assert found["identical"] == {"same": 34, "total": 34}
        assert [list(of) for of in found["levels"].values()] == [
            ["generate", "lookup", "plain", *others],
            ["lookup", "plain", *others],
        ]
        assert {one["cached_tokens"] for of in found["levels"].values() for one in of.values()} == {0}
        assert psutil.Process().children(recursive=True) == before

    def test_records_are_those_of_plain_decoding(
        self, model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """Answers with a schema are compared with plain decoding alone under the same grammar."""
        words = ["--target", str(model), "--threads", "1", "--draft", "lookup", "--workload", "json"]
        sizes = ["--concurrency", "2", "--prompts", "4", "--turns", "1", "--max-new-tokens", "24"]
        assert command(monkeypatch, *words, *sizes, "--out", str(tmp_path)) == 0
        found = json.loads((tmp_path / "bench-serve.json").read_text())
        assert found["identical"] == {"same": 12, "total": 12}
        assert list(found["levels"]["2"]) == ["lookup+schema", "lookup", "plain+schema"]
        assert found["levels"]["2"]["lookup+schema"]["forced_share"] > 0.2

    def test_drawn_answers_are_those_of_plain_decoding(
        self, model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """With the requests' seeds."""
        words = ["--target", str(model), "--threads", "1", "--draft", "lookup", "--temperature", "0.9"]
        sizes = ["--concurrency", "2", "--prompts", "4", "--turns", "1", "--max-new-tokens", "24"]
        assert command(monkeypatch, *words, *sizes, "--out", str(tmp_path)) == 0
        found = json.loads((tmp_path / "bench-serve.json").read_text())
        assert found["identical"] == {"same": 8, "total": 8}
        assert found["settings"]["temperature"] == 0.9
        assert "drawn at temperature 0.9" in (tmp_path / "report.md").read_text()

    def test_fails_if_an_answer_differs(
        self, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Exit code 1; here another model answers."""
        with serving(lambda: service(FakeScheduler())) as url:
            monkeypatch.setattr(bench, "own_server", contextmanager(lambda *_: iter([url])))
            assert command(monkeypatch, "--target", str(model), "--threads", "1", "--draft", "plain", *SMALL) == 1
        assert "identical: 6/20" in capsys.readouterr().out

    def test_a_signal_leaves_nothing(self, model: Path) -> None:
        """The server ends too, though the signal was not for it."""
        words = [sys.executable, "-m", "fastmtp", "bench-serve", "--target", str(model), "--draft", "plain"]
        started = subprocess.Popen(
            [*words, "--threads", "1", "--turns", "1000"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        process, children = psutil.Process(started.pid), []
        try:
            eventually(lambda: any(map(_has_clients, process.children())), 60)
            children = process.children(recursive=True)
            started.terminate()
            _, errors = started.communicate(timeout=30)
            assert (started.returncode, errors.decode().splitlines()[-1][:16]) == (130, "fastmtp: stopped")
            assert not any(map(psutil.Process.is_running, children))
        finally:
            for one in filter(psutil.Process.is_running, [process, *children]):
                one.kill()


def test_credentials_go_to_the_server_and_nowhere_else() -> None:
    """They and the query are part of the request, and of no error."""
    server = Server("server", "http://user:hunter2@127.0.0.1:1/v1?token=tok3n")
    sent = server._sent(h11.Connection(h11.CLIENT), Request("q", {})).lower()
    assert sent.startswith(b"post /v1/chat/completions?token=tok3n http/1.1\r\nhost: 127.0.0.1:1\r\n")
    assert b"authorization: basic " + b64encode(b"user:hunter2").lower() in sent
    with pytest.raises(ValueError, match=r"^--url http://127\.0\.0\.1:1: no server that tells") as described_as:
        described(server.address)
    with pytest.raises(ValueError, match=r"^server at http://127\.0\.0\.1:1: the connection broke") as asked:
        server.ask_all([Request("q", {})], 1, 0, QUIET.bar("", 1).__enter__())
    for error in (described_as, asked):
        assert "hunter2" not in str(error.value) and "tok3n" not in str(error.value)
