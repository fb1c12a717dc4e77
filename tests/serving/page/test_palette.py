"""Colours of the experts: contrast of text on them, and distance under colour blindness."""

import re
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

STYLE = (Path(__file__).resolve().parents[3] / "serving" / "tomoe_serving" / "page" / "style.css").read_text()

# Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB.
VISION = {
    "normal": np.eye(3),
    "protanopia": np.array([[0.1523, 1.0526, -0.2049], [0.1145, 0.7863, 0.0992], [-0.0039, -0.0481, 1.0520]]),
    "deuteranopia": np.array([[0.3673, 0.8606, -0.2280], [0.2801, 0.6725, 0.0474], [-0.0118, 0.0429, 0.9689]]),
    "tritanopia": np.array([[1.2555, -0.0767, -0.1788], [-0.0784, 0.9308, 0.1476], [0.0047, 0.6914, 0.3039]]),
}  # fmt: skip
LEAST_DISTANCE = 12.0
"""CIE 1976 in Lab; the closest pair of each scheme has 13 or more. A test below shows what the limit catches."""
LEAST_CONTRAST = 4.5
"""WCAG 2 AA for text of normal size."""


def palette(scheme: str) -> dict[str, str]:
    """Custom properties with a plain colour; those of the dark scheme override the light ones."""
    light, dark = STYLE.split("@media (prefers-color-scheme: dark)")
    blocks = [light] if scheme == "light" else [light, dark.split("* { box-sizing")[0]]
    return {name: value for block in blocks for name, value in re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block)}


def linear(colour: str) -> np.ndarray:
    values = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def contrast(one: str, other: str) -> float:
    lights = sorted(float(linear(colour) @ [0.2126, 0.7152, 0.0722]) for colour in (one, other))
    return (lights[1] + 0.05) / (lights[0] + 0.05)


def lab(colour: str, vision: np.ndarray) -> np.ndarray:
    rgb = np.clip(vision @ linear(colour), 0, 1)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ rgb / to_xyz.sum(axis=1)
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def least_distance(colours: list[str], vision: np.ndarray) -> tuple[float, str]:
    pairs = combinations(colours, 2)
    return min((float(np.linalg.norm(lab(a, vision) - lab(b, vision))), f"{a} {b}") for a, b in pairs)


def fills(scheme: str) -> list[str]:
    colours = palette(scheme)
    return [colours[f"e{i}"] for i in range(8)]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("vision", VISION)
def test_colours_are_distinct(scheme, vision):
    distance, pair = least_distance(fills(scheme), VISION[vision])
    assert distance >= LEAST_DISTANCE, pair


def test_distance_catches_red_and_green_of_equal_lightness():
    assert least_distance(["#c26b6b", "#7d8a4c"], VISION["normal"])[0] > 40
    assert least_distance(["#b5a04c", "#9ea84c"], VISION["deuteranopia"])[0] < LEAST_DISTANCE


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_on_every_fill_is_readable(scheme):
    text = palette(scheme)["text"]
    assert {fill: contrast(text, fill) for fill in fills(scheme) if contrast(text, fill) < LEAST_CONTRAST} == {}


def test_contrast_is_that_of_wcag():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)
