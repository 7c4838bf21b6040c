"""A plot of points as lines of text, for terminals."""

from collections.abc import Sequence

from .axis import Axis, axis_for, tick_label

Point = tuple[float, float, str]  # x, y and the character that stands there


def text_plot(points: Sequence[Point], y_range: tuple[float, float], width: int, height: int) -> list[str]:
    """Points in a field of `width` by `height` characters, with marked axes around it; later points cover earlier ones.

    The x axis fits the points, logarithmically if they span a large ratio; the y axis has the given range.
    """
    x = axis_for([point[0] for point in points], 0, width - 1)
    y = Axis(*y_range, height - 1, 0)
    field = [[" "] * width for _ in range(height)]
    for a, b, character in points:
        field[round(y.place(b))][round(x.place(a))] = character
    marks = {round(y.place(tick)): tick_label(tick) for tick in y.ticks(max(2, height // 3))}
    margin = max(map(len, marks.values()))
    lines = [f"{marks.get(i, ''):>{margin}} {'┤' if i in marks else '│'}{''.join(row)}".rstrip() for i, row in enumerate(field)]
    return [*lines, *_x_axis(x, width, margin + 2)]


def _x_axis(x: Axis, width: int, margin: int) -> list[str]:
    """The line under the field and the labels under that, as far as they fit."""
    line, labels = ["─"] * width, [" "] * (width + margin)
    free = 0
    for tick in x.ticks(max(2, width // 10)):
        at, text = round(x.place(tick)), tick_label(tick)
        start = min(max(at - len(text) // 2, 0), width - len(text))
        line[at] = "┬"
        if start >= free:
            labels[margin + start : margin + start + len(text)] = text
            free = start + len(text) + 1
    return [" " * (margin - 1) + "└" + "".join(line), "".join(labels).rstrip()]
