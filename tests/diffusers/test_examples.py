"""The examples in diffusers' own documentation of Z-Image, run as they stand but for the device, sizes and steps."""

from __future__ import annotations

import re
import sys
from typing import Any

import numpy as np
import pytest
import torch
from marking import always
from oracles import psnr
from picture_files import hole, smooth
from PIL import Image

diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.slow  # loads diffusers, which takes seconds

PIPELINES = {
    "pipeline_z_image": "ZImagePipeline",
    "pipeline_z_image_img2img": "ZImageImg2ImgPipeline",
    "pipeline_z_image_inpaint": "ZImageInpaintPipeline",
    "pipeline_z_image_controlnet": "ZImageControlNetPipeline",
    "pipeline_z_image_controlnet_inpaint": "ZImageControlNetInpaintPipeline",
}
# The GPU that tests do without, the demo's size, and fewer steps.
CHANGES = {
    r"\"cuda\"": '"cpu"',
    r"\b1024\b": "64",
    r"\b256:768\b": "16:48",
    r"\b1728\b": "80",
    r"\b992\b": "48",
    r"num_inference_steps=\d+": "num_inference_steps=2",
}


def example(module: str) -> str:
    """Its code."""
    text = sys.modules[f"diffusers.pipelines.z_image.{module}"].EXAMPLE_DOC_STRING
    lines = re.findall(r"^ *(?:>>>|\.\.\.) ?(.*)$", text, re.MULTILINE)
    assert len(lines) > 10
    return "\n".join(lines)


def changed(code: str) -> str:
    for old, new in CHANGES.items():
        code = re.sub(old, new, code)
    return code


def picture(url: str) -> Image.Image:
    return hole((80, 48)) if "mask" in url else smooth((80, 48), seed=len(url))


def run(module: str, pipe: Any, control: Any, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """The picture that the example draws where `from_pretrained` gives this pipeline."""
    cls = getattr(diffusers, PIPELINES[module])
    with monkeypatch.context() as patch:
        patch.setattr(cls, "from_pretrained", lambda *_, **__: pipe)
        patch.setattr(diffusers.ZImageControlNetModel, "from_single_file", lambda *_, **__: control)
        patch.setattr(diffusers.utils, "load_image", picture)
        patch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: "")
        names: dict[str, Any] = {}
        exec(changed(example(module)), names)
    return torch.from_numpy(np.array(names["image"]))


@pytest.mark.parametrize(
    "module", always("pipeline_z_image_inpaint", "pipeline_z_image_controlnet_inpaint", of=PIPELINES)
)
def test_it_draws_what_diffusers_draws(module, theirs, ours, controls, tmp_path, monkeypatch) -> None:
    from zimage_lite.diffusers import load_controlnet

    monkeypatch.chdir(tmp_path)
    cls, more, our_more = getattr(diffusers, PIPELINES[module]), {}, {}
    if "controlnet" in module:
        more, our_more = {"controlnet": controls[0]}, {"controlnet": load_controlnet(controls[1])}
    truth = run(module, cls(**theirs.components, **more), controls[0], monkeypatch)
    drawn = run(module, cls.from_pipe(ours, **our_more), controls[0], monkeypatch)
    assert truth.float().std() > 1
    assert psnr(drawn, truth, 255) >= 60
