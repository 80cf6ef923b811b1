"""The HTTP side of `netsuke serve`: OpenAI's routes on a Batcher, as a Starlette application and a uvicorn server.

GET /v1/models, POST /v1/completions, POST /v1/chat/completions (both with "stream": true as server-sent events), GET /health,
GET /metrics (Prometheus). A request may not be too large, too slow or too deep; when the client goes away its jobs end.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Protocol

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from netsuke.errors import NetsukeError
from netsuke.models.tokenizer import Tokenizer
from netsuke.runtime.batching import Batcher, Delta, Job, Picker, Refused
from netsuke.runtime.chat import Chat
from netsuke.runtime.protocol import (
    ApiError,
    ChatBody,
    ChatShape,
    Common,
    CompletionBody,
    CompletionShape,
    Shape,
    decode,
    usage,
)  # fmt: skip
from netsuke.runtime.text_stream import Score, TextStream

LARGEST_BODY = 1_000_000  # bytes
DRAINED = 16 * LARGEST_BODY  # read and thrown away, so that the client hears the refusal before the connection closes
BODY_SECONDS = 30.0  # in which a body must have arrived
ERROR_SECONDS = 5.0  # in which a client must have taken the news that it gets no answer
DEFAULT_TOKENS = 16  # of a completion, as in OpenAI's interface; a chat goes on to the end of the context


class MakePicker(Protocol):
    def __call__(self, *, temperature: float, top_p: float, top_k: int, min_p: float, seed: int) -> Picker: ...


@dataclass
class Api:
    """The application. `answer_seconds` bounds a whole answer, the wait in the queue included."""

    batcher: Batcher
    tokenizer: Tokenizer
    chat: Chat
    name: str
    sampler: MakePicker
    answer_seconds: float = 600.0
    invalid: int = 0  # requests that were refused before they reached the queue
    started: int = field(default_factory=lambda: int(time.time()))

    def app(self) -> Starlette:
        routes = [
            Route("/v1/models", self.models), Route("/v1/models/{name:path}", self.model),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat_completions, methods=["POST"]),
            Route("/health", self.health), Route("/metrics", self.metrics),
        ]  # fmt: skip
        handlers = {ApiError: self.refuse, HTTPException: self.refuse, ClientDisconnect: nobody, Exception: broken}
        return Starlette(routes=routes, exception_handlers=handlers)

    # Routes

    async def models(self, request: Request) -> Response:
        return json_response({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        self._check_model(request.path_params["name"])
        return json_response(self._card())

    async def health(self, request: Request) -> Response:
        b = self.batcher
        state = {
            "status": "stopping" if b.draining else "ok", "slots": b.engine.slots, "busy": b.busy, "queue": b.waiting
        }  # fmt: skip
        return json_response(state, 503 if b.draining else 200)

    async def metrics(self, request: Request) -> Response:
        return Response(prometheus(self.batcher, self.invalid), media_type="text/plain; version=0.0.4")

    async def completions(self, request: Request) -> Answer:
        body: CompletionBody = decode(await read_body(request), CompletionBody)
        self._check_model(body.model)
        prompts = [await self._ids(p) if isinstance(p, str) else p for p in body.prompts()]
        limit = body.max_tokens or DEFAULT_TOKENS
        return self._answer(body, prompts, limit, body.logprobs, (), CompletionShape(self.name, self.tokenizer))

    async def chat_completions(self, request: Request) -> Answer:
        body: ChatBody = decode(await read_body(request), ChatBody)
        self._check_model(body.model)
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs: it needs logprobs true", "top_logprobs")
        messages = [m.as_dict(f"messages[{i}]") for i, m in enumerate(body.messages)]
        try:
            ids = await asyncio.to_thread(self.chat.encode, messages)
        except (NetsukeError, UnicodeError) as e:
            raise ApiError(400, str(e), "messages") from e
        limit = body.max_completion_tokens or body.max_tokens or self.batcher.engine.context
        rivals = (body.top_logprobs or 0) if body.logprobs else None
        return self._answer(body, [ids], limit, rivals, self.chat.stops, ChatShape(self.name, self.tokenizer))

    # Their parts

    def _card(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": self.started, "owned_by": "netsuke"}

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self.name:
            raise ApiError(404, f"the model {name!r} is not here, only {self.name!r}", "model", "model_not_found")

    async def _ids(self, text: str) -> list[int]:
        try:  # in a thread: a prompt of a megabyte takes a while
            return await asyncio.to_thread(self.tokenizer.encode, text, True)
        except UnicodeError as e:
            raise ApiError(400, f"prompt: {e}", "prompt") from e

    def _answer(
        self,
        body: Common,
        prompts: list[list[int]],
        limit: int,
        rivals: int | None,
        stops: tuple[str, ...],
        shape: Shape,
    ) -> Answer:
        seed = secrets.randbits(63) if body.seed is None else body.seed % 2**64
        temperature, top_p = (1.0 if v is None else v for v in (body.temperature, body.top_p))
        ends = [*body.stops(), *stops]

        def job(ids: list[int], sink: Callable[[Delta], None]) -> Job:
            sampler = self.sampler(
                temperature=temperature, top_p=top_p, top_k=body.top_k or 0, min_p=body.min_p or 0.0, seed=seed
            )
            return Job(ids, limit, sampler, TextStream(self.tokenizer, ends), sink, rivals)

        with_usage = body.stream_options is not None and body.stream_options.include_usage
        return Answer(self, prompts, job, shape, bool(body.stream), with_usage, rivals is not None)

    async def refuse(self, request: Request, e: ApiError | HTTPException) -> Response:
        if isinstance(e, HTTPException):
            e = ApiError(e.status_code, f"{request.method} {request.url.path}: {e.detail}")
        self.invalid += e.status < 500
        return json_response(e.body(), e.status)


@dataclass
class Answer:
    """One request at work: an ASGI application that submits its jobs, sends what they make, and ends them in any case."""

    api: Api
    prompts: list[list[int]]
    job: Callable[[list[int], Callable[[Delta], None]], Job]
    shape: Shape
    stream: bool
    with_usage: bool
    scored: bool

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        loop, news = asyncio.get_running_loop(), asyncio.Queue()

        def sink(index: int) -> Callable[[Delta], None]:
            return lambda delta: loop.call_soon_threadsafe(news.put_nowait, (index, delta))

        jobs = [self.job(ids, sink(i)) for i, ids in enumerate(self.prompts)]
        try:
            await unless_gone(receive, self._respond(jobs, news, Sender(scope, receive, send)))
        finally:
            for job in jobs:
                self.api.batcher.cancel(job)

    async def _respond(self, jobs: list[Job], news: asyncio.Queue, sender: Sender) -> None:
        try:
            try:
                self.api.batcher.submit(*jobs)
                async with asyncio.timeout(self.api.answer_seconds):
                    await (self._send_stream if self.stream else self._send_whole)(jobs, news, sender)
            except Refused as e:
                if e.reason == "full":
                    raise ApiError(429, "the queue is full", code="queue_full", retry=e.retry_after) from e
                raise ApiError(503, "the server is stopping", code="stopping", retry=e.retry_after) from e
            except NetsukeError as e:
                self.api.invalid += 1
                raise ApiError(400, str(e), "prompt") from e
            except TimeoutError as e:
                for job in jobs:
                    self.api.batcher.cancel(job)  # now: a client that does not read would hold up the error too
                raise ApiError(504, f"no answer within {self.api.answer_seconds:g} s", code="timeout") from e
        except ApiError as e:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ERROR_SECONDS):
                    await sender.error(e)

    async def _send_whole(self, jobs: list[Job], news: asyncio.Queue, sender: Sender) -> None:
        texts, scores, running = [""] * len(jobs), [[] for _ in jobs], len(jobs)
        while running:
            index, delta = await news.get()
            texts[index] += delta.text
            scores[index] += delta.scores
            running -= ended(delta)
        choices = [
            self.shape.choice(i, texts[i], scores[i] if self.scored else None, job.finish, chunk=False)
            for i, job in enumerate(jobs)
        ]
        await sender.whole(self.shape.envelope(choices, self._usage(jobs), chunk=False))

    async def _send_stream(self, jobs: list[Job], news: asyncio.Queue, sender: Sender) -> None:
        async for choices in self._chunks(len(jobs), news):
            await sender.events(*(self.shape.envelope([c], None, chunk=True) for c in choices))
        if self.with_usage:
            await sender.events(self.shape.envelope([], self._usage(jobs), chunk=True))
        await sender.done()

    async def _chunks(self, running: int, news: asyncio.Queue) -> AsyncIterator[list[dict[str, Any]]]:
        """Choices as they come; what came together goes out together."""
        opened: set[int] = set()
        while running:
            batch = [await news.get()]
            while not news.empty():
                batch.append(news.get_nowait())
            choices = []
            for index, delta in batch:
                running -= ended(delta)
                if index not in opened:
                    opened.add(index)
                    choices += self.shape.opening(index)
                scores: list[Score] | None = delta.scores if self.scored else None
                choices.append(self.shape.choice(index, delta.text, scores, delta.finish, chunk=True))
            yield choices

    def _usage(self, jobs: list[Job]) -> dict[str, Any]:
        return usage(sum(len(j.ids) for j in jobs), sum(j.made for j in jobs), sum(j.reused for j in jobs))


def ended(delta: Delta) -> bool:
    """Whether this was a job's last news. Raises ApiError when the job came to no answer, Refused when it never began."""
    if delta.finish == "refused":
        raise Refused("stopping", 1)
    if delta.finish == "cancelled":
        raise ApiError(503, "the server stopped before the answer was complete", code="stopping")
    if delta.finish == "error":
        raise ApiError(500, "the answer could not be made; the server's log says why", code="internal_error")
    return delta.finish is not None


class Sender:
    """Sends one response. A stream's headers wait for its first event, so that an earlier error keeps its status."""

    def __init__(self, scope: Scope, receive: Receive, send: Send):
        self._asgi, self._send, self._open = (scope, receive, send), send, False

    async def whole(self, body: dict[str, Any], status: int = 200, retry: int = 0) -> None:
        await json_response(body, status, retry)(*self._asgi)

    async def events(self, *bodies: dict[str, Any]) -> None:
        await self._write(b"".join(b"data: " + msgspec.json.encode(body) + b"\n\n" for body in bodies))

    async def done(self) -> None:
        await self._write(b"data: [DONE]\n\n", more=False)

    async def error(self, e: ApiError) -> None:
        if not self._open:
            await self.whole(e.body(), e.status, e.retry)
        else:
            await self.events(e.body())
            await self._write(b"", more=False)

    async def _write(self, data: bytes, more: bool = True) -> None:
        if not self._open:
            headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
            self._open = True
        await self._send({"type": "http.response.body", "body": data, "more_body": more})


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Runs `work` to its end, or until the client goes away."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def read_body(request: Request) -> bytes:
    """Raises ApiError for a body that is no JSON by its type, too large or too slow."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # which a web page cannot send to a foreign server without being asked
        raise ApiError(415, f"content type {kind or 'missing'}: application/json is needed")
    data, size = bytearray(), 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size <= LARGEST_BODY:
                    data += part
                elif size > DRAINED:
                    break
    except TimeoutError as e:
        raise ApiError(408, f"the body did not arrive within {BODY_SECONDS:g} s") from e
    if size > LARGEST_BODY:
        raise ApiError(413, f"the body is larger than {LARGEST_BODY} bytes", code="body_too_large")
    return bytes(data)


def json_response(body: dict[str, Any], status: int = 200, retry: int = 0) -> Response:
    headers = {"retry-after": str(retry)} if retry else None
    return Response(msgspec.json.encode(body), status, headers, "application/json")


async def nobody(request: Request, e: Exception) -> Response:
    return Response(status_code=499)  # the client has gone: nobody reads this


async def broken(request: Request, e: Exception) -> Response:
    return json_response(ApiError(500, "an error in the server; its log says more", code="internal_error").body(), 500)


def prometheus(batcher: Batcher, invalid: int) -> str:
    """The counters as Prometheus reads them (text format 0.0.4)."""
    c = batcher.counts
    outcomes = {"stop": 0, "length": 0, "cancelled": 0, "error": 0, "refused_full": 0, "refused_stopping": 0}
    outcomes |= {**c.outcomes, "invalid": invalid}
    outcomes["refused_stopping"] += outcomes.pop("refused", 0)  # while they waited
    # a sum over the parts must count every byte once: "allocated" is the sum of all parts but the weights
    memory = {f'{{part="{k}"}}': v for k, v in batcher.memory.items() if k != "allocated"}
    rows: list[tuple[str, str, str, dict[str, float]]] = [
        ("requests_total", "counter", "prompts by outcome", {f'{{outcome="{k}"}}': v for k, v in outcomes.items()}),
        ("prompt_tokens_total", "counter", "tokens of prompts", {"": c.prompt_tokens}),
        ("prompt_tokens_reused_total", "counter", "of these, not evaluated again", {"": c.reused_tokens}),
        ("generated_tokens_total", "counter", "tokens of answers", {"": c.answer_tokens}),
        ("steps_total", "counter", "forward passes", {"": c.steps}),
        ("prompt_seconds_total", "counter", "engine time for prompts", {"": c.prompt_seconds}),
        ("decode_seconds_total", "counter", "engine time for answers", {"": c.decode_seconds}),
        ("queue_length", "gauge", "prompts that wait", {"": batcher.waiting}),
        ("slots", "gauge", "prompts that can run at a time", {"": batcher.engine.slots}),
        ("slots_busy", "gauge", "prompts that run", {"": batcher.busy}),
        ("engine_memory_bytes", "gauge", "memory of the engine", memory),
    ]  # fmt: skip
    lines = []
    for name, kind, text, values in rows:
        lines += [f"# HELP netsuke_{name} {text}", f"# TYPE netsuke_{name} {kind}"]
        lines += [f"netsuke_{name}{labels} {value:.10g}" for labels, value in values.items()]
    return "\n".join(lines) + "\n"


class Server(uvicorn.Server):
    """uvicorn, stopping in two steps: new requests hear 503 while running ones have `grace` seconds to finish."""

    def __init__(self, api: Api, grace: float = 10.0):
        super().__init__(
            uvicorn.Config(
                api.app(), lifespan="off", log_config=None, access_log=False, ws="none", server_header=False,
                proxy_headers=False, http="h11", loop="asyncio", timeout_graceful_shutdown=5,
            )
        )  # fmt: skip
        self._batcher, self._grace = api.batcher, grace

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal asks, the second insists; neither is raised again, for this is how a server ends."""
        self.force_exit, self.should_exit = self.should_exit, True

    async def shutdown(self, sockets: list | None = None) -> None:
        self._batcher.drain()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._grace):
                while self._batcher.busy and not self.force_exit:
                    await asyncio.sleep(0.02)
        await asyncio.to_thread(self._batcher.stop)
        await super().shutdown(sockets)
