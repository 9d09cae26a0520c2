"""The page in a real browser: Chromium, headless, where there is one and playwright to drive it."""

from __future__ import annotations

import base64
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
from control_files import save_control, tiny_config
from PIL import Image
from served import listening, png
from trained_loras import save_lora

from zimage_lite.api import open_named
from zimage_lite.checkpoint.model_card import DEMO
from zimage_lite.config import GenerateOptions, RuntimeOptions
from zimage_lite.serve.options import ServeOptions
from zimage_lite.workers.orders import Drawn, Order, Watch

pytestmark = pytest.mark.slow
sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright (pip install playwright)")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS = (390, 1280)
AXE = os.environ.get("AXE_CORE")  # the path of its axe.min.js


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on the PATH")
    with sync_api.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@contextmanager
def opened(browser: Any, width: int, options: ServeOptions, drawers: Sequence[Any] = ()) -> Iterator[Any]:
    """The page of a server of its own. No console message, and no request off the server, whatever a test does."""
    with listening(options, drawers) as (address, service):
        found = browser.new_page(viewport={"width": width, "height": 900}, locale="en-GB")
        said, asked = [], []
        found.on("console", lambda message: said.append(message.text))
        found.on("pageerror", lambda error: said.append(str(error)))
        found.on("request", lambda sent: asked.append(sent.url))
        found.service, found.expected = service, list[str]()
        found.goto(address)
        sync_api.expect(found.locator("#model")).to_have_value(service.catalog.models[0])
        try:
            yield found
        finally:
            found.close()  # else its stream keeps the server
        assert [text for text in said if text not in found.expected] == []
        assert [url for url in asked if not url.startswith((address, f"blob:{address}", "data:"))] == []


@pytest.fixture(params=WIDTHS)
def page(request: Any, browser: Any, serve_options: Callable[..., ServeOptions]) -> Iterator[Any]:
    with opened(browser, request.param, serve_options()) as found:
        yield found


@pytest.fixture
def lora_page(browser: Any, serve_options: Callable[..., ServeOptions]) -> Iterator[Any]:
    """There is a LoRA."""
    options = serve_options()
    assert options.lora_dir
    save_lora(options.lora_dir / "ink.safetensors", open_named(DEMO, {}).transformer.config)
    with opened(browser, WIDTHS[0], options) as found:
        yield found


@pytest.fixture
def control_page(browser: Any, serve_options: Callable[..., ServeOptions], tiny: Path, tmp_path: Path) -> Iterator[Any]:
    """There is a ControlNet."""
    net = save_control(tmp_path / "2.1.safetensors", tiny_config("2.1"))
    options = serve_options(models={"tiny": str(tiny)}, controls={"union": str(net)})
    with opened(browser, WIDTHS[0], options) as found:
        yield found


def draw(page: Any, prompt: str = "a red circle", steps: int = 4) -> None:
    page.fill("#prompt", prompt)
    page.fill("#steps", str(steps))
    page.press("#prompt", "Control+Enter")


def cards(page: Any, count: int) -> Any:
    sync_api.expect(page.locator(".card")).to_have_count(count, timeout=30_000)
    return page.locator(".card")


def test_draw_again_and_delete(page: Any) -> None:
    draw(page)
    found = cards(page, 1)
    sync_api.expect(found.locator("img")).to_have_js_property("naturalWidth", 64)
    sync_api.expect(page.locator("#told")).to_have_text("The picture is drawn.")
    found.get_by_text("Draw again").click()
    cards(page, 2)
    page.on("dialog", lambda dialog: dialog.accept())
    found.first.get_by_text("Delete").click()
    cards(page, 1)
    assert page.evaluate("document.activeElement.id") == "gallery-title"
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]


def test_preview_reload_cancel_and_queue(page: Any) -> None:
    draw(page, steps=100)
    page.fill("#count", "10")
    for _ in range(4):
        page.click("#draw")
        sync_api.expect(page.locator("#draw")).to_be_enabled()
    sync_api.expect(page.locator("#shown")).to_have_attribute("src", re.compile("^blob:"), timeout=30_000)
    page.reload()
    sync_api.expect(page.locator("#shown")).to_have_attribute("src", re.compile("^blob:"), timeout=30_000)
    assert page.input_value("#steps") == "100"
    sync_api.expect(page.locator("#state")).to_have_text(re.compile(r"step \d+ of \d+"))
    assert page.locator("#queue li").count() >= 1
    page.locator("#queue button").last.click()
    page.keyboard.press("Escape")
    while page.service.board.running or page.service.board.waiting():
        page.keyboard.press("Escape")
        page.wait_for_timeout(20)
    sync_api.expect(page.locator("#going")).to_be_hidden()
    sync_api.expect(page.locator(".card", has_text="Cancelled.")).not_to_have_count(0)


def test_what_is_refused_is_told_at_the_button(page: Any) -> None:
    draw(page, steps=101)  # which the form itself refuses
    assert page.evaluate("document.querySelector('#steps').validity.rangeOverflow")
    page.fill("#steps", "2")
    page.fill("#width", "4096")
    page.fill("#height", "4096")
    page.expected.append("Failed to load resource: the server responded with a status of 400 (Bad Request)")
    with page.expect_response("**/api/jobs") as answer:
        page.click("#draw")
    assert answer.value.status == 400
    sync_api.expect(page.locator("#problem")).to_contain_text("million pixels")
    assert page.get_attribute("#width", "aria-invalid") == "true"


def test_a_picture_its_settings_and_a_mask(page: Any, tmp_path: Path) -> None:
    draw(page, "a blue square", 3)
    cards(page, 1)
    name = page.service.history.jobs(1)[0]["pictures"][0]["name"]
    page.fill("#prompt", "another")
    page.set_input_files("#file", page.service.history.picture(name))
    page.click("#use-recipe")
    assert page.input_value("#prompt") == "a blue square" and page.input_value("#steps") == "3"
    page.click("#paint")
    box, seen = page.locator("#canvas").bounding_box(), []
    for part in (0.2, 0.6):
        page.mouse.move(box["x"] + box["width"] * part, box["y"] + box["height"] * part)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] * (part + 0.1), box["y"] + box["height"] * part)
        page.mouse.up()
        seen.append(page.evaluate("document.querySelector('#canvas').toDataURL()"))
    page.click("#undo")
    assert page.evaluate("document.querySelector('#canvas').toDataURL()") == seen[0] != seen[1]
    page.click("#done")
    sync_api.expect(page.locator("#mask-thumb")).to_be_visible()
    page.click("#draw")
    cards(page, 2)
    assert page.service.history.jobs(1)[0]["settings"].keys() >= {"image", "mask", "strength"}


def drop(page: Any, path: Path) -> None:
    """A file, as from the desktop."""
    raw = base64.b64encode(path.read_bytes()).decode()
    page.evaluate(
        """raw => {
          const files = new DataTransfer();
          const bytes = Uint8Array.from(atob(raw), (one) => one.charCodeAt(0));
          files.items.add(new File([bytes], "dropped.png", { type: "image/png" }));
          document.body.dispatchEvent(new DragEvent("drop", { dataTransfer: files, bubbles: true, cancelable: true }));
        }""",
        raw,
    )


def test_five_wait_their_turn(page: Any) -> None:
    draw(page, steps=2)
    for _ in range(4):
        sync_api.expect(page.locator("#draw")).not_to_have_attribute("aria-disabled", "true")
        page.click("#draw")
    found = cards(page, 5)
    sync_api.expect(found.locator("img")).to_have_count(5)
    jobs = page.service.history.jobs(9)
    assert [job["state"] for job in jobs] == ["done"] * 5
    assert len({job["pictures"][0]["seed"] for job in jobs}) == 5


def test_a_dropped_picture_gives_its_settings(page: Any) -> None:
    draw(page, "a blue square", 3)
    cards(page, 1)
    picture = page.service.history.jobs(1)[0]["pictures"][0]
    page.fill("#prompt", "another")
    page.fill("#steps", "7")
    drop(page, page.service.history.picture(picture["name"]))
    page.click("#use-recipe")
    assert page.input_value("#prompt") == "a blue square" and page.input_value("#steps") == "3"
    assert page.input_value("#seed") == str(picture["seed"]) and page.is_checked("#lock")


def test_a_lora_has_a_row(lora_page: Any) -> None:
    page = lora_page
    page.click("#add-lora")
    row = page.locator(".lora")
    row.locator("input").fill("0.5")
    draw(page, steps=1)
    cards(page, 1)
    (job,) = page.service.history.jobs(1)
    assert job["state"] == "done" and job["settings"]["loras"] == [{"name": "ink", "strength": 0.5}]
    row.get_by_text("Remove").click()
    sync_api.expect(row).to_have_count(0)
    assert page.evaluate("document.activeElement.id") == "add-lora"


def test_a_control_image_is_followed_and_drawn_again(control_page: Any, tmp_path: Path) -> None:
    page = control_page
    (tmp_path / "hint.png").write_bytes(png())
    page.select_option("#control", "union")
    page.set_input_files("#control-file", tmp_path / "hint.png")
    page.fill("#width", "64")
    page.fill("#height", "64")
    draw(page, steps=1)
    found = cards(page, 1)
    sync_api.expect(found.locator("img")).to_have_count(1)
    found.get_by_text("Draw again").click()
    cards(page, 2)
    first, second = (job["settings"] for job in page.service.history.jobs(2))
    assert first["controls"][0]["name"] == "union" and first["control_image"] == second["control_image"]
    page.reload()
    found.first.get_by_text("Use settings").click()
    sync_api.expect(page.locator("#control")).to_have_value("union")
    page.click("#draw")
    cards(page, 3)
    third = page.service.history.jobs(1)[0]["settings"]
    assert {**third, "seed": 0} == {**first, "seed": 0}


def test_settings_come_back_with_their_pictures(page: Any) -> None:
    white = np.zeros((64, 64), np.uint8)
    white[8:24, 8:40] = 255
    mask = BytesIO()
    Image.fromarray(white).save(mask, format="PNG")
    order = GenerateOptions("x", image=png(), mask=mask.getvalue(), steps=2, seed=5, strength=0.5)
    page.service.submit("demo", [order])
    found = cards(page, 1)
    for again in (1, 2):  # as it was, and painted over
        page.reload()
        found.first.get_by_text("Use settings").click()
        sync_api.expect(page.locator("#mask-thumb")).to_be_visible()
        sync_api.expect(page.locator("#problem")).to_have_text("")
        assert page.input_value("#strength") == "0.5" and page.is_checked("#lock")
        if again == 2:
            page.click("#paint")
            page.click("#done")
        page.click("#draw")
        sync_api.expect(cards(page, 1 + again).locator("img")).to_have_count(1 + again)
    second, first, given = (job["settings"] for job in page.service.history.jobs(3))
    assert first == given and second["image"] == given["image"]
    painted = Image.open(page.service.history.kept.path(second["mask"]["sha256"])).convert("L")
    assert np.array_equal(np.asarray(painted), white)


def test_chinese_is_kept(page: Any) -> None:
    page.click("#language")
    assert page.inner_text("#draw span") == "绘制"
    page.reload()
    sync_api.expect(page.locator("#draw span")).to_have_text("绘制")
    assert page.evaluate("document.documentElement.lang") == "zh-CN"
    page.click("#language")
    assert page.inner_text("#draw span") == "Draw"


def test_memory_is_told_before_it_is_drawn(page: Any) -> None:
    text, bar = page.locator("#plan-bars p"), page.locator("#plan-bars meter")
    sync_api.expect(text).to_have_text(re.compile(r"Memory: [\d.]+ GB planned of [\d.]+"))
    before = bar.evaluate("bar => bar.value")
    page.fill("#width", "1024")
    page.fill("#height", "1024")
    sync_api.expect(bar).not_to_have_js_property("value", before)
    assert before < bar.evaluate("bar => bar.value") < bar.evaluate("bar => bar.max")
    sync_api.expect(page.locator("#plan-text")).to_contain_text("by prediction")
    page.click("#language")
    sync_api.expect(text).to_have_text(re.compile("计划"))


def test_what_does_not_fit_is_not_ordered(browser: Any, serve_options: Callable[..., ServeOptions]) -> None:
    runtime = RuntimeOptions("cpu", cache=False, ram_bytes=10**8)
    with opened(browser, WIDTHS[0], serve_options(runtime=runtime)) as page:
        sync_api.expect(page.locator("#plan-text")).to_contain_text("It does not fit.")
        draw(page)
        sync_api.expect(page.locator("#problem")).to_contain_text("the smallest that works is")
        assert page.service.history.jobs(1) == []


class Held:
    """A worker that shows a preview, and draws when it may."""

    def __init__(self, may: Event) -> None:
        self.may = may

    def draw(self, order: Order, watch: Watch) -> Iterator[Drawn]:
        watch.progress("denoise", 1, 2)
        watch.preview(png(32, 32))
        self.may.wait(60)
        yield Drawn(0, png(), 64, 64)

    def plan(self, order: Order) -> dict[str, Any]:
        return {"fits": None, "message": "nothing is known", "memory": [], "phases": [], "seconds": None}

    def renew(self) -> None: ...
    def give_back(self) -> None: ...


@pytest.mark.parametrize("width", WIDTHS)
def test_all_that_is_drawn_at_once_is_shown(
    browser: Any, width: int, serve_options: Callable[..., ServeOptions]
) -> None:
    may = Event()
    with opened(browser, width, serve_options(), [Held(may), Held(may)]) as page:
        for prompt in ("one", "two"):
            draw(page, prompt)
            sync_api.expect(page.locator("#draw")).not_to_have_attribute("aria-disabled", "true")
        other = page.locator("#others li")
        blob = re.compile("^blob:")
        sync_api.expect(page.locator("#shown")).to_have_attribute("src", blob)
        sync_api.expect(page.locator("#shown")).to_have_attribute("alt", "one")
        sync_api.expect(other.locator("img")).to_have_attribute("src", blob)
        sync_api.expect(other.locator("img")).to_have_js_property("naturalWidth", 32)
        sync_api.expect(other.locator("p")).to_have_text("Drawing · step 1 of 2")
        other.get_by_text("Cancel").click()
        accessible(page)
        may.set()
        cards(page, 2)
        sync_api.expect(other).to_have_count(0)
        states = {job["prompt"]: job["state"] for job in page.service.history.jobs(2)}
        assert states["one"] == "done"


def accessible(page: Any) -> None:
    """By axe-core, where there is one."""
    if AXE:
        page.evaluate(Path(AXE).read_text())
        found = page.evaluate("axe.run()")["violations"]
        assert [(one["id"], [node["html"] for node in one["nodes"]]) for one in found] == []


@pytest.mark.skipif(AXE is None, reason="no axe-core (its axe.min.js is named by AXE_CORE)")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(page: Any, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    draw(page)
    cards(page, 1)
    sync_api.expect(page.locator("#plan-bars meter")).to_be_visible()
    accessible(page)
