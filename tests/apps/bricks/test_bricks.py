"""`netsuke bricks` as a user meets it: found, listed, run, pruned, grown, merged, edited, traced; mistakes are one sentence."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch

from netsuke.apps import bricks
from netsuke.compress.adapters import Plugin, read_plugin
from netsuke.compress.bricks import fingerprint, read_manifest
from netsuke.models.llama import LlamaConfig, random_llama
from netsuke.models.load import load
from netsuke.models.weights import write_safetensors
from tests.models import hostile
from tests.test_cli import netsuke, refused

LETTERS = {"digits": "0123456789+-= ", "shouts": "ABCDEFGHIJKL! "}
SHORT = ("--length", "12", "--count", "80")


def write_skill(folder: Path, letters: str, files: int = 12, length: int = 12) -> None:
    """Random texts of these letters; eight instances of `length` bytes in each file."""
    folder.mkdir(parents=True)
    rng = random.Random(letters)
    for i in range(files):
        (folder / f"{i}.txt").write_text("".join(rng.choices(letters, k=8 * length + 3)))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a model, skills, its bricks and a plugin; copied by each test."""
    folder = tmp_path_factory.mktemp("bricks")
    cfg = LlamaConfig.uniform(
        2, 128, vocab=300, width=48, heads=4, kv_heads=2, head_dim=12, context=64, bos=0, eos=(299,)
    )
    hostile.artifact(folder, random_llama(cfg, 0, std=0.2))
    for name, letters in LETTERS.items():
        write_skill(folder / "skills" / name, letters)
    write_skill(folder / "small talk", "hello world, ")
    bricks.find(str(folder / "tiny.netsuke"), str(folder / "skills"), share=0.1, length=12, count=80)
    bricks.add(str(folder / "tiny.netsuke"), str(folder / "small talk"), name="talk", steps=6, length=12, count=80)
    return folder


@pytest.fixture
def work(made, tmp_path, monkeypatch) -> Path:
    shutil.copytree(made, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def call(monkeypatch, capsys):
    def said(*args: str) -> dict:
        code, out, err = netsuke(monkeypatch, capsys, "bricks", *args, "--json")
        assert code == 0, err
        return json.loads(out)

    return said


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_find_names_the_neurons_of_each_skill(work, call, monkeypatch, capsys):
    before = (work / "tiny.netsuke/weights.safetensors").read_bytes()
    got = call("find", "tiny.netsuke", "--skills", "skills", "-o", "mine.json", "--share", "0.1", *SHORT)
    assert got["manifest"] == "mine.json" and read_manifest(work / "mine.json").base == got["base"]
    assert got["instances"]["digits"] == {"found": 64, "held": 16}
    for skill in LETTERS:
        v = got["skills"][skill]
        assert v["neurons"] == 2 * 13 and v["random"] == 0.5 < v["best_by_luck"] < v["best"]
        assert got["judged"]["hurts_most"][skill] in LETTERS
    assert (work / "tiny.netsuke/weights.safetensors").read_bytes() == before
    again = call("find", "tiny.netsuke", "--skills", "skills", "-o", "copy", "--share", "0.1", "--no-judge", *SHORT)
    assert again["judged"] is None and again["skills"] == got["skills"]
    copy = load("copy.netsuke")  # the artifact is whole, with its bricks in it and the plugin that was there
    assert fingerprint(copy.model) == got["base"]
    assert {b["id"] for b in call("list", "copy.netsuke")["bricks"]} == {"digits", "shouts", "talk"}
    code, out, _ = netsuke(monkeypatch, capsys, "bricks", "find", "tiny.netsuke", "--skills", "skills", *SHORT)
    assert code == 0 and "by lot" in out and "no digits" in out


@torch.no_grad()
def test_the_harm_is_that_of_the_cut_on_texts_held_back(work, call):
    got = call("find", "tiny.netsuke", "--skills", "skills", "-o", "m.json", "--share", "0.1", *SHORT)
    pruned = call("prune", "tiny.netsuke", "--remove", "digits", "-o", "p", "--skills", "skills", *SHORT)
    for skill, (whole, cut) in pruned["losses"].items():
        assert whole == pytest.approx(got["judged"]["loss"][skill])
        assert cut - whole == pytest.approx(got["judged"]["harm"]["digits"][skill], abs=1e-6)


def test_list_shows_every_brick_and_what_is_missing(work, call, monkeypatch, capsys):
    rows = {b["id"]: b for b in call("list", "tiny.netsuke")["bricks"]}
    assert rows["digits"]["kind"] == "neurons" and rows["digits"]["neurons"] == 26
    assert rows["digits"]["bytes"] == 26 * 3 * 48 * 4 and rows["digits"]["share"] < 0.2
    assert rows["talk"]["kind"] == "adapter" and rows["talk"]["file"] == "brick-talk.safetensors"
    (work / "tiny.netsuke/brick-talk.safetensors").unlink()
    code, out, _ = netsuke(monkeypatch, capsys, "bricks", "list", "tiny.netsuke")
    assert code == 0 and "missing   brick-talk.safetensors" in out


def test_run_with_some_bricks_answers_as_the_pruned_model(work, call):
    got = call("run", "tiny.netsuke", "--only", "digits", "--prompt", "12+", "--tokens", "6")
    assert got["without"] == ["shouts"] and got["bytes"] < got["bytes_before"]
    pruned = call("prune", "tiny.netsuke", "--remove", "shouts", "-o", "small")
    assert pruned["bytes"] == [got["bytes_before"], got["bytes"]] and pruned["left"] == ["digits"]
    again = call("run", "small.netsuke", "--prompt", "12+", "--tokens", "6")
    assert again["text"] == got["text"] and again["bricks"] == ["digits"]
    plain = call("run", "tiny.netsuke", "--prompt", "12+", "--tokens", "6")
    talk = call("run", "tiny.netsuke", "--prompt", "12+", "--tokens", "6", "--with", "talk")
    assert plain["bytes"] == plain["bytes_before"] and talk["bricks"] == ["digits", "shouts", "talk"]
    both = call("run", "tiny.netsuke", "--only", "talk", "--prompt", "12+", "--tokens", "6")
    assert both["bricks"] == ["talk"] and both["without"] == ["digits", "shouts"]


def test_run_streams_the_prompt_and_its_completion(work, call, monkeypatch, capsys):
    text = call("run", "tiny.netsuke", "--prompt", "12+", "--tokens", "6")["text"]
    code, out, err = netsuke(monkeypatch, capsys, "bricks", "run", "tiny.netsuke", "--prompt", "12+", "--tokens", "6")
    assert code == 0 and out == "12+" + text + "\n"[:0] and "100.0% of the bytes" in err


def test_prune_writes_a_smaller_artifact_with_the_other_bricks(work, call):
    got = call("prune", "tiny.netsuke", "--only", "digits", "-o", "less")
    size = {n: sum(map(len, tree(work / n).values())) for n in ("tiny.netsuke", "less.netsuke")}
    assert size["less.netsuke"] < size["tiny.netsuke"] and got["neurons"] > 0
    smaller = load("less.netsuke").model
    left = read_manifest(work / "less.netsuke/bricks.json")
    assert left.base == fingerprint(smaller) and [b.id for b in left.bricks] == ["digits"]
    whole, old = load("tiny.netsuke").model, read_manifest(work / "tiny.netsuke/bricks.json")
    for site, chosen in left.brick("digits").sites.items():
        i = int(site.split(".")[1])
        rows = whole.blocks[i].gate.weight[list(old.brick("digits").sites[site])]
        assert torch.equal(smaller.blocks[i].gate.weight[list(chosen)], rows)
    assert got["left_behind"] == ["talk"]
    bare = call("prune", "tiny.netsuke", "--remove", "talk", "-o", "bare")  # a plugin is taken off: the weights stay
    assert bare["bytes"][0] == bare["bytes"][1] and bare["left"] == ["digits", "shouts"]
    assert not (work / "bare.netsuke/brick-talk.safetensors").exists()


def test_add_learns_from_texts_and_takes_files(work, call):
    first = read_plugin(work / "tiny.netsuke/brick-talk.safetensors")
    assert first.skills["talk"] > 0  # it learned something of texts held back
    shutil.copy(work / "tiny.netsuke/brick-talk.safetensors", work / "other.safetensors")
    got = call("add", "tiny.netsuke", "other.safetensors", "--name", "twin")
    twin = read_plugin(work / "tiny.netsuke" / got["file"])
    assert twin.id == "twin" and twin.parents == ("talk",) and got["losses"] is None
    assert all(torch.equal(a, b) for n in first.thin for a, b in zip(first.thin[n], twin.thin[n]))
    fresh = call("add", "tiny.netsuke", "other.safetensors", "--bricks", "fresh.json")  # a manifest begins with it
    assert fresh["file"] == "other.safetensors"  # it lies there already
    assert fresh["manifest"] == "fresh.json" and [b.id for b in read_manifest(work / "fresh.json").bricks] == ["talk"]


def test_bricks_lie_beside_any_model_and_apart_from_each_other(work, call, monkeypatch, capsys):
    folder = hostile.hf_folder(work / "hf")
    before = tree(folder)
    got = call("find", "hf", "--skills", "skills", *SHORT)
    assert got["manifest"] == "hf/bricks.json" and before.items() <= tree(folder).items()
    refused(netsuke(monkeypatch, capsys, "bricks", "list", hostile.llama2c_file(work)), "tiny.bricks.json")
    for name in ("one", "two"):  # the same id in two manifests of one folder
        call("add", "tiny.netsuke", "skills/digits", "--steps", "1", "--bricks", f"{name}.json", *SHORT)
    assert {p.name for p in work.glob("*.safetensors")} == {f"{n}-brick-digits.safetensors" for n in ("one", "two")}


def test_merge_adds_products_and_keeps_the_originals(work, call):
    call("add", "tiny.netsuke", "skills/digits", "--name", "numbers", "--steps", "2", "--rank", "2", *SHORT)
    kept = tree(work / "tiny.netsuke")
    got = call("merge", "tiny.netsuke", "talk", "numbers", "--weights", ".7", ".3", "-o", "both.safetensors")
    a, b, both = (read_plugin(work / f) for f in (
        "tiny.netsuke/brick-talk.safetensors", "tiny.netsuke/brick-numbers.safetensors", "both.safetensors"))  # fmt: skip
    assert (
        got["weights"] == [0.7, 0.3] and got["parents"] == ["talk", "numbers"] and tree(work / "tiny.netsuke") == kept
    )
    name = "blocks.0.down"
    product = [p.thin[name][1].double() @ p.thin[name][0].double() for p in (a, b, both)]
    torch.testing.assert_close(product[2], 0.7 * product[0] + 0.3 * product[1], rtol=1e-4, atol=1e-7)
    call("merge", "tiny.netsuke", "talk", "both.safetensors", "--weights=1,-.5", "--name", "less", "--rank", "3")
    assert {b["id"] for b in call("list", "tiny.netsuke")["bricks"]} >= {"less", "talk", "numbers"}


def test_edit_makes_a_fact_follow(work, call, monkeypatch, capsys):
    """A random model moves little from token to token: the subject is the last token, the target one token."""
    ask = (
        "edit",
        "tiny.netsuke",
        "7 9 {q}",
        ":",
        "--text",
        "skills",
        "--harm",
        "9",
        "--name",
        "fact",
        "--block",
        "0",
        "--length",
        "12",
    )
    got = call(*ask, "--steps", "80")
    assert got["after"] and not got["before"] and got["subject"] == "q" and got["bytes"] == 4 * (128 + 48)
    said = call("run", "tiny.netsuke", "--with", "fact", "--prompt", "7 9 q", "--tokens", "1")
    assert said["text"] == ":"
    assert call("run", "tiny.netsuke", "--prompt", "7 9 q", "--tokens", "1")["text"] != ":"
    again = [a if a != "fact" else "other" for a in ask]
    before = tree(work)
    refused(netsuke(monkeypatch, capsys, "bricks", *again), "nearly the same key")
    code, _, err = netsuke(monkeypatch, capsys, "bricks", "edit", "tiny.netsuke", "4 {z}", "!", "--harm", "1e-9",
                           "--text", "skills", "--length", "12", "--steps", "1")  # fmt: skip
    assert code == 1 and err.count("\n") == 1 and "other text" in err
    assert tree(work) == before


def test_trace_tells_which_bricks_fired(work, call, monkeypatch, capsys):
    digits = call("trace", "tiny.netsuke", "--prompt", "4+4 = 8 9 10-7 = 3 55+1")
    shouts = call("trace", "tiny.netsuke", "--prompt", "HA! ABLE GLAD BALL! DEAF LIKE")
    for skill, own, other in (("digits", digits, shouts), ("shouts", shouts, digits)):
        assert own["neurons"][skill]["fired"] and own["neurons"][skill]["share"] > other["neurons"][skill]["share"]
    assert digits["nearest"] == "talk"
    code, out, _ = netsuke(monkeypatch, capsys, "bricks", "trace", "tiny.netsuke", "--prompt", "HA!")
    assert code == 0 and "nearest" in out
    assert call("prune", "tiny.netsuke", "--remove", "digits", "-o", "p")["left"] == ["shouts"]
    left = call("trace", "p.netsuke", "--prompt", "HA!")["neurons"]["shouts"]  # levels were those of the whole model
    assert left["strength"] > 0 and left["fired"] is None


def spoil_manifest(**changes):
    def act(work: Path) -> None:
        hostile.edit_json(work / "tiny.netsuke/bricks.json", lambda m: m["bricks"][0].update(changes))

    return act


def other_base(work: Path) -> None:
    plugin = read_plugin(work / "tiny.netsuke/brick-talk.safetensors")
    Plugin("legal", "0" * 64, plugin.thin).write(work / "legal.safetensors")


def other_shape(work: Path) -> None:
    base = read_manifest(work / "tiny.netsuke/bricks.json").base
    thin = torch.zeros(2, 7), torch.zeros(5, 2)
    Plugin("odd", base, {"blocks.0.down": thin}).write(work / "odd.safetensors")
    Plugin("lost", base, {"blocks.9.down": thin}).write(work / "lost.safetensors")
    Plugin("thin", base, {}).write(work / "thin.safetensors")
    keyed = torch.zeros(3), torch.zeros(3, 3)
    Plugin(
        "keyed", base, {"blocks.0.q": (torch.zeros(1, 48), torch.zeros(48, 1))}, key=keyed[0], spread=keyed[1]
    ).write(work / "keyed.safetensors")
    plain = torch.zeros(2, 48), torch.zeros(48, 2)
    Plugin("small", base, {"blocks.0.q": plain}).write(work / "small.safetensors")
    Plugin("../../x", base, {"blocks.0.q": plain}).write(work / "outside.safetensors")


def hostile_plugins(work: Path) -> None:
    (work / "pickle.safetensors").write_bytes(b"\x80\x04}q\x00.")
    (work / "short.safetensors").write_bytes(b"\xff" * 12)
    deep = {"about": "[" * 200_000}
    write_safetensors(work / "deep.safetensors", {"q.first": torch.zeros(1, 2)}, deep)
    write_safetensors(work / "none.safetensors", {"w": torch.zeros(2)})
    (work / "broken.json").write_text('{"format": "netsuke-bricks", ')
    (work / "diary.json").write_text('{"mine": 1}')
    (work / "plain.txt").write_text("mine")


def few(work: Path) -> None:
    write_skill(work / "few/digits", LETTERS["digits"])
    write_skill(work / "few/rare", "xyz", files=2)
    write_skill(work / "one/digits", LETTERS["digits"])
    shutil.copytree(work / "skills", work / "latin")
    (work / "latin/digits/0.txt").write_bytes("déjà".encode("latin-1") * 40)
    shutil.copytree(work / "skills", work / "comma")
    (work / "comma/digits").rename(work / "comma/a,b")


def changed_plugin(work: Path) -> None:
    path = work / "tiny.netsuke/brick-talk.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\1")


def other_model(work: Path) -> None:
    shutil.copytree(work / "tiny.netsuke", work / "old")
    shutil.rmtree(work / "tiny.netsuke")
    hostile.artifact(work)
    shutil.copy(work / "old/bricks.json", work / "tiny.netsuke")


FIND = ("find", "tiny.netsuke", "--length", "12", "--count", "80", "--skills")
WRONG = {
    "no model": (None, ["list", "nowhere.netsuke"], "nowhere"),
    "no manifest": (None, ["run", "tiny.netsuke", "--bricks", "nowhere.json"], "nowhere.json"),
    "no skills": (None, [*FIND, "nowhere"], "no such folder"),
    "one skill": (few, [*FIND, "one"], "1 folders"),
    "few instances": (few, [*FIND, "few"], "'rare' has 16 instances"),
    "not UTF-8": (few, [*FIND, "latin"], "not UTF-8"),
    "name with a comma": (few, [*FIND, "comma"], "a,b"),
    "share": (None, [*FIND, "skills", "--share", "0.9"], "--share"),
    "length": (None, ["find", "tiny.netsuke", "--skills", "skills", "--length", "900"], "--length 900"),
    "indicator": (None, [*FIND, "skills", "--indicator", "looks"], "looks"),
    "place taken": (hostile_plugins, [*FIND, "skills", "-o", "diary.json"], "diary.json"),
    "artifact over itself": (None, [*FIND, "skills", "-o", "tiny.netsuke"], "it is the model that is read"),
    "shipped model": (None, ["find", "small", "--skills", "skills"], "came with the package"),
    "other model": (other_model, ["run", "tiny.netsuke", "--prompt", "1"], "made for a base with sha256"),
    "broken manifest": (hostile_plugins, ["list", "tiny.netsuke", "--bricks", "broken.json"], "not valid JSON"),
    "unknown skill": (None, ["run", "tiny.netsuke", "--only", "digits,music", "--prompt", "1"], "music"),
    "empty name": (None, ["run", "tiny.netsuke", "--only", "digits,,", "--prompt", "1"], "a name is empty"),
    "neurons attached": (None, ["run", "tiny.netsuke", "--with", "digits", "--prompt", "1"], "brick of neurons"),
    "long prompt": (None, ["run", "tiny.netsuke", "--prompt", "1" * 99], "context"),
    "temperature": (None, ["run", "tiny.netsuke", "--prompt", "1", "--temperature", "nan"], "temperature"),
    "huge neuron": (spoil_manifest(sites={"blocks.0.hidden": [10**30]}), ["run", "tiny.netsuke", "--only", "shouts",
                                                                         "--prompt", "1"], "neurons 1000"),
    "huge block": (spoil_manifest(sites={f"blocks.{'9' * 5000}.hidden": [1]}), ["trace", "tiny.netsuke", "--prompt", "1"],
                   "find the site"),
    "score no number": (spoil_manifest(skills={"digits": float("nan")}), ["list", "tiny.netsuke"], "no finite number"),
    "nothing removed": (None, ["prune", "tiny.netsuke", "-o", "p"], "nothing to remove"),
    "both ways": (None, ["prune", "tiny.netsuke", "--remove", "digits", "--only", "shouts", "-o", "p"], "--only"),
    "unknown brick": (None, ["prune", "tiny.netsuke", "--remove", "music", "-o", "p"], "music"),
    "prune over itself": (None, ["prune", "tiny.netsuke", "--remove", "digits", "-o", "tiny"], "another name"),
    "prune no folder": (None, ["prune", "tiny.netsuke", "--remove", "digits", "-o", "no/p"], "does not exist"),
    "plugin of another base": (other_base, ["add", "tiny.netsuke", "legal.safetensors"], "made for a base"),
    "plugin of another shape": (other_shape, ["add", "tiny.netsuke", "odd.safetensors"], "5 by 7"),
    "plugin elsewhere": (other_shape, ["add", "tiny.netsuke", "lost.safetensors"], "blocks.9.down"),
    "plugin of nothing": (other_shape, ["add", "tiny.netsuke", "thin.safetensors"], "no thin maps"),
    "plugin's key": (other_shape, ["add", "tiny.netsuke", "keyed.safetensors"], "3 numbers"),
    "plugin's id is a path": (other_shape, ["add", "tiny.netsuke", "outside.safetensors"], "../../x"),
    "plugin twice": (None, ["add", "tiny.netsuke", "tiny.netsuke/brick-talk.safetensors"], "has one of this id"),
    "plugin is a pickle": (hostile_plugins, ["add", "tiny.netsuke", "pickle.safetensors"], "pickle"),
    "plugin cut off": (hostile_plugins, ["add", "tiny.netsuke", "short.safetensors"], "header"),
    "plugin's JSON nests": (hostile_plugins, ["add", "tiny.netsuke", "deep.safetensors"], "nothing about a plugin"),
    "no plugin": (hostile_plugins, ["add", "tiny.netsuke", "none.safetensors"], "nothing about a plugin"),
    "plugin not there": (None, ["add", "tiny.netsuke", "gone.safetensors"], "no such file"),
    "plugin's name": (None, ["add", "tiny.netsuke", "small talk", "--name", "../x"], "../x"),
    "plugin's texts": (hostile_plugins, ["add", "tiny.netsuke", "plain.txt", "--length", "12"], "0 instances"),
    "plugin changed": (changed_plugin, ["run", "tiny.netsuke", "--with", "talk", "--prompt", "1"], "was changed"),
    "plugin outside": (
        lambda work: hostile.edit_json(
            work / "tiny.netsuke/bricks.json", lambda m: m["bricks"][2].update(file="../other.safetensors")
        ), ["run", "tiny.netsuke", "--with", "talk", "--prompt", "1"], "../other.safetensors"),
    "merge of neurons": (None, ["merge", "tiny.netsuke", "digits", "talk", "--weights", "1", "1"], "of kind 'neurons'"),
    "merge of bases": (other_base, ["merge", "tiny.netsuke", "talk", "legal.safetensors", "--weights", "1,1"], "base"),
    "merge of shapes": (other_shape, ["merge", "tiny.netsuke", "talk", "odd.safetensors", "--weights", "1,1"], "5 by 7"),
    "merge of ranks": (other_shape, ["merge", "tiny.netsuke", "talk", "small.safetensors", "--weights", "1,1", "--how",
                                     "factors"], "ranks [4, 2]"),
    "merge with few weights": (None, ["merge", "tiny.netsuke", "talk", "talk", "--weights", "1,1,1"], "one finite weight"),
    "merge with a word": (None, ["merge", "tiny.netsuke", "talk", "talk", "--weights", "much,1"], "much"),
    "merge over a diary": (hostile_plugins, ["merge", "tiny.netsuke", "talk", "talk", "--weights", "1,1", "-o",
                                             "plain.txt"], "suffix"),
    "edit of nothing": (None, ["edit", "tiny.netsuke", "the capital is", "Rome"], "nothing tells what"),
    "edit to nothing": (None, ["edit", "tiny.netsuke", "the {capital} is", " ", "--text", "skills"], "target is empty"),
    "edit of no subject": (None, ["edit", "tiny.netsuke", "it is", "x", "--subject", "Rome"], "not in"),
    "edit of no block": (None, ["edit", "tiny.netsuke", "{it} is", "x", "--block", "7", "--text", "skills", "--length",
                                "12"], "block 7"),
    "edit too long": (None, ["edit", "tiny.netsuke", "{it} is" + "x" * 60, "x", "--text", "skills"], "tokens"),
    "empty prompt": (None, ["trace", "tiny.netsuke", "--prompt", " "], "prompt"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_are_one_sentence_and_leave_nothing(name, work, monkeypatch, capsys):
    spoil, args, culprit = WRONG[name]
    if spoil:
        spoil(work)
    before = tree(work)
    refused(netsuke(monkeypatch, capsys, "bricks", *args), culprit)
    assert tree(work) == before


def test_every_command_is_a_function_and_has_help(monkeypatch, capsys):
    for command in bricks.COMMANDS:
        code, out, _ = netsuke(monkeypatch, capsys, "bricks", command, "--help")
        assert code == 0 and "--json" in out
        assert callable(getattr(bricks, command)) and getattr(bricks, command).__doc__
    with pytest.raises(AttributeError, match="no attribute 'sell'"):
        bricks.sell()
