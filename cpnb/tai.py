"""The split of Tai et al.: a convolution as two one-dimensional stock ones."""

import torch
from torch import Tensor, nn

from cpnb._checks import check_kernel
from cpnb.conversion import refusal
from cpnb.geometry import along_axis
from cpnb.matrices import matrix_rank, spectral_factors, unfold
from cpnb.ranks import Rank
from cpnb.surgery import Skip, refuse_tied, replace_layers, skip_rule


def tai_decompose(conv: nn.Conv2d, rank: Rank) -> nn.Sequential:
    """Split a convolution into a vertical and a horizontal one, optimally.

    A ``(height, 1)`` convolution into ``rank`` channels, then a ``(1, width)`` one out
    of them, which keeps the bias. Their weights come from the singular value
    decomposition of the kernel unfolded to ``(in·height, out·width)``, half of each
    singular value on either side, so that no other pair of this rank is closer to the
    kernel in the Frobenius norm, and at the full rank the two are exact.

    Stride, padding, dilation and padding mode act axis by axis and are split; groups
    stay groups, each with ``rank`` channels of its own. The source is not touched.

    Args:
        conv: The convolution, of any kernel size.
        rank: An int up to the full rank ``min(in·height, out·width)`` of one group; a
            float in (0, 1] as fraction of the rank with as many weights as the dense
            kernel, or ``"same"`` for that rank; or a rule such as
            ``FitRank(0.1)``, here on the singular values.

    Returns:
        The two convolutions, of the same dtype, device and training flag.

    Raises:
        TypeError: If ``conv`` is not a plain `nn.Conv2d` or ``rank`` no rank.
        ValueError: If the kernel is not finite or ``rank`` is out of range.

    Source: Tai et al. 2016, arXiv:1511.06067.

    >>> tai_decompose(nn.Conv2d(32, 64, (5, 3), stride=(2, 1), padding=1), 0.5)
    Sequential(
      (0): Conv2d(32, 44, kernel_size=(5, 1), stride=(2, 1), padding=(1, 0), bias=False)
      (1): Conv2d(44, 64, kernel_size=(1, 3), stride=(1, 1), padding=(0, 1))
    )
    """
    reason = refusal(conv)
    if reason is None and type(conv) is not nn.Conv2d:
        reason = "expected a Conv2d"
    if reason:
        raise TypeError(f"conv is a {type(conv).__name__}: {reason}.")
    check_kernel(conv.weight, "conv.weight")
    groups, (height, width) = conv.groups, conv.kernel_size
    # Here height goes with the inputs: the kernel of the transposed layer, unfolded.
    kernel = conv.weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    matrices = unfold(kernel, groups)
    rows, columns = matrices.shape[1:]
    count, full = matrix_rank(rank, (rows, columns), matrices), min(rows, columns)
    if count > full:
        raise ValueError(
            f"rank is {count}, expected at most the full rank {full} of the "
            f"({rows}, {columns}) unfolding (in·height, out·width). Channels beyond it "
            "would be dead."
        )
    # Shapes (groups, rank, in·height) and (groups, rank, out·width).
    first, last = (factor.mT for factor in spectral_factors(matrices, count))
    hidden, bias = groups * count, conv.bias is not None
    like = {
        "padding_mode": conv.padding_mode,
        "dtype": conv.weight.dtype,
        "device": conv.weight.device,
    }
    vertical = nn.utils.skip_init(
        *(nn.Conv2d, conv.in_channels, hidden, (height, 1)),
        **along_axis(conv, 0),
        **like,
        bias=False,
    )
    horizontal = nn.utils.skip_init(
        *(nn.Conv2d, hidden, conv.out_channels, (1, width)),
        **along_axis(conv, 1),
        **like,
        bias=bias,
    )
    last = last.unflatten(2, (-1, width)).movedim(1, 2)
    weights = (vertical.weight, first), (horizontal.weight, last)
    with torch.no_grad():
        for weight, values in weights:
            weight.copy_(values.reshape(weight.shape))
            weight.requires_grad_(conv.weight.requires_grad)
        if bias:
            horizontal.bias.copy_(conv.bias)
            horizontal.bias.requires_grad_(conv.bias.requires_grad)
    return nn.Sequential(vertical, horizontal).train(conv.training)


def tai_kernel(pair: nn.Sequential) -> Tensor:
    """The kernel that the two convolutions of `tai_decompose` stand for.

    Args:
        pair: The vertical, then the horizontal convolution.

    Returns:
        Shape ``(out, in / groups, height, width)``; differentiable.

    >>> conv = nn.Conv2d(4, 6, 3)
    >>> torch.allclose(tai_kernel(tai_decompose(conv, 12)), conv.weight, atol=1e-6)
    True
    """
    vertical, horizontal = pair
    groups = vertical.groups
    first = vertical.weight[..., 0].unflatten(0, (groups, -1))
    last = horizontal.weight[:, :, 0].unflatten(0, (groups, -1))
    return torch.einsum("gorw,grih->goihw", last, first).flatten(0, 1)


def tai(model: nn.Module, rank: Rank, *, skip: Skip = ()) -> nn.Module:
    """Copy a model with every 2-D convolution split by `tai_decompose`.

    Args:
        model: Any module; also a single convolution. Other layers stay as they are.
        rank: As in `tai_decompose`, for each layer by itself.
        skip: Names of layers to leave alone, or a predicate ``(name, layer) -> bool``.

    Returns:
        A new model of stock layers.

    Raises:
        TypeError: If a convolution is parametrized or has hooks.
        ValueError: If there is no convolution, or as in `tai_decompose`.
    """
    skipped = skip_rule(model, skip)
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Conv2d) and not skipped(name, layer)
    }
    if not layers:
        raise ValueError(
            f"model is a {type(model).__name__} with no Conv2d to split. Check the "
            "model and skip."
        )
    refuse_tied(model, layers)
    split = {name: tai_decompose(layer, rank) for name, layer in layers.items()}
    return replace_layers(model, split)
