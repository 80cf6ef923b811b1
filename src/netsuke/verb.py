"""One verb = one file = one function = one command.

A verb's file carries the verb's name, so `netsuke.fit` is a module; `@verb` makes that module callable, and
`from netsuke import fit; fit("pycode", device="pi4")` works whichever way the file was first imported.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


class VerbModule(types.ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._verb(*args, **kwargs)


def verb(function: F) -> F:
    module = sys.modules[function.__module__]
    module.__class__ = VerbModule
    module._verb = function
    module.__doc__ = module.__doc__ or function.__doc__
    return function
