"""What the normalizers share: the layers they act on, gains, computed kernels."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from cpnb._checks import check_kernel
from cpnb.base import CPLayer
from cpnb.conversion import CONVERTIBLE, is_weighted
from cpnb.lowrank_base import LowRankLayer
from cpnb.randomness import seeded
from cpnb.surgery import Skip, refuse_tied, replace_layers, skip_rule

LEARNABLE = "learnable"
RELU_GAIN = math.sqrt(2)  # for rows of norm 1: ReLU halves the power of the signal
FACTORISED = (CPLayer, LowRankLayer)
Gain = float | str


def per_layer(
    model: nn.Module,
    skip: Skip,
    normalise: Callable[[nn.Module], nn.Module],
    *,
    reason: Callable[[Tensor], str | None] | None = None,
    factorised: tuple[type, ...] = (),
    output: bool = True,
) -> nn.Module:
    """Copy a model with each of its layers normalised by itself.

    Args:
        model: Any module.
        skip: As in `cpnb.normalize`.
        normalise: Maps a copy of a layer, which it may change, to its replacement.
        reason: Says why a kernel, seen as a matrix, cannot be normalised.
        factorised: The kinds of factorised layers that can be, too.
        output: Whether the output layer is normalised too.

    Returns:
        A new model.
    """
    layers = chosen_layers(model, skip, factorised, output=output)
    for name, layer in layers.items():
        why = reason and reason(layer.weight.detach().flatten(1))
        if why:
            raise ValueError(f"layer {name!r} {why} Pass it in skip.")
    new = {name: normalise(copy.deepcopy(layer)) for name, layer in layers.items()}
    return replace_layers(model, new)


def chosen_layers(
    model: nn.Module,
    skip: Skip,
    factorised: tuple[type, ...] = (),
    *,
    output: bool = True,
) -> dict[str, nn.Module]:
    """The layers to normalise by name, in the order of the model's modules.

    Args:
        model: Any module.
        skip: As in `cpnb.normalize`.
        factorised: The kinds of factorised layers that can be normalised.
        output: Whether to include the output layer: the last one in that order, if the
            model is more than a layer.

    Raises:
        TypeError: If one of them cannot be.
        ValueError: If there is none, or one is normalised already or tied.
    """
    skipped = skip_rule(model, skip)
    weighted = weighted_layers(model)
    layers = {n: layer for n, layer in weighted.items() if not skipped(n, layer)}
    if not layers:
        raise ValueError(
            f"model is a {type(model).__name__} with no convolution or linear layer to "
            "normalise. Check the model and skip."
        )
    if not output and list(weighted) != [""]:
        layers.pop(list(weighted)[-1], None)
    if not layers:
        raise ValueError(
            f"model is a {type(model).__name__} with no layer but the output one to "
            "normalise. Pass output=True to normalise that too."
        )
    for name, layer in layers.items():
        _refuse(name, layer, factorised)
    refuse_tied(model, layers)
    return layers


def weighted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every layer with a kernel by name, stock or factorised, in the model's order."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if is_weighted(layer) or isinstance(layer, FACTORISED)
    }


def _refuse(name: str, layer: nn.Module, factorised: tuple[type, ...]) -> None:
    kind = type(layer).__name__
    if parametrize.is_parametrized(layer) or getattr(layer, "equilibration", None):
        raise ValueError(
            f"layer {name!r} is a {kind}, normalised already. Call "
            "cpnb.remove_normalizer first, or pass the layer in skip."
        )
    if isinstance(layer, FACTORISED):
        if not isinstance(layer, factorised):
            raise TypeError(
                f"layer {name!r} is a {kind}, whose kernel is a product and never "
                "stored, expected a dense layer. Use a norm layer such as 'batch' or, "
                "for CP layers, 'conditioned', or cpnb.to_dense before, or pass the "
                "layer in skip."
            )
    elif type(layer) not in CONVERTIBLE:
        expected = ", ".join(stock.__name__ for stock in CONVERTIBLE)
        raise TypeError(
            f"layer {name!r} is a {kind}, expected exactly one of {expected}, or a CP "
            f"layer. To leave it alone, pass skip=({name!r},)."
        )
    else:
        check_kernel(layer.weight.detach(), f"{name}.weight" if name else "weight")


def refuse_options(model: nn.Module, why: str, skip: Skip, output: bool) -> None:
    """Refuse to choose among layers where the choice means nothing."""
    skip_rule(model, skip)  # refuses what is no layer
    if callable(skip) or tuple(skip) or output:
        said = "output=True" if output else f"skip={skip!r}"
        raise ValueError(f"{said} is given, expected neither skip nor output {why}.")


class Reparametrization(nn.Module):
    """A kernel computed from another one: ``gain · constrain(matrix of each group)``.

    Attributes:
        gain: Factor of the kernel: a buffer, or a parameter if it is learned.
    """

    no_decay = ("gain",)

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.groups = getattr(layer, "groups", 1)
        self.register_buffer("gain", layer.weight.new_ones(()))

    def constrain(self, matrix: Tensor) -> Tensor:
        """Map ``(groups, out / groups, fan_in)`` to the same shape."""
        raise NotImplementedError

    def forward(self, kernel: Tensor) -> Tensor:
        """The constrained kernel, in the layout of the one it is computed from."""
        with torch.autocast(kernel.device.type, enabled=False):
            matrix = kernel.reshape(self.groups, kernel.shape[0] // self.groups, -1)
            wide = torch.promote_types(kernel.dtype, torch.float32)
            matrix = self.gain * self.constrain(matrix.to(wide)).to(kernel.dtype)
        return _laid_out(matrix.reshape(kernel.shape), kernel)

    def set_gain(self, gain: Tensor, *, learned: bool, trained: bool = True) -> None:
        """Set the gain; a learned one is a parameter, and ``trained`` unless frozen."""
        del self.gain
        if learned:
            self.gain = nn.Parameter(gain, requires_grad=trained)
        else:
            self.register_buffer("gain", gain)


def reparametrized(
    layer: nn.Module,
    module: Reparametrization,
    gain: Gain | None = None,
    norm: float | None = None,
) -> nn.Module:
    """Register a reparametrisation on a layer.

    Args:
        layer: A stock layer, changed in place.
        module: Made for it, with a gain of 1.
        gain: A number; ``"learnable"`` for a parameter that starts where the kernel
            keeps its Frobenius norm; None leaves the module's gain as it is.
        norm: That norm, if it is not that of the layer's present kernel.

    Returns:
        The layer.
    """
    norm = frobenius(layer.weight) if norm is None else norm
    trained = layer.weight.requires_grad
    # Unchecked: after torch's own ones the shape may change.
    parametrize.register_parametrization(layer, "weight", module, unsafe=True)
    if gain is not None:
        start = start_gain(gain, norm, frobenius(layer.weight))
        value = module.gain.new_tensor(start)
        module.set_gain(value, learned=gain == LEARNABLE, trained=trained)
    return layer


def start_gain(gain: Gain, norm: float, unit_norm: float) -> float:
    """The number a gain starts from: its own, or the one that keeps a kernel's norm.

    Args:
        gain: As in `reparametrized`.
        norm: Of the kernel to be replaced.
        unit_norm: Of its replacement with a gain of 1.
    """
    if gain == LEARNABLE:
        return norm / unit_norm if norm > 0 and unit_norm > 0 else 1.0
    if isinstance(gain, bool) or not isinstance(gain, int | float):
        raise TypeError(f"gain is {gain!r}, expected a number or {LEARNABLE!r}.")
    if not 0 < gain < math.inf:
        raise ValueError(f"gain is {gain}, expected a number above 0.")
    return float(gain)


def frobenius(kernel: Tensor) -> float:
    """Norm of a kernel as a number."""
    return torch.linalg.vector_norm(kernel.detach().double()).item()


def _laid_out(kernel: Tensor, like: Tensor) -> Tensor:
    """Contiguous ``kernel`` with the channels innermost if they are so in ``like``."""
    if like.ndim < 4 or like.stride(1) != 1:
        return kernel
    # A clone, as contiguous() would keep the strides of a single channel.
    last = kernel.movedim(1, -1).clone(memory_format=torch.contiguous_format)
    return last.movedim(-1, 1)


@contextmanager
def drawing_from(generator: torch.Generator | None, device: Any) -> Iterator[None]:
    """Let what draws from torch's global generator draw from ``generator``, if any."""
    if generator is None:
        yield
        return
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    with seeded(seed, device):
        yield


def inverse_root(squares: Tensor) -> Tensor:
    """``1/√x``; 0 with zero gradient where x is too small, so that zeros stay put."""
    alive = squares >= torch.finfo(squares.dtype).tiny
    return torch.where(alive, squares, 1).rsqrt() * alive
