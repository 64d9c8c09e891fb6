"""How curved is the loss: the top Hessian eigenvalue by Hessian-vector products."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cpnb._checks import check_count, check_positive
from cpnb._diagnostics.measuring import Chunks, as_measured, read_chunks, summed_loss


@dataclass(frozen=True)
class HessianEigenvalue:
    """The largest eigenvalue of a Hessian H, and how well it is known.

    Attributes:
        value: The largest eigenvalue, with its sign: the sharpest upward curve. Never
            above the true one but for rounding.
        magnitude: The largest |eigenvalue|, ``‖H‖₂``. Never above the true one.
        residual: ``‖Hv − value·v‖`` at the unit vector v found; some eigenvalue of H
            is no further from ``value`` than this.
        iterations: Number of Hessian-vector products.
        converged: Whether the residual is at most ``tolerance · |value|``.
    """

    value: float
    magnitude: float
    residual: float
    iterations: int
    converged: bool

    @property
    def negative_dominates(self) -> bool:
        """Whether the eigenvalue of largest size is a negative one."""
        return self.magnitude > abs(self.value) + self.residual or self.value < 0


class _State(NamedTuple):
    """Rayleigh quotient, residual and ‖Hv‖ of one unit vector."""

    value: float
    residual: float
    size: float


def top_hessian_eigenvalue(
    model: nn.Module,
    data: Any,
    *,
    iterations: int = 100,
    tolerance: float = 0.01,
    generator: torch.Generator | None = None,
    batch_statistics: bool = False,
    chunk_size: int = 1000,
    progress: bool = True,
) -> HessianEigenvalue:
    """Largest eigenvalue of the Hessian of the mean cross entropy, by power iteration.

    H is that for all parameters with ``requires_grad``, as the model stores them; it is
    only ever multiplied with vectors. Power iteration finds the eigenvalue of largest
    *size*. If that is negative, or if two of opposite sign hold each other up, a second
    run on ``H + ‖H‖·I`` finds the largest one. The model is left as it was.

    Ctrl-C ends the search; what is known by then is returned as not converged.

    Args:
        model: Maps images ``(n, ...)`` to scores ``(n, classes)``. Twice
            differentiable wherever it is differentiable: a ReLU network is.
        data: A data set, of which the training split is used, or a pair
            ``(images, labels)``.
        iterations: Hessian-vector products of each run at most; each costs about two
            gradients of the whole data.
        tolerance: Residual relative to the eigenvalue at which a run ends. The error
            of the eigenvalue is far smaller, of second order in the residual.
        generator: Source of the start vector; torch's default one if None.
        batch_statistics: Whether batch norm takes the statistics of each chunk, as in
            training, instead of the recorded ones. Dropout is off in either case.
        chunk_size: Images per pass; smaller needs less memory.
        progress: Show a text progress bar.

    Returns:
        `HessianEigenvalue`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument has an impossible value, or no parameter is
            trainable.
        FloatingPointError: If a product is not finite.

    Source: Pearlmutter 1994, doi:10.1162/neco.1994.6.1.147 (the product); used on
    networks in arXiv:2004.09506.

    >>> net = nn.Linear(2, 2, bias=False)
    >>> _ = nn.init.zeros_(net.weight)
    >>> pair = torch.tensor([[2.0, 0.0]]), torch.tensor([0])
    >>> found = top_hessian_eigenvalue(net, pair, progress=False)
    >>> round(found.value, 4)  # ‖x‖² times the softmax's ½
    2.0
    """
    iterations = check_count(iterations, "iterations")
    if not check_positive(tolerance, "tolerance") < 1:
        raise ValueError(f"tolerance is {tolerance}, expected a number in (0, 1).")
    chunks = read_chunks(model, data, chunk_size)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError(
            f"model is a {type(model).__name__} without trainable parameters, expected "
            "at least one with requires_grad."
        )
    seen: list[_State] = []
    done, shift = False, 0.0
    with as_measured(model, batch_statistics), torch.enable_grad():
        product = _hessian_product(model, parameters, chunks)
        with _bar(iterations, progress) as bar:
            try:
                for _ in range(2):
                    start = _start(parameters, generator)
                    for state in _climb(product, start, shift, iterations):
                        seen.append(state)
                        bar.update()
                        done = state.residual <= tolerance * abs(state.value)
                        if done:
                            break
                    if done and (seen[-1].value >= 0 or shift > 0):
                        break
                    shift = seen[-1].size
            except KeyboardInterrupt:
                if not seen:
                    raise
                done = False
    # Every Rayleigh quotient is a lower bound of the largest eigenvalue.
    best = seen[-1] if done else max(seen, key=lambda state: state.value)
    magnitude = max(state.size for state in seen)
    return HessianEigenvalue(best.value, magnitude, best.residual, len(seen), done)


def _climb(
    product: Callable[[Tensor], Tensor], vector: Tensor, shift: float, iterations: int
) -> Iterator[_State]:
    """Power iteration on H + shift·I from a unit vector; yields what it knows of H."""
    for _ in range(iterations):
        image = product(vector)
        value = vector @ image
        residual, size = (image - value * vector).norm(), image.norm()
        state = _State(*torch.stack([value, residual, size]).tolist())
        if not math.isfinite(state.size):
            raise FloatingPointError(
                "The Hessian times a vector is not finite. Check that the model's "
                "loss and gradients are."
            )
        yield state
        vector = image + shift * vector
        vector = vector / vector.norm()


def _hessian_product(
    model: nn.Module, parameters: list[nn.Parameter], chunks: Chunks
) -> Callable[[Tensor], Tensor]:
    """The map v → Hv on flat vectors."""
    count = sum(len(labels) for _, labels in chunks)
    sizes = [p.numel() for p in parameters]
    unused = {"allow_unused": True, "materialize_grads": True}

    def gradient(images: Tensor, labels: Tensor) -> list[Tensor]:
        loss = summed_loss(model(images), labels) / count
        return torch.autograd.grad(
            loss,
            parameters,
            create_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )

    # A single chunk's graph is kept; of many, only one at a time fits in memory.
    kept = [gradient(*chunks[0])] if len(chunks) == 1 else None

    def product(vector: Tensor) -> Tensor:
        parts = [
            part.view_as(p)
            for part, p in zip(vector.split(sizes), parameters, strict=True)
        ]
        total = torch.zeros_like(vector)
        for gradients in kept or (gradient(*chunk) for chunk in chunks):
            pairs = zip(gradients, parts, strict=True)
            inner = sum((g * v).sum() for g, v in pairs if g.requires_grad)
            if isinstance(inner, Tensor):  # otherwise the loss is linear in them all
                found = torch.autograd.grad(
                    inner, parameters, retain_graph=kept is not None, **unused
                )
                total += torch.cat([f.flatten() for f in found])
        return total

    return product


def _start(parameters: list[nn.Parameter], generator: torch.Generator | None) -> Tensor:
    """A random unit vector, the same on every device."""
    like, count = parameters[0], sum(p.numel() for p in parameters)
    device = generator.device if generator is not None else "cpu"
    vector = torch.randn(count, generator=generator, device=device, dtype=torch.double)
    return (vector / vector.norm()).to(like.device, like.dtype)


def _bar(iterations: int, progress: bool) -> Any:
    from tqdm import tqdm

    text = "Hessian-vector products"
    return tqdm(total=iterations, desc=text, disable=not progress, leave=False)
