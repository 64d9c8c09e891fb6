"""Look into a network: is it well scaled, well conditioned, flat, and still learning?

==========================  =========================================================
`degeneracy`                are the components of a CP kernel huge and cancelling?
`spectrum`                  condition number, effective and stable rank, row norms, |λ|
`signal_report`             variance of activations and gradients, by layer
`step_report`               effective learning rates, growing columns
`top_hessian_eigenvalue`    how sharply the loss curves upward
`circular_lipschitz`        2-norm of a convolution; `gram_lipschitz` bounds it
`loss_slice`                the loss around a model, along one or two directions
==========================  =========================================================

Everything measures and changes nothing: parameters, gradients, flags, hooks and batch
statistics of a model are afterwards what they were.
"""

from cpnb._diagnostics.degeneracy import (
    ENERGY_LIMIT,
    FLOAT32_LIMIT,
    Degeneracy,
    DegeneracyReport,
    degeneracy,
    degeneracy_report,
)
from cpnb._diagnostics.hessian import HessianEigenvalue, top_hessian_eigenvalue
from cpnb._diagnostics.landscape import LossSlice, filter_directions, loss_slice
from cpnb._diagnostics.lipschitz import circular_lipschitz, gram_lipschitz
from cpnb._diagnostics.signals import Signal, SignalReport, signal_report
from cpnb._diagnostics.spectra import (
    Spectrum,
    SpectrumReport,
    spectrum,
    spectrum_report,
)
from cpnb._diagnostics.steps import EffectiveStep, StepReport, step_report

__all__ = [
    "ENERGY_LIMIT",
    "FLOAT32_LIMIT",
    "Degeneracy",
    "DegeneracyReport",
    "EffectiveStep",
    "HessianEigenvalue",
    "LossSlice",
    "Signal",
    "SignalReport",
    "Spectrum",
    "SpectrumReport",
    "StepReport",
    "circular_lipschitz",
    "degeneracy",
    "degeneracy_report",
    "filter_directions",
    "gram_lipschitz",
    "loss_slice",
    "signal_report",
    "spectrum",
    "spectrum_report",
    "step_report",
    "top_hessian_eigenvalue",
]
