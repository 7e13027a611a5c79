"""The curve that a notebook shows."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest

from launcher.python.notebook import HEIGHT, MARGIN, WIDTH, in_notebook, svg_curve


@pytest.mark.parametrize("losses", [(), (1.0,)])
def test_a_curve_needs_two_losses(losses: tuple[float, ...]) -> None:
    assert svg_curve(losses, len(losses)) == ""


def test_a_curve_falls_with_the_losses_from_edge_to_edge() -> None:
    root = ET.fromstring(svg_curve([4.0, 3.0, 1.0], 12))
    (line,) = root.findall("polyline")
    points = [tuple(map(float, point.split(","))) for point in line.attrib["points"].split()]
    assert points[0] == (MARGIN, MARGIN)
    assert points[-1] == (WIDTH - MARGIN, HEIGHT - MARGIN)
    assert [x for x, _ in points] == sorted(x for x, _ in points)
    assert [y for _, y in points] == sorted(y for _, y in points), "below is more in SVG, and less in loss"
    told = " ".join(text.text or "" for text in root.findall("text"))
    assert re.fullmatch(r"loss 4\.0000 1\.0000, step 10 step 12", told)


def test_losses_that_do_not_change_are_a_line() -> None:
    points = ET.fromstring(svg_curve([2.0, 2.0], 2)).findall("polyline")[0].attrib["points"].split()
    assert len({point.split(",")[1] for point in points}) == 1


def test_tests_are_no_notebook() -> None:
    assert not in_notebook()
