"""The page as the server gives it, read without a browser: what it loads, asks for, and says."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from zimage_lite.config import GenerateOptions
from zimage_lite.serve import page_routes
from zimage_lite.serve.fields import FIELDS
from zimage_lite.serve.jobs import Job, Picture
from zimage_lite.serve.own_routes import OwnRoutes

FOLDER = Path(page_routes.__file__).parent / "page"
MEMORY = FOLDER.parents[1] / "workers" / "memory_facts.py"
SOURCES = {path.name: path.read_text(encoding="utf-8") for path in sorted(FOLDER.iterdir())}
SCRIPTS = {name: text for name, text in SOURCES.items() if name.endswith(".js")}
ALL_SCRIPTS = "\n".join(SCRIPTS.values())
NAMES = {"zimage-lite", "中文", "LoRA", "ControlNet", "Ctrl ↵", "Esc", "English"}  # the same in every language
NOT_SAID = {"Enter", "Escape", "Files"}


class Page(HTMLParser):
    """Its elements with their attributes, and the texts that are read in it."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: set[str] = set()
        self.feed(SOURCES["index.html"])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.elements.append((tag, found))
        self.texts |= {" ".join(found[name].split()) for name in ("aria-label", "alt") if found.get(name)}

    def handle_data(self, data: str) -> None:
        self.texts |= {data.strip()} if re.search(r"\w", data) else set()

    def each(self, name: str) -> list[str]:
        return [attributes[name] for _, attributes in self.elements if name in attributes]


PAGE = Page()
CHINESE = dict(re.findall(r'^  "(.+?)": "(.+?)",$', SCRIPTS["texts.js"], re.M))


def used(script: str, name: str) -> set[str]:
    """The fields of what is called `name`."""
    return set(re.findall(rf"(?<![\w.]){name}\??\.([a-z]\w*)(?!\w*\()", script))


def test_served_with_a_strict_policy(client: TestClient) -> None:
    answer = client.get("/")
    assert answer.status_code == 200 and answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "require-trusted-types-for 'script'" in policy and "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    again = client.get("/", headers={"if-none-match": answer.headers["etag"]})
    assert again.status_code == 304 and again.content == b""
    assert client.head("/").status_code == 200


def test_all_that_it_loads_is_served(client: TestClient) -> None:
    loaded = [place for place in (*PAGE.each("src"), *PAGE.each("href")) if place != "data:,"]
    loaded += [f"/page/{name}" for name in re.findall(r'from "\./(.+?)"', ALL_SCRIPTS)]
    assert {place.removeprefix("/page/") for place in loaded} == SOURCES.keys() - {"index.html"}
    for place in loaded:
        answer = client.get(place)
        kind = "text/css" if place.endswith(".css") else "text/javascript"
        assert answer.status_code == 200 and answer.headers["content-type"].startswith(kind)


@pytest.mark.parametrize("name", ["none.js", "..%2Fapp.py", "%2e%2e/app.py", "page.js%00", "/etc/passwd"])
def test_nothing_else_is_served(client: TestClient, name: str) -> None:
    assert client.get(f"/page/{name}").status_code == 404


def test_no_external_address() -> None:
    for name, text in SOURCES.items():
        assert re.findall(r"""\w+:\/\/|["'(`]\/\/|@import""", text) == [], name


def test_nothing_is_read_as_html_or_run_from_text() -> None:
    forbidden = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|DOMParser|srcdoc"
    assert re.findall(forbidden, ALL_SCRIPTS) == []
    inline = [name for _, attributes in PAGE.elements for name in attributes if name == "style" or name[:2] == "on"]
    assert inline == [] and "<style" not in SOURCES["index.html"]
    assert re.findall(r"<script(?![^>]*\bsrc=)", SOURCES["index.html"]) == []


def test_every_route_that_it_asks_exists() -> None:
    routes = {
        (re.sub(r"\{\w+\}", "{}", route.path), verb) for route in OwnRoutes(None).routes() for verb in route.methods
    }
    asked = re.findall(r'call\("([A-Z]+)", ["`](/api/[^"`]+)', ALL_SCRIPTS)
    asked += [("GET", place) for place in re.findall(r'(?<!, )["`](/api/[^"`]+)', ALL_SCRIPTS)]
    found = {(re.sub(r"\$\{.+?\}", "{}", place.partition("?")[0]), verb) for verb, place in asked}
    assert len(found) >= 9
    assert found <= routes


def test_every_field_that_it_reads_or_sends_exists(client: TestClient) -> None:
    status, facts = client.get("/api/status").json(), Job("demo", [GenerateOptions("x")]).facts()
    assert used(ALL_SCRIPTS, "job") <= facts.keys() | {"settings"}
    assert used(SCRIPTS["jobs.js"], "picture") <= Picture("x", 1, 1, 0).facts().keys()
    assert used(SCRIPTS["page.js"], "status") <= status.keys()
    assert used(SCRIPTS["page.js"], r"status\.limits") <= status["limits"].keys()
    assert used(SCRIPTS["page.js"], "own") <= status["defaults"]["demo"].keys()
    sent = {
        name for tag, found in PAGE.elements if tag in ("input", "select", "textarea") and (name := found.get("name"))
    }
    assert len(sent) >= 12 and sent <= FIELDS.keys()
    assert {"loras", "image", "mask", "controls", "control_image"} <= FIELDS.keys()


def test_every_element_that_it_names_exists() -> None:
    ids = PAGE.each("id")
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'by\("([\w-]+)"\)', ALL_SCRIPTS)) | set(PAGE.each("for")) <= set(ids)
    assert set(PAGE.each("aria-labelledby")) <= set(ids)


def test_whatever_takes_something_has_a_label() -> None:
    labelled = {*PAGE.each("for"), "lock"}  # which stands in its label
    for tag, found in PAGE.elements:
        if tag in ("input", "select", "textarea", "canvas", "progress", "meter"):
            assert found["id"] in labelled or "aria-label" in found or "aria-labelledby" in found, found


def test_both_languages_have_all_texts() -> None:
    literals = set(
        re.findall(r'"([A-Z][a-z][^"]*)"', "\n".join(SCRIPTS[name] for name in SCRIPTS if name != "texts.js"))
    )
    spoken = {text for text in literals if not text.startswith("Arrow")} - NOT_SAID
    spoken |= set(re.findall(r'say\("([^"]+)"', ALL_SCRIPTS)) | PAGE.texts
    spoken |= set(re.findall(r'"(GPU memory|Memory)"', MEMORY.read_text()))
    said = {text for text in spoken if text not in NAMES and not re.fullmatch(r"[\d.]+", text)}
    tables = {text for text in CHINESE if f'"{text}"' in ALL_SCRIPTS.replace(SCRIPTS["texts.js"], "")}
    assert said - CHINESE.keys() == set()
    assert CHINESE.keys() - said - tables == set()
    for english, chinese in CHINESE.items():
        assert set(re.findall(r"\{\w+\}", english)) == set(re.findall(r"\{\w+\}", chinese)), english


@pytest.mark.parametrize("name", SCRIPTS)
def test_node_reads_it(name: str, tmp_path: Path) -> None:
    if not (node := shutil.which("node")):
        pytest.skip("no node")
    module = tmp_path / f"{name}.mjs"  # whose ending says that it is a module
    module.write_text(SCRIPTS[name], encoding="utf-8")
    found = subprocess.run([node, "--check", module], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
