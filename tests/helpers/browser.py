"""Headless Chromium of Debian, driven by Playwright; contrast and accessibility of a page."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CHROMIUM = shutil.which("chromium")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip

CONTRAST = """
() => {
  const parse = (text) => {
    const numbers = text.match(/[\\d.]+(e-?\\d+)?/g).map(Number);
    const scale = text.startsWith("color(") ? 1 : 255;
    return { rgb: numbers.slice(0, 3).map((v) => v / scale), alpha: numbers[3] ?? 1 };
  };
  const light = (rgb) => {
    const [r, g, b] = rgb.map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const over = (top, alpha, below) => top.map((v, i) => alpha * v + (1 - alpha) * below[i]);
  const background = (node) => {
    if (!node) return parse(getComputedStyle(document.documentElement).backgroundColor).rgb;
    const { rgb, alpha } = parse(getComputedStyle(node).backgroundColor);
    return alpha === 1 ? rgb : over(rgb, alpha, background(node.parentElement));
  };
  const opacity = (node) => (node ? Number(getComputedStyle(node).opacity) * opacity(node.parentElement) : 1);
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let text; (text = walker.nextNode()); ) {
    const node = text.parentElement;
    const style = getComputedStyle(node);
    if (!text.data.trim() || !node.checkVisibility() || node.closest(".hidden, .skip") || node.disabled) continue;
    const below = background(node);
    const { rgb, alpha } = parse(style.color);
    const lights = [light(over(rgb, alpha * opacity(node), below)), light(below)].sort((a, b) => a - b);
    const size = parseFloat(style.fontSize);
    const isLarge = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
    const ratio = (lights[1] + 0.05) / (lights[0] + 0.05);
    found.push({ text: text.data.trim().slice(0, 40), ratio, least: isLarge ? 3 : 4.5 });
  }
  return found;
}
"""
"""Contrast of every visible text with its background, and the minimum of WCAG 2 AA."""


@contextmanager
def chromium(profile: Path, scheme: str = "light", width: int = 1360, height: int = 860) -> Iterator:
    """A browser context with the empty profile folder ``profile``."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            str(profile), executable_path=CHROMIUM, args=FLAGS, color_scheme=scheme,
            viewport={"width": width, "height": height},
        )  # fmt: skip
        try:
            yield context
        finally:
            context.close()


def accessible_nodes(page) -> list[dict[str, str]]:
    """Role, name and ``focusable`` of every node of Chromium's accessibility tree that is not ignored."""
    session = page.context.new_cdp_session(page)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    found = []
    for node in nodes:
        if node.get("ignored"):
            continue
        properties = {p["name"]: p["value"].get("value") for p in node.get("properties", [])}
        found.append(
            {
                "role": node["role"]["value"],
                "name": (node.get("name") or {}).get("value", ""),
                "focusable": str(bool(properties.get("focusable"))),
            }
        )
    return found
