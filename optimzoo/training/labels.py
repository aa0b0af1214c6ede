"""Names beside the points of a picture, so that nobody takes one for another's."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

Spot = tuple[float, float]
Line = tuple[Spot, Spot]
Box = tuple[float, float, float, float]  # left, bottom, right, top
NEAR, ROOM = 5, 4  # points of type: between a dot and its name, and around every dot
FARTHER = (0, 8, 16, 26, 38, 52, 68, 86, 106)  # the same beyond NEAR; from the second on with a line to the dot
ANGLES = (0, 45, 315, 180, 135, 225, 90, 270, *(22.5 + 45 * i for i in range(8)))


def label(drawing: Any, axes: Any, names: Sequence[tuple[str, Spot, Any]], lines: Sequence[Line]) -> None:
    """Write each (name, place, colour) at the first of many places around its dot where nothing is in the way.

    A name covers no dot, no other name and none of `lines`, and lies nearer to its own dot than to others; where that
    is not to be had, a line to its dot tells. Those in a crowd choose first.
    """
    drawing.draw_without_rendering()
    unit = drawing.dpi / 72
    dots = [tuple(axes.transData.transform(place)) for _, place, _ in names]
    frame = axes.get_window_extent().extents
    taken = _Taken(frame, dots, unit, lines=[axes.transData.transform(line).tolist() for line in lines])
    alone = [min((math.dist(dot, other) for other in _but(dots, i)), default=0) for i, dot in enumerate(dots)]
    for index in sorted(range(len(names)), key=alone.__getitem__):
        name, place, colour = names[index]
        how = {"textcoords": "offset points", "fontsize": 8, "color": colour, "ha": "center", "va": "center"}
        trial = axes.annotate(name, place, (0, 0), **how)
        size = trial.get_window_extent().size
        trial.remove()
        (x, y), beyond = taken.choose(index, size)
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 2}
        axes.annotate(name, place, (x / unit, y / unit), arrowprops=line if beyond else None, **how)


@dataclass
class _Taken:
    """What is drawn already, in pixels."""

    frame: Box
    dots: Sequence[Spot]
    unit: float
    lines: list[Line]
    names: list[Box] = field(default_factory=list)

    def choose(self, index: int, size: Spot) -> tuple[Spot, float]:
        """The place of a name of this size, from its dot, and how far beyond a dot's side it is."""
        own = self.dots[index]
        # A crowd's inner dots may have no place of their own, and many on one dot none that no line crosses.
        for asked, least in ((self._apart, 0), (self._uncrossed, FARTHER[1]), (lambda *_: True, FARTHER[1])):
            for offset, beyond in self._around(size, least):
                box = _box(own, offset, size)
                line = (own, _closest(box, own))
                if self._free(index, box) and asked(index, box, line):
                    self.names.append(box)
                    self.lines += [line] if beyond else []
                    return offset, beyond
        offset, beyond = next(self._around(size, 0))  # more names than a picture holds
        self.names.append(_box(own, offset, size))
        return offset, beyond

    def _around(self, size: Spot, least: float) -> Iterator[tuple[Spot, float]]:
        for beyond in (one for one in FARTHER if one >= least):
            half_x, half_y = (side / 2 + (NEAR + beyond) * self.unit for side in size)
            for angle in ANGLES:
                x, y = math.cos(math.radians(angle)), math.sin(math.radians(angle))
                out = max(abs(x), abs(y))
                yield (half_x * x / out, half_y * y / out), beyond

    def _free(self, index: int, box: Box) -> bool:
        """Whether a name there is inside of the frame, and on no name and no dot."""
        left, bottom, right, top = self.frame
        inside = left <= box[0] and bottom <= box[1] and box[2] <= right and box[3] <= top
        on_dot = any(_distance(box, other) < ROOM * self.unit for other in _but(self.dots, index))
        return inside and not on_dot and not any(_overlap(box, name) for name in self.names)

    def _uncrossed(self, index: int, box: Box, line: Line) -> bool:
        """Whether no line is in its way, and nothing in that of its own."""
        own, spots, room = self.dots[index], _along(line), ROOM * self.unit
        beside = [dot for dot in self.dots if math.dist(own, dot) > room]  # its line cannot but touch those on its dot
        return not (
            any(_distance(box, spot) < 1 for one in self.lines for spot in _along(one))
            or any(math.dist(spot, dot) < room for spot in spots for dot in beside)
            or any(_distance(name, spot) == 0 for spot in spots for name in self.names)
        )

    def _apart(self, index: int, box: Box, line: Line) -> bool:
        """Whether, beside that, no other dot is as near as its own."""
        nearest = min((_distance(box, other) for other in _but(self.dots, index)), default=math.inf)
        return _distance(box, self.dots[index]) < nearest and self._uncrossed(index, box, line)


def _but(items: Sequence[Spot], index: int) -> list[Spot]:
    return [item for i, item in enumerate(items) if i != index]


def _box(own: Spot, offset: Spot, size: Spot) -> Box:
    x, y = own[0] + offset[0], own[1] + offset[1]
    return x - size[0] / 2, y - size[1] / 2, x + size[0] / 2, y + size[1] / 2


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _closest(box: Box, spot: Spot) -> Spot:
    """The place in the box that is nearest to the spot."""
    return min(max(spot[0], box[0]), box[2]), min(max(spot[1], box[1]), box[3])


def _distance(box: Box, spot: Spot) -> float:
    return math.dist(_closest(box, spot), spot)


def _along(line: Line) -> list[Spot]:
    """Spots on a line, a few pixels apart."""
    (x, y), (u, v) = line
    steps = max(1, int(math.dist(*line) / 3))
    return [(x + (u - x) * i / steps, y + (v - y) * i / steps) for i in range(steps + 1)]
