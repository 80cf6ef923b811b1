"""`netsuke run MODEL --prompt TEXT`: run what was carved, text as it is made."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from netsuke.errors import NetsukeError
from netsuke.verb import verb


@verb
def run(
    model: str, prompt: str = "", new_tokens: int = 128, *, temperature: float = 0.0, top_p: float = 1.0,
    seed: int = 0, context: int | None = None, on_text: Callable[[str], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Completes `prompt` and returns {text, prompt, timings…}; `on_text` receives the pieces as they are made.

    Greedy at temperature 0. Raises NetsukeError for an unusable model or prompt.
    """
    if temperature < 0 or not 0 < top_p <= 1 or new_tokens < 1:
        raise NetsukeError(
            "run with these settings", f"temperature {temperature}, top-p {top_p}, tokens {new_tokens}",
            "temperature >= 0, 0 < top-p <= 1, tokens >= 1",
        )  # fmt: skip
    from netsuke.models.load import load
    from netsuke.models.tokenizer import Decoder
    from netsuke.runtime.generate import generate
    from netsuke.runtime.timings import Timings

    loaded = load(model)
    if loaded.tokenizer is None:
        raise NetsukeError(f"run {model}", "the model has no tokenizer", "tokenizer.json beside the weights")
    ids = loaded.tokenizer.encode(prompt, bos=True)
    timings, decoder, text = Timings(), Decoder(loaded.tokenizer), []
    for token in generate(
        loaded.model, ids, new_tokens, temperature=temperature, top_p=top_p, seed=seed, context=context, timings=timings
    ):
        piece = decoder.push(token)
        text.append(piece)
        if on_text:
            on_text(piece)
    text.append(tail := decoder.flush())
    if on_text and tail:
        on_text(tail)
    return {
        "model": model,
        "backend": "torch",
        "prompt": prompt,
        "text": "".join(text),
        "seed": seed,
        **timings.as_dict(),
    }


def register(app: typer.Typer) -> None:
    @app.command("run", help="Run a model: stream the completion of a prompt.")
    def command(
        model: Annotated[str, typer.Argument(help="artifact, Hugging Face folder, llama2.c file, or 'pycode'")],
        prompt: Annotated[str, typer.Option(help="text to complete")] = "",
        tokens: Annotated[int, typer.Option(help="at most this many new tokens")] = 128,
        temperature: Annotated[float, typer.Option(help="0 is greedy")] = 0.0,
        top_p: Annotated[float, typer.Option(help="nucleus sampling")] = 1.0,
        seed: Annotated[int, typer.Option(help="of the sampling")] = 0,
        context: Annotated[int | None, typer.Option(help="tokens of context; default: the model's")] = None,
        as_json: Annotated[bool, typer.Option("--json", help="one JSON object with timings")] = False,
    ) -> None:
        from netsuke.runtime.allocator import return_freed_memory

        return_freed_memory()  # so that the process takes what `netsuke plan` says; not for a host that imports us

        def stream(piece: str) -> None:
            sys.stdout.write(piece)
            sys.stdout.flush()

        if not as_json:
            stream(prompt)
        out = run(
            model, prompt, tokens, temperature=temperature, top_p=top_p, seed=seed, context=context,
            on_text=None if as_json else stream,
        )  # fmt: skip
        if as_json:
            print(json.dumps(out))
        else:
            rate = out["tokens_per_second"]
            speed = f", {rate:.1f} tokens/s" if rate else ""
            print(
                f"\n[{out['new_tokens']} tokens, first after {out['first_token_seconds'] * 1e3:.0f} ms{speed}]",
                file=sys.stderr,
            )
