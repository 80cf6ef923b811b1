"""A conversation as the text that a model was trained to continue.

A model's own template (`chat_template.jinja` in its folder, or a file the user names) is Jinja, rendered as Hugging Face
renders it: sandboxed, with `messages`, `add_generation_prompt`, `bos_token` and `eos_token`. A model without one gets a plain
transcript, "role: content" line by line, and stops before it speaks for the user.
"""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from netsuke.errors import NetsukeError
from netsuke.models.tokenizer import ScoredTokenizer, Tokenizer

TEMPLATE = "chat_template.jinja"
LARGEST_TEMPLATE = 1_000_000  # bytes; the longest in the wild has under 20 000
TRANSCRIPT_STOPS = ("\nuser:", "\nsystem:")


class Chat:
    """Renders messages [{role, content}]. `stops` end an answer beside those of the request."""

    def __init__(self, tokenizer: Tokenizer, template: str | None = None, source: str | Path = TEMPLATE):
        self._tokenizer, self.stops = tokenizer, () if template else TRANSCRIPT_STOPS
        self._bos, eos = (special_text(tokenizer, i) for i in (tokenizer.bos, next(iter(tokenizer.eos), None)))
        self._names = {"bos_token": self._bos, "eos_token": eos}
        self._template = _compile(template, source) if template else None

    @classmethod
    def find(cls, tokenizer: Tokenizer, folder: Path | None, file: Path | None = None) -> Chat:
        """With the user's template file, the model folder's, or none. Raises NetsukeError when it cannot be used."""
        path = file or (folder / TEMPLATE if folder else None)
        if path is None or (file is None and not path.is_file()):
            return cls(tokenizer)
        try:
            if path.stat().st_size > LARGEST_TEMPLATE:
                raise NetsukeError(f"use the chat template {path}", f"{path.stat().st_size} bytes", "at most 1 MB")
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            found = e.strerror if isinstance(e, OSError) and e.strerror else str(e)
            raise NetsukeError(f"use the chat template {path}", found, "a readable Jinja file") from e
        return cls(tokenizer, text, path)

    def text(self, messages: list[dict[str, str]]) -> str:
        """The prompt. Raises NetsukeError when the template refuses these messages."""
        if self._template is None:
            return "".join(f"{m['role']}: {m['content']}\n" for m in messages) + "assistant:"
        from jinja2 import TemplateError

        try:
            return self._template.render(messages=messages, add_generation_prompt=True, **self._names)
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError, RecursionError) as e:
            raise NetsukeError("render these messages", f"the chat template says: {e}") from e

    def encode(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids; the start token is added unless the template wrote it."""
        text = self.text(messages)
        return self._tokenizer.encode(text, bos=not (self._bos and text.startswith(self._bos)))


def special_text(tokenizer: Tokenizer, token: int | None) -> str:
    """How a special token is written in text; empty when it has no text of its own."""
    if token is None:
        return ""
    if isinstance(tokenizer, ScoredTokenizer):
        return tokenizer.pieces[token].decode("utf-8", "replace")
    added = json.loads(tokenizer.to_bytes()).get("added_tokens") or []
    return next((a["content"] for a in added if a["id"] == token), "")


def _compile(template: str, source: str | Path) -> Any:
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> NoReturn:
        raise TemplateError(message)

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    env.globals["raise_exception"] = refuse
    env.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    # Jinja's own `tojson` escapes for HTML; templates mean plain JSON
    env.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    try:
        return env.from_string(template)
    except (TemplateError, RecursionError) as e:
        raise NetsukeError(f"use the chat template {source}", str(e), "a Jinja template") from e
