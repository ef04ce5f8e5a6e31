"""Stillness: the same forward pass twice gives the same, whatever the rows beside a row.

Dropout draws its masks, batch normalisation looks at a whole share, and counters count. All that is known and has its
place in a run; but who compares some rows as one share with the same rows as several must not see it. `Still` silences
what is known, and gives back afterwards what forward passes have changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from parakit.model_state.attributes import ABSENT, Attributes, Kept
from parakit.model_state.buffers import buffers_of
from parakit.system.devices import CPU
from parakit.system.process_settings import seed_all, undisturbed

__all__ = ["Still", "quiet_layers"]

_NORMS = nn.modules.batchnorm._BatchNorm
_QUIET = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._NormBase)


class Still:
    """What must be silenced and given back, of one model and its loss.

    Parameters
    ----------
    model : nn.Module
    loss : callable
    buffers, parameters, attributes : iterable of str, optional
        Those that forward changes; None for all buffers, all parameters, all attributes.
    noisy : bool
        Whether code of the model's own draws random numbers from torch.
    others : bool
        Whether it draws from numpy's or Python's generators.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Any,
        *,
        buffers: Iterable[str] | None,
        parameters: Iterable[str] | None,
        attributes: Iterable[str] | None,
        noisy: bool,
        others: bool,
    ) -> None:
        self._model, self._loss = model, loss
        self._buffers = None if buffers is None else tuple(buffers)
        self._parameters = None if parameters is None else tuple(parameters)
        self._paths = None if attributes is None else tuple(attributes)
        self._attributes = Attributes(model, loss) if self._paths != () else None
        self._noisy, self._others = noisy, others
        self._there: set[str] | None = None  # attributes that there were, where all are kept
        self._kept: tuple[Mapping[str, Tensor], Mapping[str, Tensor], Mapping[str, Kept]] = {}, {}, {}

    def of(self, model: nn.Module, loss: Any) -> Still:
        """The same of another copy of the model and the loss."""
        return Still(
            model, loss, buffers=self._buffers, parameters=self._parameters, attributes=self._paths,
            noisy=self._noisy, others=self._others,
        )  # fmt: skip

    def keeping_all(self) -> Still:
        """The same, which keeps all buffers, parameters and attributes, whatever is known of them."""
        return Still(
            self._model, self._loss, buffers=None, parameters=None, attributes=None, noisy=self._noisy,
            others=self._others,
        )  # fmt: skip

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep everything as it is, be silent, and give it back in the end."""
        self._keep()
        layers = quiet_layers(self._model)
        dtype = next((p.dtype for p in self._model.parameters() if p.is_floating_point()), torch.float32)
        with undisturbed(CPU) if self._others else torch.random.fork_rng(devices=[]), _calm(layers, dtype):
            try:
                yield
            finally:
                self.reset()

    @contextmanager
    def once(self) -> Iterator[None]:
        """One forward pass, from what was kept, with the same random numbers each time."""
        self.reset()
        seed_all(CPU, 0, others=self._others)
        silence: Any = _Silence
        with silence() if self._noisy else nullcontext():
            yield

    def _keep(self) -> None:
        buffers = _chosen(buffers_of(self._model, self._loss), self._buffers)
        parameters = _chosen(dict(self._model.named_parameters()), self._parameters)
        attributes = self._attributes.read(self._paths) if self._attributes else {}
        self._there = set(self._attributes.places()) if self._attributes and self._paths is None else None
        self._kept = _copied(buffers), _copied(parameters), attributes

    def reset(self) -> None:
        """Give back what was kept."""
        buffers, parameters, attributes = self._kept
        with torch.no_grad():
            if buffers:
                there = buffers_of(self._model, self._loss)
                for name, value in buffers.items():
                    there[name].copy_(value)
            if parameters:
                weights = dict(self._model.named_parameters())
                for name, value in parameters.items():
                    weights[name].copy_(value)
        if self._attributes and self._there is not None:
            new = self._attributes.places().keys() - self._there
            attributes = {**attributes, **dict.fromkeys(new, ABSENT)}
        if self._attributes and attributes:
            self._attributes.write(attributes)


def _chosen(there: Mapping[str, Tensor], names: Sequence[str] | None) -> Mapping[str, Tensor]:
    return there if names is None else {name: there[name] for name in names if name in there}


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def quiet_layers(model: nn.Module) -> list[nn.Module]:
    """Layers of torch's that are to be silenced: those that draw masks, and those that normalise by batches."""
    return [
        module
        for module in model.modules()
        if module.training and (isinstance(module, _QUIET) or (isinstance(module, nn.RNNBase) and module.dropout > 0))
    ]


@contextmanager
def _calm(layers: Sequence[nn.Module], dtype: torch.dtype) -> Iterator[None]:
    """Let layers do what they do in evaluation; a normalisation that has no statistics of its own takes 0 and 1."""
    without = [m for m in layers if isinstance(m, _NORMS) and m.running_mean is None and m.running_var is None]
    for module in layers:
        module.training = False
    for norm in without:
        norm.running_mean = torch.zeros(norm.num_features, dtype=dtype)
        norm.running_var = torch.ones(norm.num_features, dtype=dtype)
    try:
        yield
    finally:
        for norm in without:
            norm.running_mean = norm.running_var = None
        for module in layers:
            module.training = True


class _Silence(TorchDispatchMode):
    """Replaces what torch draws at random by constants, which are the same for each row."""

    def __torch_dispatch__(
        self, function: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded not in function.tags:
            return result
        name = function.name().partition("::")[2]
        if name.startswith("native_dropout"):
            return args[0].clone(), torch.ones_like(result[1])
        for drawn in result if isinstance(result, tuple | list) else (result,):
            if isinstance(drawn, Tensor):
                _silence(drawn, name, args)
        return result


def _silence(drawn: Tensor, name: str, args: Sequence[Any]) -> None:
    if name.startswith("randperm"):
        drawn.copy_(torch.arange(len(drawn)))
    elif name.startswith("bernoulli"):
        drawn.fill_(1)
    elif drawn.is_floating_point():
        drawn.fill_(0.5)
    else:
        low = [value for value in args if isinstance(value, int)]
        drawn.fill_(low[0] if len(low) > 1 and name.startswith("randint") else 0)
