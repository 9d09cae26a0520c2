"""Pictures of the page for the README: drawing, the gallery and a mask, at a phone's width and a desktop's. Needs
playwright and a Chromium.

    PYTHONPATH=tests/helpers python tools/screenshots.py docs
"""

from __future__ import annotations

import re
import shutil
import sys
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image
from playwright.sync_api import expect, sync_playwright
from served import listening

from zimage_lite.config import RuntimeOptions
from zimage_lite.serve.options import ServeOptions

PROMPTS = (
    "a red circle on a blue background",
    "a green triangle on a yellow background",
    "a black star on a white background",
)
WIDTHS = (390, 1280)


def shot(page: Any, path: Path) -> None:
    """In 128 colours, which the page's few need no more of."""
    image = Image.open(BytesIO(page.screenshot())).convert("RGB").quantize(128)
    image.save(path, optimize=True)
    print(path, path.stat().st_size)


def draw(page: Any, prompt: str, count: int, steps: int) -> None:
    for name, value in (("prompt", prompt), ("count", count), ("steps", steps)):
        page.fill(f"#{name}", str(value))
    page.click("#draw")


def pictures(page: Any, service: Any, width: int, folder: Path) -> None:
    for number, prompt in enumerate(PROMPTS, start=1):
        draw(page, prompt, 2, 8)
        expect(page.locator(".card img")).to_have_count(2 * number, timeout=120_000)
    page.wait_for_timeout(500)  # for the last picture to be shown
    page.evaluate("document.querySelector('#gallery-title').scrollIntoView()")
    shot(page, folder / f"page-gallery-{width}.png")
    page.evaluate("scrollTo(0, 0)")
    draw(page, "a blue square on a white background", 4, 100)
    expect(page.locator("#shown")).to_have_attribute("src", re.compile("^blob:"), timeout=120_000)
    page.evaluate("scrollTo(0, innerWidth < 600 ? document.querySelector('#stage').offsetTop : 0)")
    shot(page, folder / f"page-drawing-{width}.png")
    page.keyboard.press("Escape")
    name = next(job for job in service.history.jobs(9) if job["pictures"])["pictures"][0]["name"]
    page.set_input_files("#file", service.history.picture(name))
    page.click("#paint")
    box = page.locator("#canvas").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.3, box["y"] + box["height"] * 0.3)
    page.mouse.down()
    for part in (0.45, 0.6, 0.5, 0.35):
        page.mouse.move(box["x"] + box["width"] * part, box["y"] + box["height"] * (part + 0.1), steps=4)
    page.mouse.up()
    shot(page, folder / f"page-mask-{width}.png")


def main(folder: Path) -> None:
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    for width in WIDTHS:
        with TemporaryDirectory() as place, sync_playwright() as driver:
            runtime = RuntimeOptions("cpu", cache=False)
            with listening(ServeOptions(Path(place), {"demo": "demo"}, runtime)) as (address, service):
                browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
                page = browser.new_page(
                    viewport={"width": width, "height": 800 if width > 600 else 844}, locale="en-GB"
                )
                page.goto(address)
                expect(page.locator("#model")).to_have_value("demo")
                pictures(page, service, width, folder)
                browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
