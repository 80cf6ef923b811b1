"""`netsuke run MODEL --prompt TEXT`: run what was carved, text as it is made; `--input FILE` for networks that take pictures
or arrays (run_network.py)."""

from __future__ import annotations

import contextlib
import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from netsuke.errors import NetsukeError
from netsuke.verb import verb


@verb
def run(
    model: str, prompt: str = "", new_tokens: int = 128, *, temperature: float = 0.0, top_p: float = 1.0,
    seed: int = 0, context: int | None = None, backend: str = "native", kv: str = "float16",
    threads: int | None = None, on_text: Callable[[str], None] | None = None, inputs: Sequence[str] = (),
    emulate: str | None = None, out: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Completes `prompt` and returns {text, prompt, timings…}; `on_text` receives the pieces as they are made.

    backend  "native": the engine in C, which reads weights from the mapped file, or for a model with static grids the
             integer-only decoder; "integer": that one or nothing; "torch": the reference runtime
    kv       keys and values as "float16" or "int8" (the engine's; the reference keeps float32, the decoder int8)
    inputs   files for a small network, which has no prompt; `emulate` and `out` are for it too (run_network.py)

    Greedy at temperature 0. Raises NetsukeError for an unusable model, prompt or setting.
    """
    from netsuke.graph.read import is_graph

    if emulate or is_graph(model) or (Path(model) / "size.json").is_file():
        from netsuke.run_network import run_network

        return run_network(model, list(inputs), backend=backend, emulate=emulate, out=out)
    if inputs:
        raise NetsukeError(f"run {model}", "a language model takes --prompt, not --input", "--prompt TEXT")
    if temperature < 0 or not 0 < top_p <= 1 or new_tokens < 1 or (threads or 1) < 1:
        raise NetsukeError(
            "run with these settings", f"temperature {temperature}, top-p {top_p}, tokens {new_tokens}, threads {threads}",
            "temperature >= 0, 0 < top-p <= 1, tokens and threads >= 1",
        )  # fmt: skip
    from netsuke.models.tokenizer import Decoder, Tokenizer
    from netsuke.runtime.executors import executor_of, open_executor
    from netsuke.runtime.timings import Timings

    timings, sampling = Timings(), {"temperature": temperature, "top_p": top_p, "seed": seed}
    with contextlib.ExitStack() as stack:
        tokenizer: Tokenizer | None
        backend = executor_of(model, backend)
        if backend != "torch":
            from netsuke.runtime.engine import generate as decode

            engine = stack.enter_context(open_executor(model, backend, context=context, kv=kv, threads=threads))
            tokenizer, source = engine.tokenizer, functools.partial(decode, engine)
        else:
            import torch

            from netsuke.models.load import load
            from netsuke.runtime.generate import generate

            if threads:
                torch.set_num_threads(threads)
            loaded = load(model)
            tokenizer, source = loaded.tokenizer, functools.partial(generate, loaded.model, context=context)
        if tokenizer is None:
            raise NetsukeError(f"run {model}", "the model has no tokenizer", "tokenizer.json beside the weights")
        decoder, text = Decoder(tokenizer), []
        for token in source(tokenizer.encode(prompt, bos=True), new_tokens, timings=timings, **sampling):
            piece = decoder.push(token)
            text.append(piece)
            if on_text:
                on_text(piece)
    text.append(tail := decoder.flush())
    if on_text and tail:
        on_text(tail)
    return {
        "model": model, "backend": backend, "prompt": prompt, "text": "".join(text), "seed": seed, **timings.as_dict(),
    }  # fmt: skip


def register(app: typer.Typer) -> None:
    @app.command("run", help="Run a model: stream the completion of a prompt, or answer for pictures and arrays.")
    def command(
        model: Annotated[str, typer.Argument(help="a language model, a small network, or a folder of exported C")],
        prompt: Annotated[str, typer.Option(help="text to complete")] = "",
        tokens: Annotated[int, typer.Option(help="at most this many new tokens")] = 128,
        temperature: Annotated[float, typer.Option(help="0 is greedy")] = 0.0,
        top_p: Annotated[float, typer.Option(help="nucleus sampling")] = 1.0,
        seed: Annotated[int, typer.Option(help="of the sampling")] = 0,
        context: Annotated[int | None, typer.Option(help="tokens of context; default: the model's")] = None,
        backend: Annotated[
            str,
            typer.Option(
                help="native (C; in integers where activations have static grids), integer (only so), or the reference: "
                "torch for text, reference for small networks"
            ),
        ] = "native",
        kv: Annotated[str, typer.Option(help="keys and values as float16 or int8 (native)")] = "float16",
        threads: Annotated[int | None, typer.Option(help="default: one per core")] = None,
        inputs: Annotated[
            list[str] | None, typer.Option("--input", help="small networks: .npy or picture; repeatable")
        ] = None,
        emulate: Annotated[str | None, typer.Option(help="small networks: on an emulated board, m4 or m7")] = None,
        out: Annotated[str | None, typer.Option("-o", "--out", help="small networks: outputs as .npy")] = None,
        as_json: Annotated[bool, typer.Option("--json", help="one JSON object with timings")] = False,
    ) -> None:
        from netsuke.runtime.executors import has_static_grids

        if backend == "torch" or has_static_grids(model):
            from netsuke.runtime.allocator import return_freed_memory

            return_freed_memory()  # so that the process takes what `netsuke plan` says; not for a host that imports us

        def stream(piece: str) -> None:
            sys.stdout.write(piece)
            sys.stdout.flush()

        if not as_json:
            stream(prompt)
        got = run(
            model, prompt, tokens, temperature=temperature, top_p=top_p, seed=seed, context=context, backend=backend,
            kv=kv, threads=threads, on_text=None if as_json else stream, inputs=inputs or [], emulate=emulate, out=out,
        )  # fmt: skip
        if as_json:
            print(json.dumps(got))
        elif "text" not in got:
            from netsuke.run_network import show

            show(got)
        else:
            rate = got["tokens_per_second"]
            speed = f", {rate:.1f} tokens/s" if rate else ""
            print(
                f"\n[{got['new_tokens']} tokens, first after {got['first_token_seconds'] * 1e3:.0f} ms{speed}]",
                file=sys.stderr,
            )
