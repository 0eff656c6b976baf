"""A case in pictures: image channels, reference, stage one, error map, refined, uncertainty, and what changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from nnunet_diffrefine.reports.slices import Slice, crop_box, cropped
from nnunet_diffrefine.reports.svg import Drawing

HEIGHT = 2.6
HALO = [withStroke(linewidth=1.8, foreground="black")]
LETTERS: dict[str, Any] = {"color": "white", "fontsize": 8, "path_effects": HALO}
CLASS_COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#cc79a7", "#d55e00")  # Okabe and Ito, bright on black
LineStyle: TypeAlias = str | tuple[float, tuple[float, ...]]
CLASS_LINES: tuple[LineStyle, ...] = ("solid", (0, (5, 1.5)), (0, (1.5, 1)), (0, (5, 1.5, 1, 1.5)))
"""Style of a class's contour; a new one once the colours are used up. Dashes are in widths of the line."""
Style: TypeAlias = Mapping[str, tuple[str, LineStyle]]
REFERENCE_LINE: LineStyle = (0, (2.5, 2))
CHANGES = {"corrected": "#56b4e9", "newly wrong": "#d55e00", "still wrong": "#f0e442"}
WHOLE = 0.8
"""A slice of which the cut-out shows less than this (along a side) is also shown whole."""
OPAQUE = 0.8
"""Maps never hide the image."""
LARGEST_SPREAD = 0.5
"""Of a probability: half the samples say 0, half say 1."""


def class_style(names: list[str]) -> dict[str, tuple[str, LineStyle]]:
    """Colour and line style of each class; from the 25th on they repeat."""
    n = len(CLASS_COLOURS)
    return {name: (CLASS_COLOURS[i % n], CLASS_LINES[i // n % len(CLASS_LINES)]) for i, name in enumerate(names)}


def panels(shown: Slice, baseline: str, system: str) -> list[Drawing]:
    """The row of a case.

    Args:
        shown: slice, not cropped.
        baseline: name of stage one.
        system: name of the refined.
    """
    box = crop_box(shown)
    part = cropped(shown, box)
    style = class_style(list(shown.reference))
    row = [_channel(part, i) for i in range(len(part.channels))]
    if any(b.stop - b.start < WHOLE * n for b, n in zip(box, shown.ignored.shape, strict=True)):
        row.insert(0, _overview(shown, part, box))
    row += [_contours("reference", part, part.reference, style, with_reference=False)]
    row += [_contours(baseline, part, part.stage_one, style)]
    if part.error_map is not None:
        row += [_heat("error map", part, part.error_map, "inferno", 1.0, part.wrong_before)]
    row += [_contours(system, part, part.refined, style)]
    if part.uncertainty is not None:
        largest = max(LARGEST_SPREAD, float(part.uncertainty.max()))
        row += [_heat("uncertainty", part, part.uncertainty, "viridis", largest, None)]
    return [*row, _changes(part)]


def _picture(title: str, shown: Slice, draw: Callable[[Axes], None], background: int = 0) -> Drawing:
    """A panel on a channel of the image, with sides and a scale bar."""
    rows, columns = shown.channels[background][1].shape
    height, width = rows * shown.spacing[0], columns * shown.spacing[1]

    def drawn(axis: Axes) -> None:
        low, high = shown.windows[background]
        image = shown.channels[background][1]
        _image(axis, shown, image, (low, max(high, low + 1e-6)))
        draw(axis)
        _marks(axis, shown, width, height)
        axis.set(xlim=(0, width), ylim=(height, 0))
        axis.set_aspect("equal")
        axis.axis("off")

    return Drawing(title, drawn, (min(HEIGHT * width / height, 2 * HEIGHT), HEIGHT), bare=True)


def _image(axis: Axes, shown: Slice, image: np.ndarray, window: tuple[float, float] | None = None) -> None:
    """An image in mm, grey or RGBA, its first row on top; stored with its own pixels, not resampled."""
    height, width = (n * s for n, s in zip(image.shape[:2], shown.spacing, strict=True))
    low, high = (None, None) if window is None else window
    axis.imshow(image, extent=(0, width, height, 0), interpolation="none", cmap="gray", vmin=low, vmax=high)


def _marks(axis: Axes, shown: Slice, width: float, height: float) -> None:
    left, top = shown.sides
    axis.text(0.02 * width, height / 2, left, ha="left", va="center", **LETTERS)
    axis.text(width / 2, 0.02 * height, top, ha="center", va="top", **LETTERS)
    bar = next((mm for mm in (50, 20, 10, 5, 2, 1) if mm <= 0.4 * width), 1)
    y = 0.955 * height
    axis.plot([0.03 * width, 0.03 * width + bar], [y, y], color="white", linewidth=2, path_effects=HALO)
    axis.text(0.03 * width, 0.93 * height, f"{bar} mm", ha="left", va="bottom", **LETTERS)


def _channel(shown: Slice, number: int) -> Drawing:
    return _picture(shown.channels[number][0], shown, lambda axis: None, number)


def _overview(whole: Slice, part: Slice, box: tuple[slice, slice]) -> Drawing:
    """The whole slice in the window of the cut-out, and where that is."""
    shown = replace(whole, windows=part.windows)
    (top, height), (left, width) = (
        (b.start * s, (b.stop - b.start) * s) for b, s in zip(box, whole.spacing, strict=True)
    )

    def draw(axis: Axes) -> None:
        axis.add_patch(Rectangle((left, top), width, height, fill=False, edgecolor="white", linewidth=1.2))

    return _picture(f"{whole.channels[0][0]}, whole slice", shown, draw)


def _contours(
    title: str, shown: Slice, masks: dict[str, np.ndarray], style: Style, with_reference: bool = True
) -> Drawing:
    def draw(axis: Axes) -> None:
        for name, mask in masks.items():
            colour, line = style[name]
            _outline(axis, shown, mask, colour, 1.7, line)
        if with_reference:
            for mask in shown.reference.values():
                _outline(axis, shown, mask, "white", 0.9, REFERENCE_LINE)

    return _picture(title, shown, draw)


def _outline(axis: Axes, shown: Slice, mask: np.ndarray, colour: str, width: float, line: LineStyle) -> None:
    """The border of a mask (rows, columns), closed where it touches that of the image."""
    if not mask.any():
        return
    padded = np.pad(mask.astype(float), 1)
    y, x = ((np.arange(n) - 0.5) * s for n, s in zip(padded.shape, shown.spacing, strict=True))
    found = axis.contour(x, y, padded, levels=[0.5], colors=[colour], linewidths=width, linestyles=[line])
    found.set_path_effects([withStroke(linewidth=width + 1.2, foreground="black", alpha=0.55)])


def _heat(
    title: str, shown: Slice, values: np.ndarray, colours: str, largest: float, outlined: np.ndarray | None
) -> Drawing:
    """A map over the image: 0 is clear, the larger the more opaque; with a scale."""

    def draw(axis: Axes) -> None:
        share = np.clip(values / largest, 0, 1)
        rgba = matplotlib.colormaps[colours](share)
        rgba[..., 3] = np.minimum(OPAQUE, 3 * share)
        _image(axis, shown, rgba)
        if outlined is not None:
            _outline(axis, shown, outlined, "white", 0.9, REFERENCE_LINE)
        _scale(axis, colours, largest)

    return _picture(title, shown, draw)


def _scale(axis: Axes, colours: str, largest: float) -> None:
    inset = axis.inset_axes((0.93, 0.06, 0.03, 0.34))
    inset.imshow(np.linspace(1, 0, 64)[:, None], cmap=colours, aspect="auto", extent=(0, 1, 0, 1), interpolation="none")
    inset.axis("off")
    for y, value, side in ((0, 0.0, "bottom"), (1, largest, "top")):
        inset.text(-0.4, y, f"{value:.2g}", ha="right", va=side, **LETTERS)


def _changes(shown: Slice) -> Drawing:
    before, after = shown.wrong_before, shown.wrong_after
    places = (before & ~after, ~before & after, before & after)

    def draw(axis: Axes) -> None:
        rgba = np.zeros((*before.shape, 4))
        for place, colour in zip(places, CHANGES.values(), strict=True):
            rgba[place] = matplotlib.colors.to_rgba(colour, 0.85)
        _image(axis, shown, rgba)

    return _picture("change", shown, draw)
