"""The table of a rank sweep: what is known about a network at which ranks."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from cpnb._files import replacing
from cpnb._sweep.files import read_sweep, sweep_content, write_sweep
from cpnb._sweep.fingerprints import check_network
from cpnb._sweep.known import SweptPoints
from cpnb._sweep.page import sweep_fragment, sweep_page
from cpnb._sweep.points import point_row
from cpnb._sweep.timing import time_layers


@dataclass
class RankSweep(SweptPoints):
    """Accuracy, loss, kernel error, size and FLOPs of a network at measured ranks.

    Ranks without a measurement are gaps; nothing is interpolated.

    Attributes:
        layers: The CP layers in module order.
        other_parameters: Parameters outside the CP layers.
        other_flops: FLOPs outside the CP layers, for one image.
        key: Importance that ordered the components.
        refit: Whether λ was re-solved after each cut, True on the kernel, ``"data"``
            on the outputs.
        fingerprint: Hash of the network, see ``model_fingerprint``.
        provenance: Versions, device, date, number of images, their hash, and that of
            what decided the order.
        axes: What was swept: layer names, and ``"*"`` for all layers at once.
        keeps: Fractions of the components on the ``"*"`` axis.
        status: ``"finished"`` or ``"interrupted"``.
        methods: By axis, how it was measured: ``"together"``, or what else and why.
        times: What :meth:`measure_times` found.
    """

    key: str
    refit: bool | str
    fingerprint: str
    provenance: dict[str, Any] = field(default_factory=dict)
    axes: tuple[str, ...] = ()
    status: str = "finished"
    methods: dict[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        """One line: points, layers, key, images."""
        ranks = ", ".join(f"{name or 'layer'} {r}" for name, r in self.ranks.items())
        images = self.provenance.get("images", "unknown")
        return (
            f"RankSweep({len(self)} points of {ranks}; key={self.key!r}, "
            f"refit={self.refit}, images={images}, {self.status})"
        )

    def copy(self) -> RankSweep:
        """A table with the same points that can grow on its own."""
        errors = {name: dict(known) for name, known in self._errors.items()}
        return replace(
            self,
            provenance=dict(self.provenance),
            methods=dict(self.methods),
            times=dict(self.times),
            _measured=dict(self._measured),
            _errors=errors,
        )

    def to_rows(self) -> list[dict[str, Any]]:
        """The swept axes as rows, one truncated network each, for a data frame or CSV.

        A row with a layer name cuts this layer alone, and ``parameters``, ``flops``
        and their dense counterparts are those of the layer. A row of layer ``"*"`` cuts
        every CP layer to the fraction ``keep``: ``rank``, ``full_rank`` and
        ``break_even_rank`` are sums over the layers, the error is over all kernels
        together, and the counts are those of the network. What begins with
        ``network_`` is the network's in every row. FLOPs are for one image, with CP
        layers run as chains.

        Returns:
            Dicts with the keys ``layer, rank, keep, accuracy, loss, relative_error,
            parameters, dense_parameters, flops, dense_flops, full_rank,
            break_even_rank, relative_rank, network_parameters,
            network_dense_parameters, network_flops, network_dense_flops, network_ms,
            key, refit, method``; ``relative_rank`` is R/R_same, ``network_ms`` None
            before :meth:`measure_times`, ``method`` as in ``methods``.
        """
        return [
            point_row(self.layers, axis, position, point)
            | {
                "key": self.key,
                "refit": self.refit,
                "method": self.methods.get(axis),
            }
            for axis in self.axes
            for position, point in self.curve(axis)
        ]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as a small JSON file, in one step.

        Args:
            path: Target; an existing file is replaced.
        """
        write_sweep(path, sweep_content(self))

    def to_html(self, path: str | os.PathLike[str] | None = None) -> str:
        """The table as a page with sliders, which needs no kernel, server or network.

        One slider for each axis, moved by mouse or keyboard; it cuts this layer alone,
        or all layers. In a notebook the sweep itself, as the last line of a cell, shows
        the same, also after export to HTML.

        Args:
            path: Where to write the page as well, in one step.

        Returns:
            The page.

        Raises:
            ValueError: If the network at full rank or every axis is missing.
        """
        page = sweep_page(self)
        if path is not None:
            with replacing(path) as temporary:
                temporary.write_text(page, encoding="utf-8")
        return page

    def _repr_html_(self) -> str | None:
        known = self.point().accuracy is not None and any(map(self.curve, self.axes))
        return sweep_fragment(self) if known else None

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], model: nn.Module | None = None
    ) -> RankSweep:
        """Read a table written by :meth:`save`.

        Args:
            path: The file.
            model: When given, the network that the table must be about.

        Returns:
            The table.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is not a rank sweep, is damaged, or was made for
                another network than ``model``.
        """
        sweep = read_sweep(path, cls)
        if model is not None:
            sweep.check_model(model)
        return sweep

    def measure_times(
        self, model: nn.Module, data: Any, *, batch_size: int = 256, repeats: int = 5
    ) -> None:
        """Time each layer of the network, dense and as chains, and keep it in `times`.

        Args:
            model: The network of the sweep.
            data: As in `rank_sweep`; its first images are used.
            batch_size: How many.
            repeats: Runs of each layer, in turns; the shortest counts.

        Raises:
            ValueError: If ``model`` is another network.
        """
        self.check_model(model)
        self.times = time_layers(model, data, batch_size=batch_size, repeats=repeats)

    def check_model(self, model: nn.Module) -> None:
        """Raise ValueError unless ``model`` is the network that was measured."""
        check_network(model, self.ranks, self.fingerprint)
