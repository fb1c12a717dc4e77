"""Screenshots of the playground of a running server: python examples/screenshots.py URL --out docs

Takes one in light and one in dark mode, each under 200 KB. Needs Debian's chromium and `pip install playwright`.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

PROMPT = "Tell me a short story about a cat."
MOST_BYTES = 200_000
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip


def settings() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Screenshots of the playground")
    parser.add_argument("url", help="address of the running server")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder for playground-{light,dark}.png")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--key", default=os.environ.get("TOMOE_API_KEY"), help="API key (default: $TOMOE_API_KEY)")
    return parser.parse_args()


def take(browser, scheme: str, options: argparse.Namespace) -> Path:
    """Chat, select a token, and save a screenshot."""
    page = browser.new_page(color_scheme=scheme, viewport={"width": 1280, "height": 940})
    page.goto(options.url)
    if options.key:
        page.fill("#key", options.key)
        page.press("#key", "Enter")
    page.wait_for_selector("#legend li", timeout=60_000)
    page.fill("#max-tokens", "110")
    page.fill("#prompt", options.prompt)
    page.press("#prompt", "Enter")
    page.wait_for_selector("details:not([hidden])", timeout=300_000)
    page.wait_for_timeout(5_000)  # the rest of the trace, and a refresh of the gauges
    page.locator(".answer [data-index]").nth(8).hover()
    file = options.out / f"playground-{scheme}.png"
    page.screenshot(path=file)
    page.close()
    return file


def main() -> int:
    options = settings()
    from playwright.sync_api import sync_playwright

    if (chromium := shutil.which("chromium")) is None:
        print("chromium was not found: apt-get install chromium", file=sys.stderr)
        return 2
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        files = [take(browser, scheme, options) for scheme in ("light", "dark")]
        browser.close()
    for file in files:
        size = file.stat().st_size
        print(f"{file}: {size / 1000:.0f} KB", file=sys.stderr)
        if size > MOST_BYTES:
            print(f"{file} is larger than {MOST_BYTES / 1000:.0f} KB", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
