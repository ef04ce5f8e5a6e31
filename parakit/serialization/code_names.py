"""Names that code uses: of global variables, and of attributes."""

from __future__ import annotations

import dis
import functools
import types
from typing import NamedTuple

__all__ = ["Names", "names_in"]

_GLOBAL = frozenset({"LOAD_GLOBAL", "LOAD_NAME", "STORE_GLOBAL", "DELETE_GLOBAL"})


class Names(NamedTuple):
    """Names, each in the order of the alphabet.

    Attributes
    ----------
    variables : tuple of str
        Of global variables.
    attributes : tuple of str
        Of anything else: attributes, methods, modules.
    """

    variables: tuple[str, ...]
    attributes: tuple[str, ...]


@functools.lru_cache(maxsize=4096)
def names_in(code: types.CodeType) -> Names:
    """The names in some code, and in functions that are defined in it."""
    variables = {i.argval for i in dis.get_instructions(code) if i.opname in _GLOBAL}
    attributes = set(code.co_names) - variables
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            found = names_in(inner)
            variables.update(found.variables)
            attributes.update(found.attributes)
    return Names(tuple(sorted(variables)), tuple(sorted(attributes)))
