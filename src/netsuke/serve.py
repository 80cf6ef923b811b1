"""`netsuke serve MODEL`: an OpenAI-compatible server on the native engine, or in integers for models with static grids."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from netsuke.errors import NetsukeError
from netsuke.verb import verb

FEW = 3  # slots up to which input-sparse maps save reading: four times half of the channels are 94 % of them


@verb
def serve(
    model: str, host: str = "127.0.0.1", port: int = 8080, *, slots: int = 4, context: int | None = None,
    queue: int = 64, threads: int | None = None, kv: str = "float16", chat_template: str | Path | None = None,
    timeout: float = 600.0, grace: float = 10.0, on_ready: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Serves until SIGINT or SIGTERM and returns {url, model, requests, …}; `on_ready` receives {url, model, backend, …,
    and perhaps a `note`} when requests are welcome. Port 0 takes a free one.

    slots    prompts that run at a time, each with memory for `context` tokens; `queue` more may wait
    timeout  seconds for a whole answer; grace: seconds that running answers get when the server stops
    Raises NetsukeError for an unusable model, settings or port, and when the `serve` extra is not installed.
    """
    if slots < 1 or queue < 1 or timeout <= 0 or grace < 0 or not 0 <= port < 65536 or (threads or 1) < 1:
        raise NetsukeError(
            "serve with these settings",
            f"slots {slots}, queue {queue}, threads {threads}, timeout {timeout}, grace {grace}, port {port}",
            "slots, queue and threads >= 1, timeout > 0, grace >= 0, port 0 to 65535",
        )  # fmt: skip
    try:
        from netsuke.runtime.http import Api, Server
    except ModuleNotFoundError as e:
        if (e.name or "").partition(".")[0] not in ("starlette", "uvicorn"):
            raise
        raise NetsukeError(
            "serve a model", f"the package {e.name} is not installed", "", "pip install 'netsuke[serve]'"
        ) from e
    from netsuke.runtime.batching import Batcher
    from netsuke.runtime.chat import Chat
    from netsuke.runtime.engine import Sampler
    from netsuke.runtime.executors import open_executor

    with listen(host, port) as listener:  # before the model is read: a port in use is known at once
        engine = open_executor(model, context=context, slots=slots, threads=threads, kv=kv)
        try:
            if engine.tokenizer is None:
                raise NetsukeError(f"serve {model}", "the model has no tokenizer", "a model with its tokenizer")
            folder = Path(model) if Path(model).is_dir() else None
            chat = Chat.find(engine.tokenizer, folder, Path(chat_template) if chat_template else None)
            sparse = any(spec["kind"] == "sparse" for spec in engine.manifest["layers"].values())
            batcher = Batcher(engine, queue, reuse_answers=not sparse)
            try:
                name = Path(model).resolve().name.removesuffix(".netsuke")
                api = Api(batcher, engine.tokenizer, chat, name, Sampler, answer_seconds=timeout)
                where = {
                    "url": url_of(listener), "model": name, "backend": engine.backend, "slots": slots,
                    "context": engine.context,
                }  # fmt: skip
                if sparse and slots > FEW:
                    where["note"] = (
                        f"input-sparse maps read every channel that any of the busy slots needs: with {slots} of them "
                        "nearly all; --slots 1 keeps what sparsity saves"
                    )
                if on_ready:
                    on_ready(where)
                Server(api, grace).run(sockets=[listener])
            finally:
                batcher.stop()
        finally:
            engine.close()
    counts = batcher.counts
    done = {"requests": sum(counts.outcomes.values()), "generated_tokens": counts.answer_tokens}
    return {**where, **done, "outcomes": dict(counts.outcomes)}


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises NetsukeError for a port in use, a name that is no address, or one not allowed."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address, family=family, backlog=2048)
    except (OSError, UnicodeError) as e:
        text = e.strerror if isinstance(e, OSError) and e.strerror else str(e)
        raise NetsukeError(
            f"listen on {host}:{port}", text, "a free port of an address of this machine", "--port 0 for any free port"
        ) from e


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def register(app: typer.Typer) -> None:
    @app.command("serve", help="Serve a model over HTTP, as OpenAI's interface.")
    def command(
        model: Annotated[str, typer.Argument(help="artifact, Hugging Face folder, llama2.c or GGUF file, or 'pycode'")],
        host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
        port: Annotated[int, typer.Option(help="0: any free port")] = 8080,
        slots: Annotated[int, typer.Option(help="prompts that run at a time")] = 4,
        context: Annotated[
            int | None, typer.Option(help="tokens of context of each slot; default: the model's")
        ] = None,
        queue: Annotated[int, typer.Option(help="prompts that may wait; more are answered with 429")] = 64,
        threads: Annotated[int | None, typer.Option(help="of the engine")] = None,
        kv: Annotated[str, typer.Option(help="keys and values as float16 or int8")] = "float16",
        chat_template: Annotated[Path | None, typer.Option(help="Jinja file; default: the model's own")] = None,
        timeout: Annotated[float, typer.Option(help="seconds for a whole answer")] = 600.0,
        grace: Annotated[float, typer.Option(help="seconds for running answers when the server stops")] = 10.0,
        as_json: Annotated[bool, typer.Option("--json", help="JSON lines: when ready, and at the end")] = False,
    ) -> None:
        def ready(where: dict[str, Any]) -> None:
            if as_json:
                print(json.dumps(where), flush=True)
            else:
                if "note" in where:
                    print(f"note: {where['note']}", file=sys.stderr)
                print(f"{where['model']} at {where['url']}/v1 (Ctrl-C stops it)", file=sys.stderr)

        out = serve(
            model, host, port, slots=slots, context=context, queue=queue, threads=threads, kv=kv,
            chat_template=chat_template, timeout=timeout, grace=grace, on_ready=ready,
        )  # fmt: skip
        if as_json:
            print(json.dumps(out))
        else:
            print(f"{out['requests']} requests, {out['generated_tokens']} tokens", file=sys.stderr)
