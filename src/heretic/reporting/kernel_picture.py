"""A plot of the kernel: ablation strength over layers, as a self-contained SVG drawn without a plotting library."""

from collections.abc import Iterable, Mapping
from html import escape

from .axis import Axis
from .charts import Frame, Line, elements
from .learned import Points

TITLE = "Strength of the ablation over the layers"
WIDTH, HEIGHT = 760, 310
LEGEND_ROW, LETTER = 22, 7.4
# Okabe and Ito's palette, which colour-blind people can distinguish, without the yellow, which is too light on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DASHES = ("none", "7 4", "2 3", "9 3 2 3")
STYLE = """text { font: 13px system-ui, sans-serif; fill: #222 } .grid { stroke: #e3e3e3 }
.vertical { stroke: #777; stroke-dasharray: 4 4 } .kernel { fill: none; stroke-width: 2.2 }"""


def kernel_picture(strengths: Mapping[str, Points], last_layer: int, direction: float | None = None) -> str:
    """An SVG with a curve for each component, on a white background so that it is readable on light and dark pages.

    `strengths` are points `(layer, strength)` by component. A dashed line marks the layer of the `direction`, if all layers share one.
    """
    frame = Frame(WIDTH, HEIGHT, "layer", "strength", TITLE)
    found = [0.0, *(strength for points in strengths.values() for _, strength in points)]
    x = Axis(0, max(1, last_layer), *frame.x_range, integer=True)
    y = Axis(1.08 * min(found), 1.08 * (max(found) or 1), *frame.y_range)
    curves = [Line(points, f"kernel c{i}", name) for i, (name, points) in enumerate(strengths.items())]
    verticals = [] if direction is None else [(direction, "layer of the direction")]
    legend = _legend_places(strengths)
    top = LEGEND_ROW * (max(row for _, row in legend) + 1) + 10
    keys = [
        f'<path class="kernel c{i}" d="M{at:.0f} {20 + LEGEND_ROW * row}h26"/>'
        f'<text x="{at + 32:.0f}" y="{24 + LEGEND_ROW * row}">{escape(name)}</text>'
        for i, (name, (at, row)) in enumerate(zip(strengths, legend, strict=True))
    ]
    styles = [
        f".c{i} {{ stroke: {COLOURS[i % len(COLOURS)]}; stroke-dasharray: {DASHES[i // len(COLOURS) % len(DASHES)]} }}"
        for i in range(len(curves))
    ]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top + HEIGHT}" width="{WIDTH}" height="{top + HEIGHT}" role="img">',
        f"<title>{TITLE}</title>",
        "<style>" + "\n".join([STYLE, *styles]) + "</style>",
        f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{top + HEIGHT - 1}" rx="8" fill="#fff" stroke="#ccc"/>',
        *keys,
        f'<g transform="translate(0 {top})">',
        *elements(frame, x, y, curves, verticals=verticals),
        "</g>",
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _legend_places(names: Iterable[str]) -> list[tuple[float, int]]:
    """Position of each legend entry: distance from the left, and row."""
    left = 64.0
    places: list[tuple[float, int]] = []
    at, row = left, 0
    for name in names:
        width = 52 + LETTER * len(name)
        if at > left and at + width > WIDTH:
            at, row = left, row + 1
        places.append((at, row))
        at += width
    return places
