"""Evaluation, tried: whether held-out samples go through, whether predictions can be judged, and what that needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from parakit.data.samples import Samples
from parakit.errors import DataError
from parakit.exactness.outputs import tensors_in
from parakit.failures.source_lines import describe_error, listing, places_of
from parakit.gradients.forward import call_model
from parakit.losses.calls import CallsOfLosses
from parakit.losses.summed import SummedLoss
from parakit.preflight.trial import Trial
from parakit.trees import leaves

__all__ = ["evaluation_of"]

_ROWS = 8


def evaluation_of(trial: Trial, loss: SummedLoss, held_out: Samples | None, trained_output: Any) -> tuple[bool, bool]:
    """Whether predictions can be judged, and whether evaluating needs gradients.

    Raises
    ------
    DataError
        If held-out samples do not go through the model and the loss.
    """
    rows = trial.rows() if held_out is None else held_out.slice(0, min(len(held_out), _ROWS))
    modes = [(module, module.training) for module in trial.model.modules()]
    trial.model.eval()
    outputs: list[Any] = []

    def evaluated() -> bool:
        given = rows.copy_rows()
        with CallsOfLosses(judging=True) as seen:
            outputs.append(call_model(trial.model, given.inputs))
            loss.function(outputs[-1], given.targets)
        return seen.count_right() is not None

    try:
        try:
            with torch.no_grad():
                return evaluated(), False
        except Exception:
            with torch.enable_grad():
                return evaluated(), True
    except Exception as error:
        if held_out is None:
            return False, False
        raise _held_out_error(error, rows, trial, outputs[-1] if outputs else None, trained_output) from error
    finally:
        for module, mode in modes:
            module.training = mode


def _held_out_error(error: Exception, rows: Samples, trial: Trial, output: Any, trained_output: Any) -> DataError:
    fact = f"validation does not go through the model and the loss: {describe_error(error)}"
    where = listing(places_of(error))
    if output is not None and _shape_of(output) != _shape_of(trained_output):
        return DataError(
            fact, where=where,
            cause=f"in evaluation the model returns {_shape_of(output)}, in training {_shape_of(trained_output)}",
            remedy="return the same in both modes, or let the loss look at what it got",
        )  # fmt: skip
    given, known = (" and ".join(_rows_of(samples)) for samples in (rows, trial.samples))
    if given != known:
        return DataError(
            fact, where=where, cause=f"it holds {given}, while data holds {known}",
            remedy="give validation the same columns and types as data",
        )  # fmt: skip
    return DataError(
        fact, where=where, cause="something that the model or the loss does in evaluation mode alone",
        remedy="try loss(model.eval()(inputs), targets) in this notebook until it works",
    )  # fmt: skip


def _rows_of(samples: Samples) -> list[str]:
    return [
        f"{str(leaf.dtype).removeprefix('torch.')} rows of shape {tuple(leaf.shape[1:])}"
        for leaf in leaves((samples.inputs, samples.targets))
    ]


def _shape_of(output: Any) -> str:
    """What an output is, without the number of its rows."""
    if isinstance(output, Tensor):
        return "one tensor" if output.dim() else "one number"
    return f"a {type(output).__name__} of {len(tensors_in(output))} tensors"
