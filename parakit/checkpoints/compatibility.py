"""Whether a checkpoint is of the run that would go on from it.

Owns the comparison of two identities, and the sentences that say what differs. What an identity holds is not known
here; a checkpoint that is of another run is refused.

Reference: RFC 8259, "The JavaScript Object Notation (JSON) data interchange format": both identities are compared as
they come back from it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from parakit.errors import CheckpointError

__all__ = ["INFORMATION", "Identity", "check_fits", "differences"]

_LISTED = 5  # differences in one error
#: What an identity may say without being compared: where a checkpoint was written is no reason not to go on.
INFORMATION = frozenset({"parakit", "torch", "parakit_version", "torch_version"})

Identity: TypeAlias = Mapping[str, Any]


def differences(found: Identity, wanted: Identity) -> list[str]:
    """What of a checkpoint's identity is not as it is wanted here, a sentence each with both values.

    Versions of parakit and torch are never a difference.
    """
    return list(_unlike("", json.loads(json.dumps(wanted)), json.loads(json.dumps(found))))


def check_fits(found: Identity, wanted: Identity) -> None:
    """Refuse a checkpoint of another run.

    Raises
    ------
    CheckpointError
        If there are `differences`; it names the first few.
    """
    unlike = differences(found, wanted)
    if unlike:
        more = [f"and {len(unlike) - _LISTED} more"] if len(unlike) > _LISTED else []
        raise CheckpointError(
            f"The checkpoint does not fit this run: {'; '.join(unlike[:_LISTED] + more)}.",
            cause="it is of another run, or something was changed since",
            remedy="give the same model, data and options as then, or begin anew in another folder",
        )


def _unlike(name: str, here: Any, there: Any) -> Iterator[str]:
    if isinstance(here, dict) and isinstance(there, dict):
        for key in [key for key in here | there if name or key not in INFORMATION]:
            called = _called(name, key)
            if key in here and key in there:
                yield from _unlike(called, here[key], there[key])
            else:
                yield f"{called} is missing {'here' if key in there else 'in the checkpoint'}"
        if name == "parameters" and here.keys() == there.keys():  # an optimizer knows them by their places
            places = enumerate(zip(here, there, strict=True))
            yield from (f"parameter {n} is {a} here, {b} in the checkpoint" for n, (a, b) in places if a != b)
    elif here != there and json.dumps(here) != json.dumps(there):  # as text, NaN equals NaN
        ours, theirs = _shown(here, there)
        yield f"{name} is {ours} here, {theirs} in the checkpoint"


def _called(name: str, key: str) -> str:
    if name in ("parameters", "buffers"):
        return f"{name[:-1]} {key}"
    if not name:
        return f"the {key}" if key in ("optimizer", "scheduler") else key
    return f"{name}.{key}"


def _shown(*values: Any) -> list[str]:
    """Two values as people write them; of [shape, dtype], what differs."""
    if not all(isinstance(value, list) and len(value) == 2 and isinstance(value[0], list) for value in values):
        return ["none" if value is None else str(value) for value in values]
    (shape, dtype), (other_shape, other_dtype) = values
    if dtype == other_dtype:
        return [str(tuple(shape)), str(tuple(other_shape))]
    if shape == other_shape:
        return [str(dtype), str(other_dtype)]
    return [f"{tuple(shape)} {dtype}", f"{tuple(other_shape)} {other_dtype}"]
