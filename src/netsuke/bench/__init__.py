"""Benchmarks beside peers, in one run on one machine: one subject = one file with `measure(...)` (`netsuke bench lm`)."""

from __future__ import annotations

import importlib
from typing import Any

from netsuke.errors import NetsukeError
from netsuke.verb import verb

SUBJECTS = {"lm": "netsuke.bench.lm"}  # subject -> the module whose `measure` does it


@verb
def bench(subject: str, *args: Any, **settings: Any) -> dict[str, Any]:
    """Measures `subject` beside its peers and returns what the command prints as JSON; see the subject's `measure` for the
    settings. Raises NetsukeError for an unknown subject and for settings that cannot be measured."""
    if subject not in SUBJECTS:
        raise NetsukeError(f"measure {subject!r}", "there is no such benchmark", ", ".join(SUBJECTS))
    return importlib.import_module(SUBJECTS[subject]).measure(*args, **settings)
