"""Charts as SVG text, drawn without a library, for a self-contained page. Colors come from the page's style sheet."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from .axis import Axis, tick_label

LEFT, RIGHT, TOP, BOTTOM = 58, 12, 10, 40


@dataclass(frozen=True)
class Mark:
    """A point of a chart: its position, style class, tooltip, and index of its trial on the front."""

    x: float
    y: float
    style: str
    text: str
    place: int | None = None


@dataclass(frozen=True)
class Line:
    """A line through points `(x, y)`, otherwise like a `Mark`."""

    points: Sequence[tuple[float, float]]
    style: str
    text: str = ""
    place: int | None = None


@dataclass(frozen=True)
class Frame:
    """Size (pixels at scale 1) and labels of a chart."""

    width: int
    height: int
    x_label: str
    y_label: str
    title: str

    @property
    def x_range(self) -> tuple[float, float]:
        """Left and right end of the plotting area."""
        return LEFT, self.width - RIGHT

    @property
    def y_range(self) -> tuple[float, float]:
        """Bottom and top of the plotting area; heights grow downwards."""
        return self.height - BOTTOM, TOP


def chart(frame: Frame, x: Axis, y: Axis, lines: Sequence[Line] = (), marks: Sequence[Mark] = (), kind: str = "") -> str:
    """Lines, then marks on top, with axes and a grid, as one `<svg>` element."""
    head = f'<svg class="chart {kind}" viewBox="0 0 {frame.width} {frame.height}" role="img" aria-label="{escape(frame.title)}">'
    return "\n".join([head, *elements(frame, x, y, lines, marks), "</svg>"])


def elements(
    frame: Frame, x: Axis, y: Axis, lines: Sequence[Line] = (), marks: Sequence[Mark] = (), verticals: Sequence[tuple[float, str]] = ()
) -> list[str]:
    """The SVG elements of a chart. `verticals` are labelled vertical lines at positions on the x axis."""
    return [
        *_grid(frame, x, y),
        *(_vertical(frame, x.place(value), text) for value, text in verticals),
        *(_line(line, x, y) for line in lines if line.points),
        *(_mark(mark, x, y) for mark in marks),
    ]


def _vertical(frame: Frame, at: float, text: str) -> str:
    (left, right), (bottom, top) = frame.x_range, frame.y_range
    side, anchor = (-4, "end") if at > (left + right) / 2 else (4, "start")
    label = f'<text class="tick" x="{at + side:.1f}" y="{top + 10}" text-anchor="{anchor}">{escape(text)}</text>'
    return f'<path class="vertical" d="M{at:.1f} {top}V{bottom}"/>{label}'


def _grid(frame: Frame, x: Axis, y: Axis) -> list[str]:
    (left, right), (bottom, top) = frame.x_range, frame.y_range
    parts = []
    for value in y.ticks(6):
        at = y.place(value)
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="tick" x="{left - 6}" y="{at + 4:.1f}" text-anchor="end">{tick_label(value)}</text>')
    for value in x.ticks(max(3, frame.width // 70)):
        at = x.place(value)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{top}" y2="{bottom}"/>')
        parts.append(f'<text class="tick" x="{at:.1f}" y="{bottom + 16}" text-anchor="middle">{tick_label(value)}</text>')
    middle = (top + bottom) / 2
    parts.append(f'<text class="label" x="{(left + right) / 2}" y="{frame.height - 6}" text-anchor="middle">{escape(frame.x_label)}</text>')
    parts.append(
        f'<text class="label" x="12" y="{middle}" text-anchor="middle" transform="rotate(-90 12 {middle})">{escape(frame.y_label)}</text>'
    )
    return parts


def _attributes(style: str, place: int | None) -> str:
    return f'class="{style}"' + ("" if place is None else f' data-place="{place}"')


def _title(text: str) -> str:
    return f"<title>{escape(text)}</title>" if text else ""


def _line(line: Line, x: Axis, y: Axis) -> str:
    places = " ".join(f"{x.place(a):.1f},{y.place(b):.1f}" for a, b in line.points)
    return f'<polyline {_attributes(line.style, line.place)} points="{places}">{_title(line.text)}</polyline>'


def _mark(mark: Mark, x: Axis, y: Axis) -> str:
    centre = f'cx="{x.place(mark.x):.1f}" cy="{y.place(mark.y):.1f}"'
    return f'<circle {_attributes(mark.style, mark.place)} {centre} r="4">{_title(mark.text)}</circle>'
