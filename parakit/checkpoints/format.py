"""What the file of a checkpoint holds.

Owns the format: a line with the version, a header in JSON, the tensors' bytes, and the SHA-256 of all that. Reading one
runs no code of anybody's: what is neither a tensor nor a plain value is refused when it is serialized, and nothing is
believed before the digest has been checked.

Reference: FIPS 180-4, "Secure hash standard", section 6.2, for the digest.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import NoneType
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from parakit.checkpoints.state import State
from parakit.errors import CheckpointError

__all__ = ["Bytes", "Checkpoint", "Damaged", "check_plain", "deserialize", "serialize"]

_MAGIC = b"parakit checkpoint "
_VERSION = 1  # the first line and the digest at the end stay as they are in every version
_DIGEST_BYTES = hashlib.sha256().digest_size

_WHY = "a checkpoint holds tensors and plain values only, so that loading it runs no code"
_SCALARS = (NoneType, bool, int, float, str)
_SEQUENCES: dict[str, type[Any]] = {"tuple": tuple, "size": torch.Size}  # a list is a list in JSON
_MAPPINGS: dict[str, type[Any]] = {"dict": dict, "ordered": OrderedDict, "counter": Counter}
_NUMBERS: dict[str, type[Any]] = {kind.__name__: kind for kind in (np.int32, np.int64, np.float32, np.float64)}
_DTYPES = {str(d).removeprefix("torch."): d for d in vars(torch).values() if isinstance(d, torch.dtype)}

Bytes: TypeAlias = bytes | memoryview


class Damaged(CheckpointError):
    """A file that is no whole checkpoint."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What a file holds.

    Attributes
    ----------
    step : int
        Steps done.
    state : State
        On the CPU, bit for bit as it was saved.
    identity : dict
        What run it is of; tuples have become lists.
    name : str
        Of the file.
    damaged : tuple of str
        Names of newer files that were passed over.
    """

    step: int
    state: State = field(repr=False)
    identity: dict[str, Any] = field(repr=False)
    name: str
    damaged: tuple[str, ...] = ()


def check_plain(state: State) -> None:
    """Refuse a state that no checkpoint can hold, without writing one.

    Raises
    ------
    CheckpointError
        If it holds anything but tensors and plain values; the message names the place.
    """
    _pack(state, "", [])


def serialize(state: State, identity: Mapping[str, Any]) -> list[Bytes]:
    """The parts of a file; tensors on the CPU are not copied."""
    tensors: list[Tensor] = []
    content = {"identity": dict(identity), "state": _pack(state, "", tensors)}
    content["tensors"] = [[str(t.dtype).removeprefix("torch."), list(t.shape)] for t in tensors]
    header = json.dumps(content).encode()
    parts: list[Bytes] = [_MAGIC, b"%d\n" % _VERSION, struct.pack("<Q", len(header)), header, *map(_bytes_of, tensors)]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return [*parts, digest.digest()]


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _pack(value: Any, path: str, tensors: list[Tensor]) -> Any:
    """What JSON can hold in place of a value; tensors go to the list, and their places in it stand for them."""
    kind: type[Any] = type(value)
    if kind in _SCALARS:
        return value
    if kind is list:
        return [_pack(part, f"{path}[{index}]", tensors) for index, part in enumerate(value)]
    if kind in (Tensor, nn.Parameter) and value.layout is torch.strided and not value.is_quantized:
        tensors.append(value)
        return {"tensor": len(tensors) - 1}
    for name, known in _SEQUENCES.items():
        if kind is known:
            return {name: _pack(list(value), path, tensors)}
    for name, known in _MAPPINGS.items():
        if kind is known:
            if name == "dict":
                _check_is_not_frozen(value, path)
            return {name: [[_pack(k, path, tensors), _pack(v, _below(path, k), tensors)] for k, v in value.items()]}
    if kind in _NUMBERS.values():
        return {kind.__name__: value.item()}
    owner = re.split(r"\W", path)[0]
    raise CheckpointError(
        f"{path} cannot be kept in a checkpoint: it is {kind.__name__} {value!r:.60}.",
        cause=_WHY,
        remedy=f"make it a number, a string or a tensor; or leave it out in the state_dict of the {owner}, "
        "and let its load_state_dict do without",
    )


def _check_is_not_frozen(value: dict[Any, Any], path: str) -> None:
    """Refuse what the state of a run holds as a pickle."""
    if isinstance(value.get("frozen"), bytes):
        raise CheckpointError(
            f"{path} cannot be kept in a checkpoint: the model or the loss changes a {value['kind']} there.",
            cause=_WHY,
            remedy="keep numbers, strings, tensors, or lists and dicts of them; or train without checkpoint=",
        )


def _below(path: str, key: Any) -> str:
    named = isinstance(key, str) and key.isidentifier()
    return f"{path}.{key}".lstrip(".") if named else f"{path}[{key!r}]"


def deserialize(data: bytes, name: str) -> Checkpoint:
    """The checkpoint that a file holds; believes nothing before the digest has been checked."""
    whole = memoryview(data)
    body, digest = whole[:-_DIGEST_BYTES], whole[-_DIGEST_BYTES:]
    if not data.startswith(_MAGIC) or hashlib.sha256(body).digest() != digest:
        raise _damaged(name)
    try:
        line_end = data.index(b"\n")
        version = int(data[len(_MAGIC) : line_end])
        if version <= _VERSION:
            (length,) = struct.unpack_from("<Q", body, line_end + 1)
            first = line_end + 9
            header = json.loads(body[first : first + length].tobytes())
            state = _unpack(header["state"], _tensors(body[first + length :], header["tensors"]))
            return Checkpoint(int(state["step"]), state, dict(header["identity"]), name)
    except Exception as error:  # only of a file that something else made and signed
        raise _damaged(name) from error
    raise CheckpointError(
        f"{name} is of version {version} of the format; this parakit reads up to {_VERSION}.",
        cause="a later parakit wrote it",
        remedy="pip install --upgrade parakit",
    )


def _damaged(name: str) -> Damaged:
    return Damaged(
        f"{name} is no whole parakit checkpoint.",
        cause="it was damaged or cut short, or something else wrote it",
        remedy="give the folder that holds it: the newest whole one is taken",
    )


def _tensors(body: memoryview, kinds: list[tuple[str, list[int]]]) -> list[Tensor]:
    """Tensors of known dtypes and shapes, from their bytes end to end."""
    data: npt.NDArray[np.uint8] = np.frombuffer(body, np.uint8)
    tensors = []
    for name, shape in kinds:
        nbytes = math.prod(shape) * _DTYPES[name].itemsize
        if not 0 <= nbytes <= data.size:
            raise ValueError(f"{nbytes} bytes of {data.size}")
        tensors.append(torch.empty(shape, dtype=_DTYPES[name]))
        tensors[-1].reshape(-1).view(torch.uint8).numpy()[:] = data[:nbytes]
        data = data[nbytes:]
    return tensors


def _unpack(node: Any, tensors: list[Tensor]) -> Any:
    """The value that `_pack` described: a look-up in tables of plain kinds, nothing else."""
    if isinstance(node, list):
        return [_unpack(part, tensors) for part in node]
    if not isinstance(node, dict):
        return node
    ((kind, content),) = node.items()
    if kind == "tensor":
        return tensors[content]
    if kind in _SEQUENCES:
        return _SEQUENCES[kind](_unpack(content, tensors))
    if kind in _MAPPINGS:
        return _MAPPINGS[kind]({_unpack(key, tensors): _unpack(part, tensors) for key, part in content})
    return _NUMBERS[kind](content)
