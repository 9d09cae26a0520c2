"""Whatever is sent, no answer is a fault of the server's, and none is missing. (ZIMAGE_LITE_FUZZ sends more.)"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import httpx2 as httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from served import base64_of, png, serving
from starlette.testclient import TestClient

from zimage_lite.errors import UserError
from zimage_lite.serve.fields import ALIASES, FIELDS
from zimage_lite.serve.options import ServeOptions

EXAMPLES = int(os.environ.get("ZIMAGE_LITE_FUZZ", "150"))
_A1111 = """
prompt negative_prompt seed steps cfg_scale width height batch_size n_iter sampler_name scheduler enable_hr hr_scale
denoising_strength init_images mask resize_mode mask_blur inpaint_full_res inpainting_mask_invert override_settings
send_images image sd_model_checkpoint
"""
_OPENAI = """
prompt model n size quality response_format output_format output_compression background stream partial_images user
images mask image
"""
_PREFIXES = "/ /page/ /api/jobs/ /api/pictures/ /api/given/ /v1/models/ /sdapi/v1/ /api/jobs?limit= /api/jobs?before="
PREFIXES, A1111, OPENAI = _PREFIXES.split(), _A1111.split(), _OPENAI.split()
PATHS = {
    "/api/jobs": [*FIELDS, *ALIASES, "latents"],
    "/api/plan": [*FIELDS, *ALIASES, "latents"],
    "/api/read": ["image"],
    "/v1/images/generations": [*OPENAI, *FIELDS],
    "/v1/images/edits": [*OPENAI, *FIELDS],
    **dict.fromkeys((f"/sdapi/v1/{name}" for name in ("txt2img", "img2img", "options", "png-info")), A1111),
}

numbers = st.integers(-(2**70), 2**70) | st.floats() | st.sampled_from([0, 1, 2, 16, 64, 1024, 0.5, -1, True])
_WORDS = "euler simple auto 64x64 0x0 png url true demo none <lora:x:1> data:image/png;base64, 2 ../x"
texts = st.text(max_size=40) | st.sampled_from(_WORDS.split())
pictures = st.just(base64_of(png())) | st.binary(max_size=40).map(base64_of)
kept = st.fixed_dictionaries({"sha256": texts})
plain = st.none() | st.booleans() | numbers | texts | pictures | kept
anything = st.recursive(plain, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=3))


def requests() -> st.SearchStrategy[tuple[str, dict[str, Any]]]:
    def of(path: str) -> st.SearchStrategy[tuple[str, dict[str, Any]]]:
        fields = st.dictionaries(st.sampled_from(PATHS[path]) | texts, anything, max_size=6)
        return st.tuples(st.just(path), fields.flatmap(lambda more: texts.map(lambda text: {"prompt": text, **more})))

    return st.sampled_from(sorted(PATHS)).flatmap(of)


def never_drawing(*_: object) -> None:
    raise UserError("nothing is drawn here")


def check(client: TestClient, path: str, values: dict[str, Any]) -> None:
    answer = client.post(path, content=json.dumps(values), headers={"content-type": "application/json"})
    assert answer.status_code < 500, (path, values, answer.text)
    if answer.status_code >= 400:
        said = answer.json()
        assert said["detail"] if path.startswith("/sdapi/") else said["error"]["message"]


@pytest.mark.slow
def test_no_request_is_the_servers_fault(serve_options: Callable[..., ServeOptions]) -> None:
    with serving(serve_options(limits={"waiting": 1000})) as (client, service):
        service.workers[0].drawer.opener = never_drawing

        @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(requests())
        def run(request: tuple[str, dict[str, Any]]) -> None:
            check(client, *request)

        run()
        assert client.get("/health").json() == {"ok": True}


@pytest.mark.slow
def test_no_address_is_the_servers_fault(client: TestClient) -> None:
    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(PREFIXES), st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20))
    def run(prefix: str, rest: str) -> None:
        with suppress(httpx.InvalidURL, UnicodeError):  # what no client can send
            assert client.get(prefix + rest).status_code < 500

    run()
