"""A picture of the kernel: the strength of the ablation over the layers, as an SVG that needs nothing to draw or show it."""

from collections.abc import Iterable
from xml.sax.saxutils import escape

from ..editing.ablation import Ablation, kernel

WIDTH, PLOT_HEIGHT = 760, 252
LEFT, RIGHT, BOTTOM = 64, 24, 52
LEGEND_ROW, LETTER = 22, 7.4
# Okabe and Ito's colours, which the colour-blind tell apart, without the yellow, which is too light on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DASHES = ("", "7 4", "2 3", "9 3 2 3")


def kernel_picture(ablation: Ablation, last_layer: int) -> str:
    """An SVG with a curve for each component, on a white ground so that it can be read on light and dark pages.

    A dashed line marks the layer of the direction, where one direction serves all layers.
    """
    legend = _legend_places(ablation.parameters)
    top = 34 + LEGEND_ROW * (max(row for _, row in legend) + 1)
    bottom = top + PLOT_HEIGHT
    greatest = max(max(p.max_weight, p.min_weight) for p in ablation.parameters.values())
    y_step = _step(greatest or 1, 5)
    ceiling = y_step * (int(greatest / y_step + 1e-9) + 1)
    x_step = max(1, int(_step(max(last_layer, 1), 12)))

    def x(layer: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * layer / max(last_layer, 1)

    def y(strength: float) -> float:
        return bottom - PLOT_HEIGHT * strength / ceiling

    parts = [f"<rect x='0.5' y='0.5' width='{WIDTH - 1}' height='{bottom + BOTTOM - 1}' rx='8' fill='#fff' stroke='#ccc'/>"]
    for i in range(round(ceiling / y_step) + 1):
        parts.append(f"<path d='M{LEFT} {y(i * y_step):.1f}H{WIDTH - RIGHT}' stroke='#e3e3e3'/>")
        parts.append(_text(LEFT - 8, y(i * y_step) + 4, f"{i * y_step:g}", "end"))
    for layer in range(0, last_layer + 1, x_step):
        parts.append(_text(x(layer), bottom + 20, str(layer), "middle"))
    parts.append(f"<path d='M{LEFT} {top}V{bottom}H{WIDTH - RIGHT}' fill='none' stroke='#444'/>")
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, bottom + 40, "layer", "middle"))
    parts.append(f"<text transform='translate(18 {(top + bottom) / 2:.0f}) rotate(-90)' text-anchor='middle' fill='#222'>strength</text>")
    if ablation.direction_index is not None:
        place = x(ablation.direction_index * last_layer)
        parts.append(f"<path d='M{place:.1f} {top - 4}V{bottom}' stroke='#777' stroke-dasharray='4 4'/>")
        anchor = "end" if place > WIDTH - 150 else "start" if place < 150 else "middle"
        parts.append(_text(place, top - 8, "layer of the direction", anchor))
    for i, ((name, p), (at, row)) in enumerate(zip(ablation.parameters.items(), legend, strict=True)):
        dash = DASHES[i // len(COLOURS) % len(DASHES)]
        style = f"stroke='{COLOURS[i % len(COLOURS)]}' stroke-width='2.2'" + (f" stroke-dasharray='{dash}'" if dash else "")
        points = [(x(layer), y(kernel(layer, p, last_layer))) for layer in range(last_layer + 1)]
        line = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        dots = "".join(f"<circle cx='{a:.1f}' cy='{b:.1f}' r='2.8'/>" for a, b in points)
        parts.append(f"<polyline points='{line}' fill='none' {style}/><g fill='{COLOURS[i % len(COLOURS)]}'>{dots}</g>")
        height = 24 + LEGEND_ROW * row
        parts.append(f"<path d='M{at:.0f} {height}h26' {style}/>" + _text(at + 32, height + 4, name, "start"))
    size = f"viewBox='0 0 {WIDTH} {bottom + BOTTOM}' width='{WIDTH}' height='{bottom + BOTTOM}'"
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' {size} role='img' font-family='system-ui, sans-serif' font-size='13'>"
        "<title>Strength of the ablation over the layers</title>\n" + "\n".join(parts) + "\n</svg>\n"
    )


def _legend_places(names: Iterable[str]) -> list[tuple[float, int]]:
    """Where each name's key begins, from the left, and in which row."""
    places: list[tuple[float, int]] = []
    at, row = float(LEFT), 0
    for name in names:
        width = 52 + LETTER * len(name)
        if at > LEFT and at + width > WIDTH:
            at, row = float(LEFT), row + 1
        places.append((at, row))
        at += width
    return places


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}' fill='#222'>{escape(text)}</text>"


def _step(length: float, n_most: int) -> float:
    """The distance of marks on an axis: 1, 2 or 5 times a power of ten, at most `n_most` of them over `length`."""
    power = 1e-6
    while True:
        for factor in (1, 2, 5):
            if length / (factor * power) <= n_most:
                return factor * power
        power *= 10
