"""The same as a plain loop, or refused: each kind of model, loss and optimizer, in doubles, on every way of adding up.

`PARAKIT_UPDATE=1` writes `SAME_AS_PLAIN.md` anew, from what is seen here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import parakit as pk
import tests.more_plain_cases  # noqa: F401  # which adds to CASES
from parakit.data.chunks import chunk_count
from parakit.errors import ParakitError
from tests.plain_cases import CASES, ROWS, Case, Made, default_dtype
from tests.serial import batches

BATCH, STEPS, SEED = 32, 12, 3  # of 120 rows: an epoch ends with a batch of 24
EXACT = 1e-9
TABLE = Path(__file__).with_name("SAME_AS_PLAIN.md")
WAYS: dict[str, tuple[int, Any]] = {
    "1 worker": (1, pk.strategies.AllReduce()),
    "2, divided": (2, pk.strategies.AllReduce(exchange="shared memory")),
    "2, whole": (2, pk.strategies.AllReduce(exchange="shared memory", shard=False)),
    "2, gloo": (2, pk.strategies.AllReduce(exchange="gloo")),
    "3, inline": (3, pk.strategies.AllReduce()),
}
SEEN: dict[str, dict[str, str]] = {}

pytestmark = [
    pytest.mark.dask,
    pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*nested_tensor:UserWarning"),
]


@pytest.fixture(scope="module")
def pools() -> Iterator[dict[str, pk.Workers]]:
    with pk.connect(2) as processes, pk.connect("inline") as inline:
        yield {way: inline if "inline" in way else processes for way in WAYS}


def fresh(case: Case) -> Made:
    """What a case makes, the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return case.make()


def taken(tree: Any, rows: Tensor) -> Any:
    if isinstance(tree, dict):
        return {key: taken(value, rows) for key, value in tree.items()}
    return tuple(taken(value, rows) for value in tree) if isinstance(tree, tuple) else tree[rows]


def called(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def plain(made: Made, steps: int = STEPS) -> tuple[list[float], nn.Module]:
    """A plain loop: its losses, and its model."""
    model, options = made.model, made.options
    if made.train:
        model.train()
    optimizer = made.optimizer(list(model.parameters()))
    if hasattr(optimizer, "train"):
        optimizer.train()
    scheduler = options["scheduler"](optimizer) if "scheduler" in options else None
    closure_wanted = isinstance(optimizer, torch.optim.LBFGS) or type(optimizer).__name__ == "Sam"
    losses = []
    for rows in batches(ROWS, chunk_count(ROWS, BATCH), BATCH, SEED, steps):
        values: list[Tensor] = []

        def closure(rows: Tensor = rows, values: list[Tensor] = values) -> Tensor:
            optimizer.zero_grad()
            value = made.loss(called(model, taken(made.inputs, rows)), taken(made.targets, rows))
            value = value[0] / value[1] if isinstance(value, tuple) else value
            value.backward()
            if "clip_norm" in options:
                nn.utils.clip_grad_norm_(model.parameters(), options["clip_norm"])
            values.append(value.detach())
            return value

        if closure_wanted:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
        if scheduler:
            scheduler.step()
        losses.append(float(values[0]))
    if hasattr(optimizer, "eval"):
        optimizer.eval()
    return losses, model


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything that a model is: parameters, buffers, modes, and plain attributes."""
    found: dict[str, Any] = {name: p.detach() for name, p in model.named_parameters()}
    found |= dict(model.named_buffers())
    for name, module in model.named_modules():
        found[f"{name}.training"] = float(module.training)
        found |= {
            f"{name}.{key}": float(value)
            for key, value in vars(module).items()
            if isinstance(value, bool | int | float) and not key.startswith("_")
        }
    return found


def difference(one: nn.Module, other: nn.Module) -> float:
    mine, theirs = state_of(one), state_of(other)
    assert mine.keys() == theirs.keys()
    return max(
        float((torch.as_tensor(mine[k]).double() - torch.as_tensor(theirs[k]).double()).abs().max()) for k in mine
    )


def outcome(case: Case, workers: pk.Workers, way: str, known: tuple[list[float], nn.Module] | None) -> str:
    """What comes of a case on one way: "as plain", by how much it differs, or what the refusal says."""
    made = fresh(case)
    count, strategy = WAYS[way]
    try:
        with default_dtype(made.default):
            run = pk.train(
                made.model, (made.inputs, made.targets), on=workers, workers=count, strategy=strategy, loss=made.loss,
                optimizer=made.optimizer, batch_size=BATCH, steps=STEPS, seed=SEED, check=1.0, **made.options,
            )  # fmt: skip
        run.wait(timeout=60, progress=False)
    except ParakitError as error:
        return f"refused: {str(error).splitlines()[0]}"
    assert known is not None, f"{case.name} was trained, and should be refused"
    off = max(abs(a - b) for a, b in zip(run.history.losses.tolist(), known[0], strict=True))
    off = max(off, difference(run.model, known[1]))
    return "as plain" if off <= EXACT else f"off by {off:.2g}"


@pytest.mark.parametrize("name", CASES)
def test_it_is_as_in_a_plain_loop_or_refused(pools: dict[str, pk.Workers], name: str) -> None:
    case = CASES[name]
    with torch.random.fork_rng():
        made = fresh(case)
        with default_dtype(made.default):
            known = None if case.refused else plain(made)
    ways = ["2, divided"] if case.refused else list(WAYS)
    SEEN[name] = {way: outcome(case, pools[way], way, known) for way in ways}
    if case.refused:
        assert re.search(case.refused, SEEN[name]["2, divided"]), SEEN[name]
    else:
        assert set(SEEN[name].values()) == {"as plain"}, SEEN[name]


HEAD = f"""# The same as a plain loop, or refused

Each of these {len(CASES)} kinds of models, losses and optimizers was trained for {STEPS} steps by a plain PyTorch loop
and by parakit, in double precision, over the same batches: with one worker; with two that add gradients up in shared
memory and divide the update, do so without dividing it, or add them up over connections (gloo); and with three that
take turns in one process (inline). "as plain": every loss, and every parameter, buffer, mode and number that the model
holds in the end, is that of the plain loop within 1e-9. What would differ is refused, at the call or by a run that
stops; the first sentence of the message is shown.

`PARAKIT_UPDATE=1 python -m pytest tests/test_same_as_plain.py` writes this file; `tests/plain_cases.py`
and `tests/more_plain_cases.py` have the code.
"""


def table() -> str:
    lines = [HEAD, f"| kind | {' | '.join(WAYS)} |", f"|---|{'---|' * len(WAYS)}"]
    for name, seen in SEEN.items():
        if "1 worker" in seen:
            cells = [seen[way] for way in WAYS]
        else:
            told = re.sub(r"-?\d+\.\d+(e-?\d+)?", "...", seen["2, divided"])
            # In which step a run is stopped is a matter of time: it looks as often as it costs little.
            told = re.sub(r"\b\d+ samples|\bstep \d+|parts of \d+ and", lambda m: re.sub(r"\d+", "...", m[0]), told)
            cells = [told.replace("|", "\\|").replace("<", "&lt;"), *("" for _ in range(len(WAYS) - 1))]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def test_the_table_shows_what_was_seen() -> None:
    if len(SEEN) != len(CASES):
        pytest.skip("only some of the kinds were tried")
    made = table()
    if os.environ.get("PARAKIT_UPDATE") == "1":
        TABLE.write_text(made, encoding="utf-8")
        pytest.fail(f"{TABLE.name} was written anew; look at what changed, and keep it")
    assert made == TABLE.read_text(encoding="utf-8"), "PARAKIT_UPDATE=1 writes the table anew"
