"""What the notebooks use to check exercises."""

from typing import Any

import torch


def check(name: str, got: Any, expected: Any, **tolerance: float) -> None:
    """Say whether an exercise is solved; a wrong answer is an error.

    Args:
        name: Of the exercise, as it is printed.
        got: What the reader's function returned; None stands for a stub.
        expected: The right answer, as `torch.testing.assert_close` takes it.
        **tolerance: ``rtol`` and ``atol`` of that function.
    """
    if got is None:
        print(f"{name}: not solved yet, the function returned None.")
        return
    torch.testing.assert_close(got, expected, **tolerance)
    print(f"{name}: correct.")
