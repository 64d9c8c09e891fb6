"""How much can a convolution amplify: its exact 2-norm on a torus, and a bound."""

import operator
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cpnb._checks import check_count, check_kernel


def circular_lipschitz(kernel: Tensor | nn.Module, size: int | Sequence[int]) -> Tensor:
    """Largest singular value of a circular convolution, exactly.

    The Fourier transform takes the convolution apart into one ``(out, in)`` matrix for
    each frequency; the answer is the largest of their 2-norms. Stride 1.

    Args:
        kernel: Of shape ``(out, in, *window)`` with one to three window modes, or a
            convolution layer, stock, CP or of low rank, with groups or without.
        size: Height and width of the input, or one number for both. An input padded
            with zeros lies on a torus too: with ``size`` that of the input plus the
            window less one, the result bounds the zero-padded convolution.

    Returns:
        Scalar tensor, differentiable where the largest value is single.

    Raises:
        TypeError: If ``kernel`` or ``size`` has the wrong type.
        ValueError: If the kernel is not finite, the stride or dilation is not 1, or
            the window does not fit into ``size``.

    Source: Sedghi, Gupta & Long 2019, arXiv:1805.10408.

    >>> circular_lipschitz(torch.ones(1, 1, 3, 3), 8)
    tensor(9.)
    """
    return torch.linalg.matrix_norm(_frequencies(kernel, size), 2).max()


def gram_lipschitz(
    kernel: Tensor | nn.Module, size: int | Sequence[int], *, iterations: int = 6
) -> Tensor:
    """Upper bound of `circular_lipschitz`, but for rounding, without an SVD.

    Gram iteration, G ← GᴴG, N times: each step squares the singular values, so that the
    largest takes over the Frobenius norm, of which the 2ᴺ-th root is taken. The bound
    is at most ``rank^(1/2^(N+1))`` times the exact value. G is rescaled at every step
    and the scale kept as a logarithm, so that nothing overflows.

    Args:
        kernel: As in `circular_lipschitz`.
        size: As in `circular_lipschitz`.
        iterations: Number N of steps. With 6 the bound is 4 % above at most for 128
            channels.

    Returns:
        Scalar tensor, differentiable.

    Raises:
        TypeError: As `circular_lipschitz`.
        ValueError: As `circular_lipschitz`, or if ``iterations`` is negative.

    Source: Delattre, Barthélemy, Araujo & Allauzen 2023, arXiv:2305.16173.

    >>> bound = gram_lipschitz(torch.ones(1, 1, 3, 3), 8)
    >>> round(bound.item(), 4)
    9.0
    """
    count = check_count(iterations, "iterations", least=0)
    gram = _frequencies(kernel, size)
    if gram.shape[-2] < gram.shape[-1]:
        gram = gram.mH  # the same singular values, and a smaller GᴴG
    logarithm = gram.real.new_zeros(gram.shape[:-2])
    for _ in range(count):
        norm = _frobenius(gram)
        gram = gram / norm[..., None, None]
        logarithm = 2 * (logarithm + norm.log())
        gram = gram.mH @ gram
    logarithm = 2.0**-count * (logarithm + _frobenius(gram).log())
    return (logarithm.exp() * (gram != 0).any(-1).any(-1)).max()


def _frobenius(gram: Tensor) -> Tensor:
    """Norm by frequency; 1 for a zero matrix, which then stays zero."""
    squares = (gram.real.square() + gram.imag.square()).sum((-2, -1))
    return torch.where(squares > 0, squares, 1).sqrt()


def _frequencies(kernel: Tensor | nn.Module, size: int | Sequence[int]) -> Tensor:
    """Matrix by group and frequency, shape (groups, *frequencies, out, in), complex."""
    groups, weight = 1, kernel
    if isinstance(kernel, nn.Module):
        for name in ("stride", "dilation"):
            if any(n != 1 for n in getattr(kernel, name, (1,))):
                raise ValueError(
                    f"kernel has {name} {tuple(getattr(kernel, name))}, expected 1 "
                    "along every axis: only then is it one matrix per frequency."
                )
        groups, weight = getattr(kernel, "groups", 1), getattr(kernel, "weight", None)
    check_kernel(weight)
    window = tuple(weight.shape[2:])
    if not 1 <= len(window) <= 3:
        raise ValueError(
            f"kernel has shape {tuple(weight.shape)}, expected (out, in, *window) with "
            "one to three window modes. For a matrix use torch.linalg.matrix_norm."
        )
    sizes = _sizes(size, window)
    if weight.dtype in (torch.float16, torch.bfloat16):
        weight = weight.float()
    axes = tuple(range(-len(window), 0))
    found = torch.fft.rfftn(weight, s=sizes, dim=axes)
    # Mirrored frequencies of a real kernel have the same norm: half of them do.
    return found.unflatten(0, (groups, -1)).movedim((1, 2), (-2, -1))


def _sizes(size: int | Sequence[int], window: tuple[int, ...]) -> tuple[int, ...]:
    single = hasattr(size, "__index__")
    sizes = (operator.index(size),) * len(window) if single else tuple(size)
    if len(sizes) != len(window) or any(map(operator.lt, sizes, window)):
        raise ValueError(
            f"size is {size}, expected {len(window)} numbers, at least the window "
            f"{window}."
        )
    return sizes
