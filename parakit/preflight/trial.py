"""A trial: a private copy of what is to be trained, tried on rows of the data; its errors are in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from parakit.data.samples import Samples
from parakit.engines.recipe import Parts
from parakit.errors import LossError, ModelError
from parakit.failures.source_lines import describe_error, listing, places_of
from parakit.gradients.forward import call_model
from parakit.losses.summed import check_loss, describe
from parakit.model_state.attributes import Attributes, same
from parakit.preflight.copies import frozen_parts, is_lazy
from parakit.preflight.labels import LabelRange
from parakit.serialization import Frozen
from parakit.system.devices import CPU
from parakit.system.process_settings import undisturbed
from parakit.trees import leaves

__all__ = ["Trial", "forms_of"]

_ROWS = 8
_LABELS = 64


class Trial:
    """A private copy of parts, and rows to try it on.

    Parameters
    ----------
    frozen : Frozen
        Of `Parts`.
    samples : Samples
        What it will be trained on: all rows, or some from everywhere.
    sizes : sequence of int
        Of batches that the model may have been written for.
    numbers : mapping of str to Tensor
        The numbers of the rows of "data" and of "validation", of which only some are tried.
    """

    def __init__(
        self, frozen: Frozen, samples: Samples, sizes: Sequence[int] = (), numbers: Mapping[str, Tensor] | None = None
    ) -> None:
        self.samples, self.numbers = samples, numbers or {}
        #: The class labels that the model has outputs for, once it was tried and if that is known.
        self.labels: LabelRange | None = None
        self._sizes = sizes
        self._generator = torch.Generator().manual_seed(0)
        self._take(frozen)
        self._wake()

    def _take(self, frozen: Frozen) -> None:
        self.frozen = frozen
        self.parts: Parts = frozen.thaw()
        self.model = self.parts.model
        self.parts.loss = check_loss(self.parts.loss, list(self.model.parameters()))

    # --- rows

    def rows(self, most: int = _ROWS, *, labels: bool = False) -> Samples:
        """Some rows from everywhere in the data, others each time.

        Parameters
        ----------
        most : int
        labels : bool
            Whether to add one row of each label, so that weights and ignored labels show.
        """
        count = len(self.samples)
        if count <= most:
            return self.samples.take(torch.arange(count))
        chosen = torch.randperm(count, generator=self._generator)[:most]
        if labels:
            chosen = torch.cat([chosen, self._one_of_each_label()])
        return self.samples.take(chosen.unique())

    def _one_of_each_label(self) -> Tensor:
        nothing = torch.zeros(0, dtype=torch.int64)
        first = leaves(self.samples.targets)[0]
        if first.is_floating_point() or first.is_complex():
            return nothing
        labels = first.reshape(len(first), -1)[:, 0]
        found: list[int] = []
        others = torch.ones(len(labels), dtype=torch.uint8)
        while len(labels) and others[place := int(others.argmax())]:  # the first of a label not seen yet
            found.append(place)
            if len(found) > _LABELS:
                return nothing
            others &= labels != labels[place]  # some passes are cheaper than to sort all labels
        return torch.tensor(found, dtype=torch.int64)

    # --- calls

    def forward(self, rows: Samples) -> Any:
        """What the model makes of some rows.

        Raises
        ------
        ModelError
            If it cannot.
        """
        try:
            return call_model(self.model, rows.inputs)
        except Exception as error:
            raise self._cannot_compute(error, rows) from error

    def loss(self, output: Any, targets: Any) -> Any:
        """What the loss makes of an output.

        Raises
        ------
        LossError
            If it cannot.
        """
        try:
            return self.parts.loss(output, targets)
        except Exception as error:
            raise LossError(
                f"The loss cannot be computed: {describe_error(error)}",
                where=listing(places_of(error)),
                cause=f"the model returns {describe(output)}, the targets are {describe(targets)}",
                remedy="make the model's output, the targets and the loss fit together",
            ) from error

    def _cannot_compute(self, error: Exception, rows: Samples) -> ModelError:
        forms = " and ".join(forms_of(rows.inputs))
        types = {p.dtype for p in self.model.parameters() if p.is_floating_point() and not is_lazy(p)}
        given = {leaf.dtype for leaf in leaves(rows.inputs) if leaf.is_floating_point()}
        by_type = any(word in str(error) for word in ("dtype", "scalar type", "Double", "Float", "Half", "BFloat16"))
        if by_type and types and given and given != types:
            (wanted, *_), (had, *_) = sorted(types, key=str), sorted(given - types or given, key=str)
            cause = f"the inputs are {_name(had)}, and the model's parameters {' and '.join(map(_name, types))}"
            remedy = f'inputs.to(torch.{_name(wanted)}), or inputs.astype("{_name(wanted)}") in numpy'
            remedy += "; or model.double()" if had == torch.float64 else ""
        elif fixed := self._fixed_size(len(rows)):
            cause = f"the model takes batches of {fixed} rows alone, and a worker's share of a batch has fewer"
            remedy = f"take the number of rows from the inputs, len(x), instead of writing {fixed} into the model"
        else:
            cause = f"inputs of {forms}, which the model's layers do not take"
            remedy = f"try model(inputs[:{len(rows)}]) in this notebook until it works"
        return ModelError(
            f"The model cannot compute a batch of {len(rows)} samples: {describe_error(error)}",
            where=listing(places_of(error)), cause=cause, remedy=remedy,
        )  # fmt: skip

    def _fixed_size(self, tried: int) -> int | None:
        """How many rows a batch must have, of a model that takes one number and no other."""
        for size in self._sizes:
            if size != tried and size <= len(self.samples):
                with suppress(Exception), torch.no_grad():
                    call_model(self.model, self.samples.slice(0, size).inputs)
                    return size
        return None

    # --- lazy layers

    def _wake(self) -> None:
        """Let lazy layers take their shapes, and let nothing else change by that."""
        if not any(map(is_lazy, [*self.model.parameters(), *self.model.buffers()])):
            return
        lazy = {name for name, m in self.model.named_modules() if isinstance(m, nn.modules.lazy.LazyModuleMixin)}
        before = Attributes(self.model, self.parts.loss).read()
        modes = [(module, module.training) for module in self.model.modules()]
        with undisturbed(CPU), torch.no_grad():
            self.model.eval()
            self.forward(self.rows())
        for module, mode in modes:
            module.training = mode
        attributes = Attributes(self.model, self.parts.loss)
        now = attributes.read()
        changed = {path: kept for path, kept in before.items() if path in now and not same(kept, now[path])}
        attributes.write({path: kept for path, kept in changed.items() if path.rpartition(".")[0] not in lazy})
        self._take(frozen_parts(self.parts))

    def adopt_buffers(self, names: Sequence[str]) -> None:
        """Let the model have buffers from the start that its forward makes, if they are constants.

        Parameters
        ----------
        names : sequence of str

        Raises
        ------
        ModelError
            If they are otherwise for other rows, or change.
        """
        rows = self.rows()
        half = rows.slice(0, max(1, len(rows) // 2))
        with undisturbed(CPU), torch.no_grad():
            made = [self._buffers_made(names, given) for given in ((rows,), (half,), (rows, half))]
        for name, first in made[0].items():
            if not all(name in other and same(first, other[name]) for other in made[1:]):
                raise ModelError(
                    f"forward makes the buffer {name} when it is called, and it is otherwise for other rows or calls.",
                    cause="register_buffer in forward, with what is to be kept from call to call",
                    remedy="make the buffer in __init__, where all workers make the same one; then its rule can be "
                    "told: train(..., buffers={...})",
                )
        parts: Parts = self.frozen.thaw()
        modules = dict(parts.model.named_modules())
        for name, value in made[0].items():
            owner, _, key = name.rpartition(".")
            persistent = key not in self.model.get_submodule(owner)._non_persistent_buffers_set
            modules[owner].register_buffer(key, value, persistent=persistent)
        self._take(frozen_parts(parts))

    def _buffers_made(self, names: Sequence[str], calls: Sequence[Samples]) -> dict[str, Tensor]:
        model = self.frozen.thaw().model
        for rows in calls:
            call_model(model, rows.copy_rows().inputs)
        return {name: b.detach().clone() for name, b in model.named_buffers() if name in names}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def forms_of(tree: Any) -> list[str]:
    """Types and shapes of the tensors in a tree, for messages."""
    return [f"{_name(leaf.dtype)} of shape {tuple(leaf.shape)}" for leaf in leaves(tree)]
