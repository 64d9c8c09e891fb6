"""Slide the ranks of a network and see what each costs: the rank explorer.

Python measures what the table lacks; `rank_explorer.js` draws, here and in a page.
"""

from __future__ import annotations

import base64
import copy
import io
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn

try:
    import anywidget
    import traitlets
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f'RankExplorer needs {error.name}: pip install "cpnb[notebooks]". To write a '
        "page with sliders needs nothing: sweep.to_html(path)."
    ) from error

from cpnb.convert import cp_layers
from cpnb.cp import relative_error
from cpnb.explore.page import SCRIPT, STYLE, explorer_table, sweep_page, sweep_points
from cpnb.explore.plots import ORANGE, plot_components, plot_images, plot_rank_curve
from cpnb.explore.sweep import GLOBAL, RankSweep, rank_sweep
from cpnb.explore.widgets import close_previous
from cpnb.train.evaluation import accuracy, images_and_labels, moved
from cpnb.train.records import write_text
from cpnb.truncation import KEYS, truncate

__all__ = ["NewestWins", "RankExplorer"]

_SLICES, _SIDE, _FLIPS = 8, 32, 10  # shown of a kernel, and of images


class RankExplorer(anywidget.AnyWidget):
    """Sliders over the ranks of a network, its accuracy curve, and the numbers.

    ``RankExplorer(model, data)`` sweeps the network first; ``RankExplorer(sweep)``
    shows a table; ``RankExplorer(sweep, model, data)`` shows it, and measures what it
    lacks on a thread of its own: several layers cut at once, or by another key. It
    works on a copy of the network. Running the cell again closes it.

    Args:
        *arguments: As above; ``data`` as `rank_sweep` takes it.
        key: Importance that orders the components in a new sweep.
        refit: Whether and how to re-solve λ in a new sweep.
        progress: Whether a new sweep shows a bar.

    Raises:
        TypeError: If the arguments are others.
        ValueError: If the sweep is of another network or another number of images, or
            is empty.
    """

    _esm = SCRIPT
    _css = STYLE
    table = traitlets.Dict().tag(sync=True)  # what the front end draws
    request = traitlets.Dict().tag(sync=True)  # where its sliders are
    answer = traitlets.Dict().tag(sync=True)  # what was measured last

    def __init__(
        self,
        *arguments: Any,
        key: str = "lam",
        refit: bool | str = False,
        progress: bool = True,
    ) -> None:
        match arguments:
            case (RankSweep() as sweep,):
                model = data = None
            case (RankSweep() as sweep, nn.Module() as model, data):
                sweep.check_model(model)
            case (nn.Module() as model, data):
                how: dict[str, Any] = {"key": key, "refit": refit, "progress": progress}
                sweep = rank_sweep(model, data, **how)
            case _:
                kinds = ", ".join(type(each).__name__ for each in arguments)
                expected = "(model, data), (sweep) or (sweep, model, data)"
                raise TypeError(f"arguments are ({kinds}), expected {expected}.")
        images = sweep.images if data is None else len(images_and_labels(data)[1])
        if images != sweep.images:
            raise ValueError(
                f"data has {images} images, expected the {sweep.images} of the sweep."
            )
        self._sweep = sweep
        self._data = data
        self._network: Any = None if model is None else copy.deepcopy(model).eval()
        self._lock = threading.Lock()  # keys on images hook the network for a while
        points = sweep_points(sweep)
        table = explorer_table(sweep, points, KEYS, live=model is not None)
        self._how = (table["key"], table["refit"])
        self._points = {(*self._how, *at): points[at] for at in points}
        self._worker = NewestWins(self._work)
        start = {name: table[name] for name in ("key", "refit")}
        start["ranks"] = list(sweep.ranks.values())
        super().__init__(table=table, request=start)
        self.observe(self._asked, "request")
        close_previous(self)

    @property
    def ranks(self) -> dict[str, int]:
        """Components of every CP layer as the sliders are; assign some to move them."""
        return dict(zip(self._sweep.ranks, self.request["ranks"], strict=True))

    @ranks.setter
    def ranks(self, ranks: Mapping[str, int]) -> None:
        full = {**self.ranks, **ranks}
        self._sweep.parameters(full)  # refuses layers and ranks that are not there
        self.request = {**self.request, "ranks": list(full.values())}

    @property
    def accuracy(self) -> float | None:
        """Accuracy of the network shown, None while it is not measured."""
        point = self._points.get(_place(self.request))
        return None if point is None else point[0] / self._sweep.images

    @property
    def model(self) -> nn.Module:
        """The truncated network shown, a new copy."""
        return self._truncated(self.request)

    def wait(self, seconds: float | None = None) -> float | None:
        """Wait until what was asked for is measured, and return the accuracy."""
        self._worker.wait(seconds)
        return self.accuracy

    def to_html(self, path: str | Path | None = None) -> str:
        """Make a page that needs no kernel, with all cuts made as those of the sweep.

        Args:
            path: Where to write it as well.
        """
        points = {at[2:]: x for at, x in self._points.items() if at[:2] == self._how}
        page = sweep_page(self._sweep, KEYS, points)
        if path is not None:
            write_text(path, page)
        return page

    def close(self) -> None:
        """Stop measuring and remove the explorer from the page."""
        if hasattr(self, "_worker"):  # a failed construction also comes here
            self._worker.close()
        super().close()

    def _asked(self, change: Any) -> None:
        if self._network is not None:
            self._worker.ask(change["new"])

    def _work(self, request: dict[str, Any]) -> None:
        """Answer a request: the numbers first, then pictures if they are wanted."""
        try:
            cut = None
            if _place(request) not in self._points:
                cut = self._truncated(request)
                self._points[_place(request)] = self._measured(cut)
            right, error = self._points[_place(request)]
            self.answer = {**request, "right": right, "error": error}
            if request.get("layer") is not None and request is self._worker.newest:
                cut = cut or self._truncated(request)
                self.answer = {**request, **self._pictures(request["layer"], cut)}
        except Exception as error:  # nobody sees what a thread raises
            self.answer = {**request, "failure": f"{type(error).__name__}: {error}"}

    def _truncated(self, request: Mapping[str, Any]) -> nn.Module:
        if self._network is None:
            raise ValueError(
                "the explorer was made from a sweep alone, expected one with a network "
                "to cut. Make it with RankExplorer(sweep, model, data)."
            )
        rank = dict(zip(self._sweep.ranks, request["ranks"], strict=True))
        how = {"key": request["key"], "refit": request["refit"], "data": self._data}
        with self._lock:
            return truncate(self._network, rank=rank, progress=False, **how)

    @torch.no_grad()
    def _measured(self, cut: nn.Module) -> tuple[int, float]:
        """Right answers, and the relative error of all kernels together."""
        right = round(accuracy(cut, self._data) * self._sweep.images)
        kernels = []
        for network in (self._network, cut):
            weights = [layer.weight for layer in cp_layers(network).values()]
            kernels.append(torch.cat([w.double().flatten() for w in weights]))
        return right, relative_error(*kernels).item()

    @torch.no_grad()
    def _pictures(self, place: int, cut: nn.Module) -> dict[str, str]:
        """A kernel whole, cut, and their difference; images whose answer changes."""
        name = list(self._sweep.ranks)[place]
        networks = (self._network, cut)
        kernels = [_slices(cp_layers(each)[name].weight) for each in networks]
        figure = _figure(8.0, 4.6)
        top, bottom = figure.subplots(2, 1, height_ratios=[3, 1.4])
        plot_components(torch.stack([*kernels, kernels[0] - kernels[1]]), ax=top)
        images, labels = images_and_labels(self._data)
        before, after = (_answers(each, images) for each in networks)
        flips = (before != after).nonzero().flatten()
        lost = before[flips] == labels.cpu()[flips]
        shown = flips[lost.int().argsort(descending=True, stable=True)][:_FLIPS]
        bottom.set_axis_off()
        if len(shown) and images.ndim == 4:
            words = [f"{labels[i]}: {before[i]} → {after[i]}" for i in shown]
            plot_images(images[shown].mean(1), words, ax=bottom)
        text = (
            f"Kernel of {name or 'the layer'} before, after, and what is lost. "
            f"{len(flips)} answers change, {int(lost.sum())} of them were right "
            "(shown: true class, answer before → after)."
        )
        return {"image": f"data:image/png;base64,{_png(figure)}", "text": text}

    def __repr__(self) -> str:
        """The network shown in one line."""
        found = "not measured" if self.accuracy is None else f"{self.accuracy:.2%}"
        parameters = self._sweep.parameters(self.ranks)
        ratio = parameters / self._sweep.dense_parameters
        size = f"{parameters:,} parameters, {ratio:.2f} × dense"
        return f"{self.table['title']}: accuracy {found}, {size}"

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        """Add the first view as a picture, for pages that run no script."""
        data, metadata = super()._repr_mimebundle_(**kwargs) or ({}, {})
        figure = _figure(7.0, 3.4)
        axis = self._sweep.table["axis"].iloc[-1]
        axes = plot_rank_curve(self._sweep, axis, figure.subplots())
        if axis == GLOBAL and self.accuracy is not None:
            place = sum(self.ranks.values()), self.accuracy
            axes.plot(*place, color=ORANGE, marker="o", markersize=9)
        axes.set_title(repr(self))
        return {**data, "image/png": _png(figure)}, metadata


class NewestWins:
    """Runs ``work(item)`` on one thread; of the items that wait, only the newest.

    The thread belongs to an executor, which the interpreter joins before it exits.
    """

    def __init__(self, work: Callable[[Any], None]) -> None:
        self._work = work
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="cpnb-explorer")
        self.newest: Any = None

    def ask(self, item: Any) -> None:
        """Ask for an item instead of those that still wait; never blocks."""
        self.newest = item
        with suppress(RuntimeError):  # closed, or the interpreter is exiting
            self._pool.submit(lambda: item is self.newest and self._work(item))

    def wait(self, seconds: float | None = None) -> None:
        """Wait until all that was asked for is done or dropped."""
        self._pool.submit(lambda: None).result(seconds)

    def close(self) -> None:
        """Drop what waits; the item at work is finished."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _place(request: Mapping[str, Any]) -> tuple[Any, ...]:
    return (request["key"], request["refit"], *request["ranks"])


def _figure(width: float, height: float) -> Figure:
    return Figure((width, height), dpi=100, facecolor="white", layout="constrained")


def _png(figure: Figure) -> str:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return base64.b64encode(buffer.getvalue()).decode()


def _slices(kernel: Tensor) -> Tensor:
    """First windows of a kernel for the eye, or a corner of a matrix."""
    if kernel.ndim > 3:
        return kernel.flatten(0, -3)[:_SLICES]
    return kernel.flatten(1)[None, :_SIDE, : 2 * _SIDE]


def _answers(model: nn.Module, images: Tensor) -> Tensor:
    """Class with the largest score for each image. Shape ``(n,)``."""
    batches = moved(model, images).split(100)
    return torch.cat([model(batch).argmax(1).cpu() for batch in batches])
