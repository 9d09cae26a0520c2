"""Pictures beside the prompt, of clients."""

from __future__ import annotations

from base64 import b64decode
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from served import base64_of, finished, png, serving

from zimage_lite.serve.options import ServeOptions

pytestmark = pytest.mark.slow
SHORT = {"steps": 1, "seed": 3}


def size_of(picture: str) -> tuple[int, int]:
    return Image.open(BytesIO(b64decode(picture))).size


def test_of_an_omni(omni_folder: Path, tmp_path: Path) -> None:
    one, other = png(64, 80), png(96, 64)
    with serving(ServeOptions(models={"omni": str(omni_folder)}, folder=tmp_path)) as (client, _):
        both = {"prompt": "x", "references": [base64_of(one), base64_of(other)], **SHORT}
        plan = client.post("/api/plan", json=both).json()
        assert plan["fits"] and "look" in {phase["phase"] for phase in plan["phases"]}
        job = finished(client, client.post("/api/jobs", json=both).json()["id"])
        assert job["state"] == "done", job
        kept = client.get(f"/api/jobs/{job['id']}").json()["settings"]["references"]  # so it can be drawn again
        assert [client.get(f"/api/given/{said['sha256']}").content for said in kept] == [one, other]
        again = finished(client, client.post("/api/jobs", json={**both, "references": kept}).json()["id"])
        assert again["state"] == "done", again
        four = client.post("/api/jobs", json={**both, "references": [base64_of(one)] * 4})
        assert four.status_code == 400 and "at most 3 times" in four.text

        images = [("image[]", ("a.png", one)), ("image[]", ("b.png", other))]
        answer = client.post("/v1/images/edits", data={"prompt": "x", "steps": "1", "seed": "3"}, files=images)
        assert size_of(answer.json()["data"][0]["b64_json"]) == (96, 64)

        alpha = np.zeros((80, 64), np.uint8)
        files = [*images, ("mask", ("m.png", png(64, 80, alpha)))]
        answer = client.post("/v1/images/edits", data={"prompt": "x", "steps": "1"}, files=files)
        assert size_of(answer.json()["data"][0]["b64_json"]) == (64, 80)


def test_of_another_model(tiny: Path, tmp_path: Path) -> None:
    with serving(ServeOptions(models={"tiny": str(tiny)}, folder=tmp_path)) as (client, _):
        asked = {"prompt": "x", "references": base64_of(png()), **SHORT}
        job = finished(client, client.post("/api/jobs", json=asked).json()["id"])
        assert job["state"] == "failed" and "sees no pictures beside the prompt" in str(job)
