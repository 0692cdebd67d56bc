"""Modules that few requests need, kept as the bytes of their code until one does.

A module that is loaded lies in some hundred pieces on pages that each clone of a zygote is given anew (45 µs for those here), and
after the confinement none can be read from a file. So they are read before it, and loaded from memory.
"""

from __future__ import annotations

import marshal
import sys

from . import wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import ModuleType
    from typing import Any

NAMES = ("bulk", "image", "memory", "rebuild", "salvage", "trees", "upload", "verify")


class Shelf:
    """A finder of modules, for sys.meta_path."""

    def __init__(self) -> None:
        """Raises OSError."""
        self._codes = {f"{__package__}.{name}": _code(name) for name in NAMES if f"{__package__}.{name}" not in sys.modules}

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        specification: Any = type(wire.__spec__)
        return specification(name, self) if name in self._codes else None

    def create_module(self, spec: Any) -> None:
        """As the interpreter does."""

    def exec_module(self, module: ModuleType) -> None:
        exec(marshal.loads(self._codes[module.__name__]), module.__dict__)  # noqa: S102, S302 -- the image's own code


def _code(name: str) -> bytes:
    beside: Any = wire.__spec__
    full = f"{__package__}.{name}"
    loader = type(beside.loader)(full, beside.origin.replace("wire.", f"{name}."))
    return marshal.dumps(loader.get_code(full))


def fill() -> None:
    """To be called before the confinement, once."""
    sys.meta_path.insert(0, Shelf())
