"""`netsuke serve` as its clients meet it: the official OpenAI client, raw sockets, and the command itself."""

import concurrent.futures
import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx2
import openai
import pytest

from netsuke import serve
from netsuke.errors import NetsukeError
from netsuke.runtime.batching import Batcher
from netsuke.runtime.chat import Chat
from netsuke.runtime.http import Api, Server
from netsuke.serve import listen, url_of
from tests.runtime.standin import Draw, StandIn, expected

DEFAULT_MODEL = "standin"


@dataclass
class Running:
    engine: StandIn
    batcher: Batcher
    server: Server
    url: str

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=20)

    def post(self, path: str, **body) -> httpx2.Response:
        return httpx2.post(self.url + path, json=body, timeout=20)


@contextlib.contextmanager
def running(queue: int = 64, template: str | None = None, answer_seconds: float = 20, grace: float = 5, **engine):
    e = StandIn(**engine)
    batcher = Batcher(e, queue)
    api = Api(batcher, e.tokenizer, Chat(e.tokenizer, template), DEFAULT_MODEL, Draw, answer_seconds)
    server = Server(api, grace)
    listener = listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield Running(e, batcher, server, url_of(listener))
    finally:
        e.gate.set()
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def shared() -> Iterator[Running]:
    with running() as r:
        yield r


def until(condition, seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.005)


def test_completion_with_the_official_client(shared):
    got = shared.client.completions.create(model="standin", prompt="hello", max_tokens=12, temperature=0)
    assert got.choices[0].text == expected("hello", 12)
    assert got.choices[0].finish_reason == "length"
    assert (got.object, got.model) == ("text_completion", "standin")
    assert (got.usage.prompt_tokens, got.usage.completion_tokens, got.usage.total_tokens) == (6, 12, 18)
    assert len(shared.client.completions.create(model="standin", prompt="x").choices[0].text) == 16


def test_several_prompts_and_token_ids(shared):
    got = shared.client.completions.create(model="standin", prompt=["one", "two"], max_tokens=9, temperature=0)
    assert [c.text for c in got.choices] == [expected("one", 9), expected("two", 9)]
    ids = [256, *b"one"]
    for prompt in (ids, [ids]):
        again = shared.client.completions.create(model="standin", prompt=prompt, max_tokens=9, temperature=0)
        assert again.choices[0].text == expected("one", 9)
    parts = ["", ""]
    for chunk in shared.client.completions.create(
        model="standin", prompt=["one", "two"], max_tokens=9, temperature=0, stream=True
    ):
        parts[chunk.choices[0].index] += chunk.choices[0].text
    assert parts == [expected("one", 9), expected("two", 9)]


def test_streaming_equals_not_streaming_with_sampling(shared):
    for seed in (1, 2, -3):
        ask = {"model": "standin", "prompt": "tell me", "max_tokens": 30, "temperature": 1.0, "seed": seed}
        whole = shared.client.completions.create(**ask)
        chunks = list(shared.client.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
        assert "".join(c.choices[0].text for c in chunks[:-1]) == whole.choices[0].text
        assert whole.choices[0].text == expected("tell me", 30, Draw(1.0, seed=seed % 2**64))
        assert chunks[-2].choices[0].finish_reason == "length"
        assert not chunks[-1].choices
        assert chunks[-1].usage.completion_tokens == 30
        assert len({c.id for c in chunks}) == 1


def test_chat_with_the_official_client(shared):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    ]
    prompt = "system: Be brief.\nuser: Hi\nassistant:"
    got = shared.client.chat.completions.create(
        model="standin", messages=messages, max_completion_tokens=20, temperature=0
    )
    assert got.choices[0].message.content == expected(prompt, 20)
    assert got.choices[0].message.role == "assistant"
    with shared.client.chat.completions.stream(
        model="standin", messages=[{"role": "user", "content": "x"}], temperature=0, stop=[" "]
    ) as stream:
        answer = expected("user: x\nassistant:", 200)
        assert stream.get_final_completion().choices[0].message.content == answer[: answer.index(" ")]
    endless = shared.client.chat.completions.create(model="standin", messages=messages, temperature=0)
    assert endless.usage.total_tokens == shared.engine.context


TEMPLATE = """{{ bos_token }}{% for m in messages %}
{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}
say|{{ m.content }}|{% endfor %}"""


def test_chat_template_is_rendered_in_a_sandbox():
    with running(template=TEMPLATE) as r:
        ask = r.client.chat.completions.create
        got = ask(model="standin", messages=[{"role": "user", "content": "user: ünder"}])
        assert got.choices[0].message.content == "user: ünder", "stop strings of the plain transcript do not apply"
        assert got.choices[0].finish_reason == "stop"
        assert got.usage.prompt_tokens == 1 + len("say|user: ünder|".encode())
        with pytest.raises(openai.BadRequestError, match="no tools here"):
            ask(model="standin", messages=[{"role": "tool", "content": "x"}])
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with running(template=escape) as r, pytest.raises(openai.BadRequestError, match="unsafe"):
        r.client.chat.completions.create(model="standin", messages=[{"role": "user", "content": "x"}])


def test_the_template_of_the_folder_or_of_the_user_is_found(tmp_path):
    tok = StandIn().tokenizer
    messages = [{"role": "user", "content": "x"}]
    assert Chat.find(tok, tmp_path).text(messages) == "user: x\nassistant:"
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}[{{ messages[0].content | tojson }}]")
    found = Chat.find(tok, tmp_path)
    assert found.text(messages) == '<s>["x"]'
    (tmp_path / "mine.jinja").write_text("mine {{ messages | length }}")
    assert Chat.find(tok, tmp_path, tmp_path / "mine.jinja").text(messages) == "mine 1"
    (tmp_path / "bad.jinja").write_text("{% if %}")
    for name in ("bad.jinja", "missing.jinja"):
        with pytest.raises(NetsukeError, match=name):
            Chat.find(tok, tmp_path, tmp_path / name)


def test_stop_strings_and_whole_characters_in_streams(shared):
    text = "Grüße — 你好 👋🏽 STOP here"
    for stop, out in ((None, text), ("STOP", "Grüße — 你好 👋🏽 "), (["zzz", "好 "], "Grüße — 你")):
        ask = {"model": "standin", "prompt": f"say|{text}|", "max_tokens": 99, "temperature": 0}
        if stop:
            ask["stop"] = stop
        whole = shared.client.completions.create(**ask)
        pieces = [c.choices[0].text for c in shared.client.completions.create(**ask, stream=True)]
        assert whole.choices[0].text == "".join(pieces) == out
        assert whole.choices[0].finish_reason == "stop"
        assert not any("\ufffd" in p for p in pieces)


def test_logprobs(shared):
    ask = {"model": "standin", "prompt": "abc", "max_tokens": 6, "temperature": 0}
    got = shared.client.completions.create(**ask, logprobs=3).choices[0]
    assert "".join(got.logprobs.tokens) == got.text
    assert got.logprobs.text_offset == list(range(6))
    for token, p, top in zip(got.logprobs.tokens, got.logprobs.token_logprobs, got.logprobs.top_logprobs):
        assert len(top) == 3
        assert max(top.values()) == top[token] == p < 0
    streamed = shared.client.completions.create(**ask, logprobs=3, stream=True)
    assert [p for c in streamed for p in c.choices[0].logprobs.token_logprobs] == got.logprobs.token_logprobs
    chat = shared.client.chat.completions.create(
        model="standin", messages=[{"role": "user", "content": "x"}], max_tokens=4, logprobs=True, top_logprobs=2,
        temperature=0,
    ).choices[0]  # fmt: skip
    assert "".join(t.token for t in chat.logprobs.content) == chat.message.content
    assert all(len(t.top_logprobs) == 2 and bytes(t.bytes).decode() == t.token for t in chat.logprobs.content)


WRONG = [
    ({"prompt": "x", "max_tokens": "many"}, "max_tokens"), ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
    ({"prompt": "x", "temperature": -1}, "temperature"), ({"prompt": "x", "top_p": 0}, "top_p"),
    ({"prompt": "x", "n": 2}, "n"), ({"prompt": "x", "echo": True}, "echo"), ({"prompt": "x", "stop": ["a"] * 5}, "stop"),
    ({"prompt": "x", "stop": ""}, "stop"), ({"prompt": "x", "seed": 2**70}, "seed"), ({"prompt": "x", "logprobs": 6}, "logprobs"),
    ({"prompt": "x", "stream": "yes"}, "stream"),
    ({"prompt": "x", "stream_options": {"include_usage": 3}}, "stream_options.include_usage"),
    ({"prompt": "x", "frequency_penalty": 0.5}, "frequency_penalty"), ({}, "prompt"), ({"prompt": 7}, "prompt"),
    ({"prompt": []}, "prompt"), ({"prompt": ["x"] * 17}, "prompt"), ({"prompt": ["x", 3]}, "prompt"),
    ({"prompt": [999]}, "prompt"), ({"prompt": [-1]}, "prompt"), ({"prompt": [[]]}, "prompt"), ({"prompt": "x" * 300}, "prompt"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "field"), WRONG, ids=[json.dumps(b)[:50] for b, _ in WRONG])
def test_wrong_fields_are_named(shared, body, field):
    got = shared.post("/v1/completions", **body)
    error = got.json()["error"]
    assert got.status_code == 400
    assert error["param"] == field
    assert error["type"] == "invalid_request_error"
    assert error["message"]


CHATS = [
    ({"messages": []}, "messages"), ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": "x"}], "tools": [{}]}, "tools"),
    ({"messages": [{"role": "user", "content": "x"}], "top_logprobs": 2}, "top_logprobs"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "field"), CHATS, ids=[f for _, f in CHATS])
def test_wrong_chats_are_named(shared, body, field):
    got = shared.post("/v1/chat/completions", **body)
    assert got.status_code == 400
    assert got.json()["error"]["param"] == field


def test_neutral_and_unknown_fields_are_let_pass(shared):
    neutral = {"n": 1, "echo": False, "best_of": 1, "presence_penalty": 0, "logit_bias": {}, "user": "me", "zzz": [1]}
    assert shared.post("/v1/completions", prompt="x", **neutral).status_code == 200


def test_broken_bodies_and_wrong_addresses(shared):
    def send(data: bytes, path: str = "/v1/completions", kind: str = "application/json") -> tuple[int, dict]:
        got = httpx2.post(shared.url + path, content=data, headers={"content-type": kind}, timeout=20)
        return got.status_code, got.json()["error"]

    for raw in (
        b"",
        b"{",
        b'{"prompt": "\xff"}',
        b'"text"',
        b"[" * 500_000,
        b'{"a":' * 100_000,
        b'{"prompt": "\\ud800"}',
    ):
        assert send(raw)[0] == 400, raw[:20]
    assert send(b'{"prompt": "' + b"x" * 1_100_000 + b'"}')[0] == 413
    assert send(b'{"prompt": "x"}', kind="text/plain")[0] == 415
    assert send(b"{}", "/v1/embeddings")[0] == 404
    assert send(b"{}", "/v1/models")[0] == 405
    with pytest.raises(openai.NotFoundError, match="gpt-4"):
        shared.client.completions.create(model="gpt-4", prompt="x")
    assert [m.id for m in shared.client.models.list()] == [shared.client.models.retrieve("standin").id] == ["standin"]


def test_a_full_queue_is_429_with_retry_after():
    with running(queue=1, slots=1) as r, concurrent.futures.ThreadPoolExecutor(2) as pool:
        r.engine.gate.clear()
        one = pool.submit(r.post, "/v1/completions", prompt="a", temperature=0)
        until(lambda: r.batcher.busy == 1)
        two = pool.submit(r.post, "/v1/completions", prompt="b", temperature=0)
        until(lambda: r.batcher.waiting == 1)
        with pytest.raises(openai.RateLimitError) as full:
            r.client.completions.create(model="standin", prompt="c", stream=True)
        assert 1 <= int(full.value.response.headers["retry-after"]) <= 60
        assert full.value.code == "queue_full"
        r.engine.gate.set()
        assert [f.result().json()["choices"][0]["text"] for f in (one, two)] == [expected("a", 16), expected("b", 16)]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot(stream):
    with running(slots=1, step=0.003, context=100_000) as r:
        body = json.dumps({"prompt": "endless", "max_tokens": 90_000, "stream": stream}).encode()
        head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        head += f"content-length: {len(body)}\r\n\r\n"
        host, port = r.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as s:
            s.sendall(head.encode() + body)
            if stream:
                assert s.recv(10)
            until(lambda: r.batcher.busy == 1)
            steps = len(r.engine.batches)
        until(lambda: r.batcher.busy == 0)
        assert len(r.engine.batches) - steps < 60, "a few steps, as long as the news of the disconnection takes"
        assert r.client.completions.create(model="standin", prompt="next", temperature=0).choices[0].text == expected(
            "next", 16
        )
        assert r.batcher.counts.outcomes["cancelled"] == 1


def test_an_answer_that_takes_too_long_is_504():
    with running(slots=1, step=0.01, context=10_000, answer_seconds=0.2) as r:
        got = r.post("/v1/completions", prompt="x", max_tokens=9000)
        assert (got.status_code, got.json()["error"]["code"]) == (504, "timeout")
        with pytest.raises(openai.APIError, match="no answer within"):
            list(r.client.completions.create(model="standin", prompt="x", max_tokens=9000, stream=True))
        until(lambda: r.batcher.busy == 0)


def test_an_engine_that_fails_is_500_and_the_server_goes_on():
    with running() as r:
        r.engine.fail_next = True
        assert r.post("/v1/completions", prompt="x").status_code == 500
        assert r.post("/v1/completions", prompt="x").status_code == 200


def test_stopping_is_graceful():
    with running(slots=1, step=0.01) as r, concurrent.futures.ThreadPoolExecutor(2) as pool:
        one = pool.submit(r.post, "/v1/completions", prompt="a", max_tokens=60, temperature=0)
        until(lambda: r.batcher.busy == 1)
        two = pool.submit(r.post, "/v1/completions", prompt="b")
        until(lambda: r.batcher.waiting == 1)
        r.server.should_exit = True
        assert two.result().status_code == 503
        assert httpx2.get(r.url + "/health").status_code == 503
        late = r.post("/v1/completions", prompt="c")
        assert (late.status_code, late.json()["error"]["code"]) == (503, "stopping")
        assert one.result().json()["choices"][0]["text"] == expected("a", 60)
    with running(slots=1, step=0.01, context=10_000, grace=0.1) as r, concurrent.futures.ThreadPoolExecutor(1) as pool:
        cut = pool.submit(r.post, "/v1/completions", prompt="a", max_tokens=9000)
        until(lambda: r.batcher.busy == 1)
        r.server.should_exit = True
        assert cut.result().status_code == 503


def test_fifty_clients_and_no_answer_is_mixed_up():
    def ask(i: int) -> tuple[str, str]:
        prompt, n = f"{'shared words ' * (i % 4)}client {i}", 8 + i % 9
        if i % 2:
            got = r.client.completions.create(model="standin", prompt=prompt, max_tokens=n, temperature=0, stream=True)
            return "".join(c.choices[0].text for c in got), expected(prompt, n)
        got = r.client.completions.create(model="standin", prompt=prompt, max_tokens=n, temperature=1, seed=i)
        return got.choices[0].text, expected(prompt, n, Draw(1, seed=i))

    with running() as r, concurrent.futures.ThreadPoolExecutor(50) as pool:
        for got, wanted in pool.map(ask, range(50)):
            assert got == wanted
        assert r.batcher.counts.outcomes == {"length": 50}


def test_health_and_metrics_count():
    with running(slots=2) as r:
        r.post("/v1/completions", prompt="x" * 40, max_tokens=5)
        r.post("/v1/completions", prompt="x" * 40, max_tokens=5)
        r.post("/v1/completions", prompt=3)
        assert httpx2.get(r.url + "/health").json() == {"status": "ok", "slots": 2, "busy": 0, "queue": 0}
        text = httpx2.get(r.url + "/metrics").text
        value = {k: float(v) for k, v in re.findall(r"^(netsuke_\S+) (\S+)$", text, re.MULTILINE)}
    assert value['netsuke_requests_total{outcome="length"}'] == 2
    assert value['netsuke_requests_total{outcome="invalid"}'] == 1
    assert value["netsuke_prompt_tokens_total"] == 82
    assert value["netsuke_prompt_tokens_reused_total"] == 40
    assert value["netsuke_generated_tokens_total"] == 10
    assert sum(v for k, v in value.items() if k.startswith("netsuke_engine_memory_bytes")) == 3000
    assert value["netsuke_prompt_seconds_total"] > 0 < value["netsuke_decode_seconds_total"]


def test_wrong_settings_and_ports_are_one_sentence():
    with pytest.raises(NetsukeError, match="slots 0"):
        serve("pycode", slots=0)
    with listen("127.0.0.1", 0) as taken, pytest.raises(NetsukeError, match="in use"):
        listen("127.0.0.1", taken.getsockname()[1])
    for host in ("no.such.host.invalid", "203.0.113.7"):
        with pytest.raises(NetsukeError, match="listen on"):
            listen(host, 0)


def test_a_missing_extra_is_named():
    code = "import sys; sys.modules['uvicorn'] = None\nfrom netsuke.cli import main\nmain()"
    done = subprocess.run([sys.executable, "-c", code, "serve", "pycode"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "netsuke[serve]" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_real_engine_answers_as_it_does_alone():
    """pycode through the command, in a process of its own: without torch, and gone after SIGTERM with exit code 0."""
    from netsuke.runtime.engine import Engine, generate

    prompts = [f"def f{i}(x):\n    " for i in range(8)]
    engine = Engine.open("pycode", threads=1)
    tok = engine.tokenizer
    alone = [tok.decode(list(generate(engine, tok.encode(p, bos=True), 24))) for p in prompts]
    engine.close()
    command = [sys.executable, "-m", "netsuke", "serve", "pycode", "--port", "0", "--json", "--threads", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            where = json.loads(server.stdout.readline())
            client = openai.OpenAI(base_url=where["url"] + "/v1", api_key="none", max_retries=0, timeout=60)

            def ask(prompt: str) -> str:
                got = client.completions.create(model="pycode", prompt=prompt, max_tokens=24, temperature=0)
                return got.choices[0].text

            with concurrent.futures.ThreadPoolExecutor(8) as pool:
                assert list(pool.map(ask, prompts)) == alone
            sampled = {"model": "pycode", "prompt": "import ", "max_tokens": 24, "temperature": 0.9, "seed": 5}
            whole = client.completions.create(**sampled).choices[0].text
            parts = [c.choices[0].text for c in client.completions.create(**sampled, stream=True)]
            assert "".join(parts) == whole
            if sys.platform == "linux":
                assert "libtorch" not in Path(f"/proc/{server.pid}/maps").read_text()
        finally:
            server.send_signal(signal.SIGTERM)
        assert server.wait(20) == 0
        assert json.loads(server.stdout.read())["requests"] == 10


@contextlib.contextmanager
def served(model: Path, *options: str) -> Iterator[tuple[dict, openai.OpenAI]]:
    """`netsuke serve MODEL` in a process of its own: what it says when it is ready, and a client."""
    command = [sys.executable, "-m", "netsuke", "serve", str(model), "--port", "0", "--json", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            where = json.loads(server.stdout.readline())
            yield where, openai.OpenAI(base_url=where["url"] + "/v1", api_key="none", max_retries=0, timeout=60)
        finally:
            server.send_signal(signal.SIGTERM)
        assert server.wait(20) == 0


def test_static_grids_are_served_in_integers(tmp_path):
    """Several at a time, each answered as the reference in NumPy answers it alone."""
    pytest.importorskip("netsuke._native", reason="this installation has no native engine")
    from netsuke.models.load import load
    from netsuke.runtime.integer import IntegerModel
    from tests.runtime.static_models import static_artifact

    folder = static_artifact(tmp_path, eos=())
    loaded = load(folder)
    integer, tok = IntegerModel.of_model(loaded.model), loaded.tokenizer
    prompts = [f"if {i}:" for i in range(6)]
    alone = [tok.decode(list(integer.generate(tok.encode(p, bos=True), 12))) for p in prompts]
    with served(folder, "--slots", "3") as (where, client):
        assert where["backend"] == "integer" and where["slots"] == 3 and "note" not in where

        def ask(prompt: str) -> str:
            got = client.completions.create(model=where["model"], prompt=prompt, max_tokens=12, temperature=0)
            return got.choices[0].text

        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            assert list(pool.map(ask, prompts)) == alone


def test_many_slots_of_an_input_sparse_model_are_warned_about(tmp_path):
    pytest.importorskip("netsuke._native", reason="this installation has no native engine")
    from netsuke.layers.sparse import InputSparse
    from tests.models.hostile import artifact, tiny_model
    from tests.runtime.engine_cases import swap

    def thinned(leaf, layer):
        return InputSparse.from_dense(layer, 0.1) if leaf == "up" else layer

    folder = artifact(tmp_path, swap(tiny_model(), thinned))
    with served(folder) as (where, _):
        assert where["slots"] == 4 and "with 4 of them nearly all" in where["note"] and "--slots 1" in where["note"]
    with served(folder, "--slots", "3") as (where, _):
        assert "note" not in where
