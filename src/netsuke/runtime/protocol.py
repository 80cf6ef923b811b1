"""OpenAI's completion protocol as data: bodies that may come in, objects that go out.

Requests are decoded by type, so that a wrong one names its field; unknown fields are ignored. A field that would change the
answer and is not supported is refused unless it holds the value that changes nothing.
"""

from __future__ import annotations

import re
import time
import uuid
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from netsuke.models.tokenizer import Tokenizer
from netsuke.runtime.text_stream import Score

MOST_PROMPTS = 16  # in one request
MOST_STOPS, LONGEST_STOP = 4, 256
Whole = Annotated[int, Meta(ge=1)]


class ApiError(Exception):
    """An answer that is an error, in OpenAI's form."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, retry: int = 0):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry = status, message, param, code, retry

    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        if self.status == 429:
            kind = "rate_limit_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class StreamOptions(msgspec.Struct):
    include_usage: bool = False


class Common(msgspec.Struct, kw_only=True):
    """What both kinds of request share. The fields below the line are checked by `UNSUPPORTED`."""

    model: str | None = None
    max_tokens: Whole | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # --
    n: Any = None
    best_of: Any = None
    frequency_penalty: Any = None
    presence_penalty: Any = None
    logit_bias: Any = None

    def stops(self) -> list[str]:
        """Raises ApiError for too many, too long or empty stop strings."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > MOST_STOPS or not all(0 < len(s) <= LONGEST_STOP for s in stops):
            allowed = f"at most {MOST_STOPS} strings of 1 to {LONGEST_STOP} characters"
            raise ApiError(400, f"stop: {allowed} are allowed", "stop")
        return stops


class CompletionBody(Common, kw_only=True):
    prompt: str | list[str | int | list[int]]
    logprobs: Annotated[int, Meta(ge=0, le=5)] | None = None
    echo: Any = None
    suffix: Any = None

    def prompts(self) -> list[str | list[int]]:
        """One or more texts or lists of ids. Raises ApiError for a mixture, none, or too many."""
        given = self.prompt
        if isinstance(given, str):
            return [given]
        if given and all(isinstance(p, int) for p in given):
            return [given]
        if not 1 <= len(given) <= MOST_PROMPTS or len({type(p) for p in given}) > 1:
            allowed = f"a string, a list of token ids, or 1 to {MOST_PROMPTS} of either kind"
            raise ApiError(400, f"prompt: it must be {allowed}", "prompt")
        return given


class Part(msgspec.Struct):
    type: str
    text: str | None = None


class Message(msgspec.Struct):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None

    def as_dict(self, place: str) -> dict[str, str]:
        """{role, content} with the text parts joined. Raises ApiError for a part that is no text."""
        content = self.content or ""
        if isinstance(content, list):
            for i, part in enumerate(content):
                if part.type != "text" or part.text is None:
                    where = f"{place}.content[{i}]"
                    raise ApiError(400, f"{where}: type {part.type!r} is not supported, only text", where)
            content = "".join(part.text for part in content)
        return {"role": self.role, "content": content}


class ChatBody(Common, kw_only=True):
    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: Whole | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    tools: Any = None
    functions: Any = None
    response_format: Any = None


UNSUPPORTED: dict[str, tuple] = {  # field: the values that change nothing
    "n": (None, 1), "best_of": (None, 1), "frequency_penalty": (None, 0), "presence_penalty": (None, 0),
    "logit_bias": (None, {}), "echo": (None, False), "suffix": (None, ""), "tools": (None, []), "functions": (None, []),
    "response_format": (None, {"type": "text"}),
}  # fmt: skip


def decode(raw: bytes, kind: type[CompletionBody] | type[ChatBody]) -> CompletionBody | ChatBody:
    """The checked body of a request. Raises ApiError 400 that names the field."""
    try:
        body = msgspec.json.decode(raw, type=kind)
    except msgspec.ValidationError as e:
        message, _, path = str(e).partition(" - at `$")
        field = path.strip(".`")
        if missing := re.search(r"missing required field `(\w+)`", message):
            field = f"{field}.{missing[1]}".lstrip(".")
        raise ApiError(400, f"{field or 'body'}: {message}", field or None) from e
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise ApiError(400, f"the body is no valid JSON: {e}") from e
    except RecursionError as e:
        raise ApiError(400, "the body is nested too deeply") from e
    for field, neutral in UNSUPPORTED.items():
        value = getattr(body, field, None)
        if not any(value == n and isinstance(value, bool) == isinstance(n, bool) for n in neutral):
            allowed = " or ".join(msgspec.json.encode(n).decode() for n in neutral[1:])
            raise ApiError(400, f"{field}: this server supports only {allowed}", field, "unsupported_value")
    return body


def usage(prompt: int, answer: int, reused: int) -> dict[str, Any]:
    details = {"cached_tokens": reused}
    total = prompt + answer
    return {
        "prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": total, "prompt_tokens_details": details
    }  # fmt: skip


class Shape:
    """The objects of one answer. Its id, time and model are the same in every chunk."""

    prefix: str
    whole: str
    chunk: str

    def __init__(self, model: str, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def envelope(self, choices: list[dict[str, Any]], used: dict[str, Any] | None, chunk: bool) -> dict[str, Any]:
        out = {**self._head, "object": self.chunk if chunk else self.whole, "choices": choices}
        return out if used is None else {**out, "usage": used}

    def opening(self, index: int) -> list[dict[str, Any]]:
        """Choices that a stream sends before any text."""
        return []

    def choice(
        self, index: int, text: str, scores: list[Score] | None, finish: str | None, chunk: bool
    ) -> dict[str, Any]:
        """One choice, whole or as a chunk of a stream; `scores` is None when none were asked for."""
        raise NotImplementedError

    def _token(self, token: int) -> str:
        return self._tokenizer.decode([token])


class CompletionShape(Shape):
    prefix, whole, chunk = "cmpl", "text_completion", "text_completion"

    def choice(
        self, index: int, text: str, scores: list[Score] | None, finish: str | None, chunk: bool
    ) -> dict[str, Any]:
        logprobs = None
        if scores is not None:
            logprobs = {
                "tokens": [self._token(s.token) for s in scores],
                "token_logprobs": [s.logprob for s in scores],
                "top_logprobs": [{self._token(i): p for i, p in s.top} for s in scores],
                "text_offset": [s.offset for s in scores],
            }
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}


class ChatShape(Shape):
    prefix, whole, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self, index: int) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        return [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}]

    def choice(
        self, index: int, text: str, scores: list[Score] | None, finish: str | None, chunk: bool
    ) -> dict[str, Any]:
        if chunk:
            said: dict[str, Any] = {"delta": {"content": text} if text else {}}
        else:
            said = {"message": {"role": "assistant", "content": text, "refusal": None}}
        logprobs = None
        if scores is not None:
            content = [
                {**self._entry(s.token, s.logprob), "top_logprobs": [self._entry(*t) for t in s.top]} for s in scores
            ]
            logprobs = {"content": content, "refusal": None}
        return {"index": index, **said, "logprobs": logprobs, "finish_reason": finish}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._token(token)
        # part of a character has no text, and its bytes are not known here
        return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}
