"""What does the loss look like around a model: slices along filter-normalised lines."""

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cpnb._checks import check_count, check_module, check_positive
from cpnb._diagnostics.measuring import as_measured, read_chunks, summed_loss
from cpnb.base import CPLayer


@dataclass(frozen=True)
class LossSlice:
    """Mean cross entropy on a line or a grid through a model.

    Attributes:
        offsets: Positions along each direction, 0 being the model.
        losses: In nats; NaN where it was not evaluated. Shape ``(points,)`` or
            ``(points, points)``, the first direction along the rows.
        complete: Whether every point was evaluated, not ended by Ctrl-C.
    """

    offsets: tuple[float, ...]
    losses: Tensor
    complete: bool


def filter_directions(
    model: nn.Module, *, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """A random direction in which every filter moves in proportion to its norm.

    A Gaussian draw for every parameter of two modes or more, scaled so that each
    filter ``d_o`` (first index o) has the norm of the model's own ``w_o``. Factors of
    a CP layer are normalised column by column: the column is what has a length of its
    own, and λ, the sizes of the components, counts as one filter. Parameters whose
    filters are single numbers, as the lengths of weight normalization, count as one
    filter likewise. Biases, norm layers and the scale σ stay where they are.

    Args:
        model: Any module.
        generator: Source of randomness; torch's default one if None. It gives the same
            direction on every device.

    Returns:
        A tensor for each parameter that moves, by its name.

    Raises:
        TypeError: If ``model`` is no module.

    Source: Li, Xu, Taylor, Studer & Goldstein 2018, arXiv:1712.09913; for CP layers
    adapted here.

    >>> net = nn.Linear(3, 2)
    >>> found = filter_directions(net)
    >>> list(found), torch.allclose(found["weight"].norm(dim=1), net.weight.norm(dim=1))
    (['weight'], True)
    """
    check_module(model)
    columns, single = set(), set()
    for layer in model.modules():
        if isinstance(layer, CPLayer):
            columns.update(layer.factors)
            single.add(layer.lam)
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 and parameter not in single:
            continue
        values = parameter.detach()
        device = generator.device if generator is not None else "cpu"
        draw = torch.randn(
            values.shape, generator=generator, device=device, dtype=torch.float64
        ).to(values)
        if parameter in columns:
            axes = (0,)
        elif values.ndim < 2 or values[0].numel() == 1:
            axes = tuple(range(values.ndim))
        else:
            axes = tuple(range(1, values.ndim))
        norms = [x.square().sum(axes, keepdim=True).sqrt() for x in (values, draw)]
        found[name] = draw * (norms[0] / norms[1])
    return found


@torch.no_grad()
def loss_slice(
    model: nn.Module,
    data: Any,
    *,
    directions: int = 1,
    span: float = 1.0,
    points: int = 41,
    generator: torch.Generator | None = None,
    batch_statistics: bool = False,
    chunk_size: int = 1000,
    progress: bool = True,
) -> LossSlice:
    """Evaluate the loss along one or two random directions through a model.

    The directions are those of `filter_directions`. The model's parameters are never
    written to, only replaced for a call. Points are evaluated from the middle outwards;
    Ctrl-C returns those that are done.

    Args:
        model: Maps images ``(n, ...)`` to scores ``(n, classes)``.
        data: A data set, of which the training split is used, or a pair
            ``(images, labels)``.
        directions: 1 for a line, 2 for a grid.
        span: Largest offset; at 1 each filter has moved by its own norm.
        points: Number of points along a direction; an odd one has the model itself.
        generator: Source of the directions; torch's default one if None.
        batch_statistics: Whether batch norm takes the statistics of each chunk, as in
            training. The recorded ones belong to the model in the middle: with them
            the walls around it look steeper than what training sees.
        chunk_size: Images per forward pass.
        progress: Show a text progress bar.

    Returns:
        `LossSlice`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument has an impossible value.

    Source: Li, Xu, Taylor, Studer & Goldstein 2018, arXiv:1712.09913.

    >>> net = nn.Linear(4, 3)
    >>> pair = torch.randn(8, 4), torch.arange(8) % 3
    >>> found = loss_slice(net, pair, points=5, progress=False)
    >>> found.offsets, found.losses.shape
    ((-1.0, -0.5, 0.0, 0.5, 1.0), torch.Size([5]))
    """
    if directions not in (1, 2):
        raise ValueError(f"directions is {directions!r}, expected 1 or 2.")
    points = check_count(points, "points", least=2)
    span = check_positive(span, "span")
    chunks = read_chunks(model, data, chunk_size)
    count = sum(len(labels) for _, labels in chunks)
    lines = [filter_directions(model, generator=generator) for _ in range(directions)]
    middle = {name: p.detach() for name, p in model.named_parameters()}
    offsets = tuple(span * (2 * n / (points - 1) - 1) for n in range(points))
    losses = torch.full((points,) * directions, math.nan, dtype=torch.float64)
    order = sorted(
        itertools.product(range(points), repeat=directions),
        key=lambda index: math.hypot(*(offsets[n] for n in index)),
    )
    done = 0
    with as_measured(model, batch_statistics):
        try:
            for index in _bar(order, progress):
                moved = dict(middle)
                for line, n in zip(lines, index, strict=True):
                    for name, step in line.items():
                        moved[name] = moved[name] + offsets[n] * step
                total = 0.0
                for images, labels in chunks:
                    scores = functional_call(model, moved, (images,))
                    total += summed_loss(scores.double(), labels).item()
                losses[index] = total / count
                done += 1
        except KeyboardInterrupt:
            pass
    return LossSlice(offsets, losses, complete=done == len(order))


def _bar(order: list[tuple[int, ...]], progress: bool) -> Any:
    from tqdm import tqdm

    return tqdm(order, desc="loss slice", unit=" points", disable=not progress)
