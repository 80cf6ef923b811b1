"""Small artifacts with static grids, and text for their tokenizer: what the tests of the integer-only decoder open."""

from __future__ import annotations

import textwrap
from pathlib import Path

from netsuke.layers.static import TokenGrid
from netsuke.models.llama import Llama
from netsuke.tasks.language import LanguageModeling
from netsuke.train.mobilequant import MobileQuant
from tests.models import hostile

CONTEXT = 24


def text_task() -> LanguageModeling:
    """The source of a standard module in the tokens of `hostile.tiny_tokenizer`."""
    size = CONTEXT * 16 + 1
    text = Path(textwrap.__file__).read_text(encoding="ascii")[: 3 * size]
    parts = {s: text[i * size : (i + 1) * size] for i, s in enumerate(("train", "validation", "test"))}
    return LanguageModeling(parts, hostile.tiny_tokenizer(), CONTEXT, batch=4, source="textwrap")


def static_model(seed: int = 0, scheme: str = "w8a8", eos: tuple[int, ...] = (0,), **knobs) -> Llama:
    """hostile.tiny_model on static grids, its ranges from 8 windows of text."""
    method = MobileQuant(calibration=8, learn="off", grouped=True, scheme=scheme, **knobs)
    return method.apply(hostile.tiny_model(seed, eos=eos), text_task())


def static_artifact(folder: Path, **options) -> Path:
    """`static_model` as an artifact with a tokenizer."""
    return hostile.artifact(folder, static_model(**options))


def dynamic_artifact(folder: Path) -> Path:
    """One whose only grid is made anew for every token, which no integers-only executor runs."""
    model = hostile.tiny_model()
    model.stand({"blocks.0.attn_in": TokenGrid(8)})
    return hostile.artifact(folder, model)
