"""`netsuke bricks find|list|run|prune|add|merge|edit|trace`: see a language model as parts that do jobs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from netsuke.errors import NetsukeError

Model = Annotated[str, typer.Argument(help="artifact, Hugging Face folder, llama2.c file, or a shipped name")]
Bricks = Annotated[str | None, typer.Option(help="the manifest; default: beside the weights")]
Json = Annotated[bool, typer.Option("--json", help="one JSON object")]
Length = Annotated[int, typer.Option(help="tokens of one instance of a text")]
Count = Annotated[int, typer.Option(help="instances of a skill, at most")]


def register(app: typer.Typer) -> None:
    bricks = typer.Typer(
        no_args_is_help=True, help="Find the parts of a model that do each job; run, cut and add them."
    )
    bricks.command("find", help="Name the neurons of each skill, and measure what cutting them harms.")(find)
    bricks.command("list", help="The bricks of a model.")(show)
    bricks.command("run", help="Complete a prompt with some bricks alone, or with plugins.")(run)
    bricks.command("prune", help="Write a smaller artifact without some bricks.")(prune)
    bricks.command("add", help="Add a plugin file, or learn a new plugin from texts.")(add)
    bricks.command("merge", help="One plugin from several: --weights .7 .3, or .7,.3; negative ones subtract.")(merge)
    bricks.command("edit", help="Change one fact: a plugin of rank one.")(edit)
    bricks.command("trace", help="Which bricks answer to a prompt.")(trace)
    app.add_typer(bricks, name="bricks")


def working(act: Callable[..., dict[str, Any]], *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Calls a function of this folder under a progress bar on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    note = Console(stderr=True)
    columns = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=note, transient=True, disable=not note.is_terminal) as bar:
        task = bar.add_task("reading")

        def tell(name: str, done: int, total: int) -> None:
            bar.update(task, description=name, completed=done, total=total or None)

        return act(*args, **kwargs, on_progress=tell)


def names_of(text: str | None) -> list[str] | None:
    """ "math,knowledge" -> ["math", "knowledge"]. Raises NetsukeError for an empty name."""
    if text is None:
        return None
    names = [n.strip() for n in text.split(",")]
    if not all(names):
        raise NetsukeError(f"use the bricks {text!r}", "a name is empty", "names divided by commas")
    return names


def print_table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for i, column in enumerate(head):
        table.add_column(column, no_wrap=i == 0)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def find(
    model: Model,
    skills: Annotated[str, typer.Option(help="DIR with DIR/<skill>/*.txt, or: domains")],
    out: Annotated[str | None, typer.Option("-o", "--out", help="NAME.netsuke or a .json; default: beside")] = None,
    share: Annotated[float, typer.Option(help="of each layer's neurons that are a brick")] = 0.05,
    length: Length = 64,
    count: Count = 400,
    indicator: Annotated[str, typer.Option(help="activation or output")] = "activation",
    judge: Annotated[bool, typer.Option(help="cut each brick and measure all skills")] = True,
    as_json: Json = False,
) -> None:
    from netsuke.apps.bricks import neurons
    from netsuke.devices import format_bytes

    got = working(
        neurons.find, model, skills, out=out, share=share, length=length, count=count, indicator=indicator, judge=judge
    )
    if as_json:
        print(json.dumps(got))
        return
    print_table(
        ("brick", "neurons", "bytes", "precision", "best neuron", "best by luck", "knowing nothing"),
        [
            (s, f"{v['neurons']:,}", format_bytes(v["bytes"]), f"{v['precision']:.2f}", f"{v['best']:.2f}",
             f"{v['best_by_luck']:.2f}", f"{v['random']:.2f}")
            for s, v in got["skills"].items()
        ],
    )  # fmt: skip
    if verdict := got["judged"]:
        skilled = list(verdict["loss"])
        rows = [("as it is, nats", *(f"{verdict['loss'][s]:.3f}" for s in skilled), "")]
        for name, nats in verdict["harm"].items():
            most = verdict["hurts_most"][name]
            cells = (f"{nats[s]:+.3f}" for s in skilled)
            rows.append((f"no {name}", *cells, "its own" if most == name else f"NOT its own: {most}"))
        rows.append(("no, by lot", *(f"{verdict['random'][s]:+.3f}" for s in skilled), ""))
        print_table(("", *skilled, "hurts most"), rows)
    else:
        print("not judged: too few texts to hold some back (63 or more instances of each skill), or --no-judge")
    print(f"bricks    {got['manifest']}")


def show(model: Model, bricks: Bricks = None, as_json: Json = False) -> None:
    from netsuke.apps.bricks import neurons
    from netsuke.devices import format_bytes

    got = neurons.list_bricks(model, bricks=bricks)
    if as_json:
        print(json.dumps(got))
        return

    def scores(b: dict[str, Any]) -> str:
        unit = "precision" if b["kind"] == "neurons" else "nats gained"
        return ", ".join(f"{s}: {unit} {v:.2f}" for s, v in b["skills"].items())

    def parts(b: dict[str, Any]) -> str:
        return f"{b['neurons']:,} neurons" if b["kind"] == "neurons" else f"{b['maps']} maps"

    print_table(
        ("brick", "kind", "skill", "of", "bytes"),
        [
            (b["id"], b["kind"], scores(b), parts(b), f"{format_bytes(b['bytes'])}, {b['share']:.2%}")
            for b in got["bricks"]
        ],
    )
    for b in got["bricks"]:
        if not b["there"]:
            print(f"missing   {b['file']}, of the brick {b['id']}")
    print(f"bricks    {got['manifest']}")


def run(
    model: Model,
    prompt: Annotated[str, typer.Option(help="text to complete")] = "",
    only: Annotated[str | None, typer.Option(help="bricks or skills, by commas: all others are cut out")] = None,
    also: Annotated[str | None, typer.Option("--with", help="plugins to attach, by commas")] = None,
    tokens: Annotated[int, typer.Option(help="at most this many new tokens")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy")] = 0.0,
    top_p: Annotated[float, typer.Option(help="nucleus sampling")] = 1.0,
    seed: Annotated[int, typer.Option(help="of the sampling")] = 0,
    bricks: Bricks = None,
    as_json: Json = False,
) -> None:
    from netsuke.apps.bricks import neurons

    def stream(piece: str) -> None:
        sys.stdout.write(piece if started else prompt + piece)
        started.append(True)
        sys.stdout.flush()

    started: list[bool] = []  # the prompt is shown with the first piece: before it, nothing has been refused yet
    got = neurons.run(
        model, prompt, tokens, only=names_of(only), also=names_of(also) or (), temperature=temperature, top_p=top_p,
        seed=seed, bricks=bricks, on_text=None if as_json else stream,
    )  # fmt: skip
    if as_json:
        print(json.dumps(got))
        return
    without = f", without {', '.join(got['without'])}" if got["without"] else ""
    share = got["bytes"] / got["bytes_before"]
    print(f"\n[{', '.join(got['bricks']) or 'no brick'}{without}: {share:.1%} of the bytes]", file=sys.stderr)


def prune(
    model: Model,
    out: Annotated[str, typer.Option("-o", "--out", help="the artifact to write, NAME.netsuke")],
    remove: Annotated[str | None, typer.Option(help="bricks or skills, by commas")] = None,
    only: Annotated[str | None, typer.Option(help="in place of --remove: what stays")] = None,
    skills: Annotated[str | None, typer.Option(help="as in find: measure before and after")] = None,
    length: Length = 64,
    count: Count = 400,
    bricks: Bricks = None,
    as_json: Json = False,
) -> None:
    from netsuke.apps.bricks import neurons
    from netsuke.devices import format_bytes

    got = working(
        neurons.prune, model, out, remove=names_of(remove) or (), only=names_of(only), skills=skills, length=length,
        count=count, bricks=bricks,
    )  # fmt: skip
    if as_json:
        print(json.dumps(got))
        return
    rows = [("bytes of weights", *map(format_bytes, got["bytes"]), f"{got['bytes'][1] / got['bytes'][0] - 1:+.1%}")]
    rows += [(f"{s}, nats", f"{a:.3f}", f"{b:.3f}", f"{b - a:+.3f}") for s, (a, b) in got["losses"].items()]
    print_table(("", "before", "after", "change"), rows)
    print(f"removed   {', '.join(got['removed'])} ({got['neurons']:,} neurons)")
    print(f"left      {', '.join(got['left']) or 'no brick'}")
    if got["left_behind"]:
        print(f"behind    {', '.join(got['left_behind'])}: made for the whole model")
    print(f"artifact  {got['artifact']}")


def add(
    model: Model,
    source: Annotated[str, typer.Argument(help="a plugin, .safetensors, or a file or folder of texts to learn from")],
    name: Annotated[str | None, typer.Option(help="its id; default: the plugin's or the folder's")] = None,
    rank: Annotated[int, typer.Option(help="texts: of the thin maps")] = 4,
    steps: Annotated[int, typer.Option(help="texts: of training")] = 60,
    length: Length = 64,
    count: Count = 400,
    bricks: Bricks = None,
    as_json: Json = False,
) -> None:
    from netsuke.apps.bricks import plugins

    got = working(
        plugins.add, model, source, name=name, rank=rank, steps=steps, length=length, count=count, bricks=bricks
    )
    if as_json:
        print(json.dumps(got))
        return
    learned = ""
    if got["losses"]:
        before, after = got["losses"]
        learned = f"; its texts, held back: {before:.3f} nats, with it {after:.3f}"
    print(f"{got['id']}: {got['bytes']:,} bytes in {got['file']}{learned}")
    print(f"bricks    {got['manifest']}")


def merge(
    model: Model,
    names: Annotated[list[str], typer.Argument(help="ids of plugins or plugin files")],
    weights: Annotated[list[str], typer.Option(help=".7 .3, or .7,.3; one each, the same order")],
    out: Annotated[str | None, typer.Option("-o", "--out", help="a .safetensors file; default: a brick")] = None,
    name: Annotated[str | None, typer.Option(help="the id of the result; default: a+b")] = None,
    how: Annotated[str, typer.Option(help="products, or factors (equal ranks)")] = "products",
    rank: Annotated[int | None, typer.Option(help="cut the sum of products to this rank")] = None,
    bricks: Bricks = None,
    as_json: Json = False,
) -> None:
    from netsuke.apps.bricks import plugins

    names, numbers = weighted(names, weights)
    got = plugins.merge_bricks(model, names, numbers, out=out, name=name, how=how, rank=rank, bricks=bricks)
    if as_json:
        print(json.dumps(got))
        return
    ranks = " to ".join(map(str, sorted({got["ranks"][0], got["ranks"][-1]})))
    print(
        f"{got['id']}: rank {ranks}, {got['bytes']:,} bytes in {got['file']}; the plugins it comes from are still there"
    )


def weighted(names: list[str], weights: list[str]) -> tuple[list[str], list[float]]:
    """`a b --weights .7 .3` arrives as names a, b, .3 and the weight .7: what is missing of the weights stands after the names.
    Raises NetsukeError for weights that are no numbers."""
    given = [part for w in weights for part in w.split(",")]
    missing = max(0, (len(names) - len(given)) // 2) if (len(names) - len(given)) % 2 == 0 else 0
    if missing:
        given, names = given + names[-missing:], names[:-missing]
    try:
        return names, [float(w) for w in given]
    except ValueError:
        raise NetsukeError(
            f"merge {' and '.join(names)}", f"the weights are {' '.join(given)}", "one number for each brick, .7 .3"
        ) from None


def edit(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="'The capital of {France} is'")],
    target: Annotated[str, typer.Argument(help="what shall follow")],
    subject: Annotated[str | None, typer.Option(help="in place of braces; default: the last word in capitals")] = None,
    name: Annotated[str | None, typer.Option(help="its id; default: subject and target")] = None,
    block: Annotated[int | None, typer.Option(help="whose down map changes; default: the second")] = None,
    steps: Annotated[int, typer.Option(help="of the search for the change")] = 40,
    harm: Annotated[float, typer.Option(help="largest relative change of other text's loss")] = 0.01,
    text: Annotated[str | None, typer.Option(help="other text, not to be changed; default: built-in")] = None,
    length: Length = 64,
    bricks: Bricks = None,
    as_json: Json = False,
) -> None:
    from netsuke.apps.bricks import plugins

    got = working(
        plugins.edit, model, prompt, target, subject=subject, name=name, block=block, steps=steps, harm=harm,
        text=text, length=length, bricks=bricks,
    )  # fmt: skip
    if as_json:
        print(json.dumps(got))
        return
    was = "as before" if got["before"] else "as it did not before"
    print(
        f"{got['id']}: {target!r} follows, {was}; subject {got['subject']!r}; other text's loss {got['other_text']:+.2%}; "
        f"{got['bytes']:,} bytes in {got['file']}"
    )
    print(f'try       netsuke bricks run {model} --with {got["id"]} --prompt "…"')


def trace(
    model: Model,
    prompt: Annotated[str, typer.Option(help="the text")],
    bricks: Bricks = None,
    as_json: Json = False,
) -> None:
    from netsuke.apps.bricks import neurons

    got = neurons.trace(model, prompt, bricks=bricks)
    if as_json:
        print(json.dumps(got))
        return

    def told(v: dict[str, Any]) -> str:
        return "" if v["fired"] is None else "fired" if v["fired"] else "no"

    rows = [
        (n, "neurons", f"{v['strength']:.2f}", "" if v["share"] is None else f"{v['share']:+.0%}", told(v))
        for n, v in sorted(got["neurons"].items(), key=lambda item: -(item[1]["share"] or item[1]["strength"]))
    ]
    rows += [
        (n, "plugin", f"distance {d:.2f}", "", "nearest" if n == got["nearest"] else "")
        for n, d in sorted(got["plugins"].items(), key=lambda item: item[1])
    ]
    print_table(("brick", "kind", "strength", "0 % other text, 100 % its own", ""), rows)
