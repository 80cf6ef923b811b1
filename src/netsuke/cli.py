"""The command line: one command per verb, each registered by the verb's own file.

Exit codes: 0 done, 1 a budget or a claim is not met, 2 misuse. A user's mistake is one sentence on standard error.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import Annotated

import typer

from netsuke import VERBS, __version__
from netsuke.errors import NetsukeError

app = typer.Typer(
    name="netsuke", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Carve a neural network until it fits the device you carry.",
)  # fmt: skip


def show_version(wanted: bool) -> None:
    if wanted:
        print(f"netsuke {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


# verbs that share their name with a folder keep their command in it
PACKAGES = ("devices", "compress", "train", "export", "bench")

for _verb in VERBS:
    importlib.import_module(f"netsuke.{_verb}.command" if _verb in PACKAGES else f"netsuke.{_verb}").register(app)


# applications: commands too, each in its own folder
APPS = ("bricks.command", "control.command", "signals.ecg.command", "signals.forecast.command")

for _app in APPS:
    importlib.import_module(f"netsuke.apps.{_app}").register(app)


def main() -> None:
    as_json = "--json" in sys.argv
    try:
        code = app(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except NetsukeError as e:
        fail(str(e), e.code, e.as_dict() if as_json else None)
    except typer.Exit as e:
        sys.exit(e.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        fail("stopped by you; nothing was left half-written", 130)
    except BrokenPipeError:  # `netsuke … | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except MemoryError:
        fail("this machine ran out of memory; see `netsuke plan MODEL --device this`", 1)
    except OSError as e:
        fail(f"{e.strerror or e}: {e.filename or ''}".strip(": "), 2)
    except Exception as e:
        # typer vendors or wraps click by version; its usage errors know how to show themselves
        if hasattr(e, "format_message"):
            fail(e.format_message().rstrip(".") + "; see --help", 2)
        raise


def fail(sentence: str, code: int, details: dict | None = None) -> None:
    if details is not None:
        print(json.dumps({"error": sentence, **details}))
    print(f"netsuke: {sentence}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
