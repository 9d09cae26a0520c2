"""What users do with pipelines of diffusers, done with ours inside: the same, or refused by name."""

from __future__ import annotations

import gc
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from budgeted import held_bytes
from marking import always
from oracles import psnr
from picture_files import hole, smooth

from zimage_lite.errors import BudgetError, UserError

diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.slow  # loads diffusers, which takes seconds

GUIDED = {"guidance_scale": 3.0, "negative_prompt": "blurry"}
CALLS: dict[str, dict[str, Any]] = {
    "guided": GUIDED,
    "guided, truncated and normalized": {**GUIDED, "cfg_truncation": 0.5, "cfg_normalization": True},
    "two prompts": {"prompt": ["a red circle", "a green square, please"], **GUIDED, "negative_prompt": ["", "red"]},
    "two images": {"num_images_per_prompt": 2},
    "short prompts": {"max_sequence_length": 12},
    "long prompts": {"prompt": "a red circle, " * 40, "max_sequence_length": 512},
    "own sigmas": {"sigmas": [1.0, 0.7, 0.2]},
    "another size": {"height": 48, "width": 80},
}


ENDS = [("ours", "in a callback"), ("diffusers", "well"), ("ours", "well"), ("diffusers", "in a callback")]


@pytest.mark.parametrize("call", always("two prompts", "guided, truncated and normalized", of=CALLS))
def test_it_draws_what_diffusers_draws(theirs, ours, draw, call) -> None:
    truth = draw(theirs, **deepcopy(CALLS[call]))  # they write into lists
    assert truth.std() > 0.01
    assert psnr(draw(ours, **deepcopy(CALLS[call])), truth, 1) >= 60


@pytest.mark.parametrize("name", always("stochastic", of=["FlowMatchLCMScheduler", "karras", "stochastic"]))
def test_schedulers_of_diffusers(theirs, ours, draw, name) -> None:
    options = {"karras": {"use_karras_sigmas": True}, "stochastic": {"stochastic_sampling": True}}
    cls = getattr(diffusers, name, diffusers.FlowMatchEulerDiscreteScheduler)
    found = []
    for pipe in (theirs.__class__(**theirs.components), ours):
        pipe.scheduler = cls.from_config(pipe.scheduler.config, **options.get(name, {}))
        pipe.set_progress_bar_config(disable=True)
        torch.manual_seed(7)  # what they add comes from here
        found.append(draw(pipe))
    assert psnr(*found, 1) >= 60


def test_embeddings_and_latents_are_diffusers(theirs, ours, draw) -> None:
    """What callers hand from one call to the next."""
    prompts, _ = ours.encode_prompt("a red circle", do_classifier_free_guidance=False)
    truth, _ = theirs.encode_prompt("a red circle", do_classifier_free_guidance=False)
    assert (prompts[0] - truth[0]).norm() <= 1e-5 * truth[0].norm()
    given = {"prompt": None, "prompt_embeds": truth, "output_type": "latent"}
    latents = [
        pipe(**given, height=64, width=64, num_inference_steps=2, generator=torch.Generator().manual_seed(1),
             guidance_scale=0.0).images
        for pipe in (theirs, ours)
    ]  # fmt: skip
    assert (latents[0] - latents[1]).norm() <= 1e-5 * latents[0].norm()


def test_a_callback_sees_every_step_and_may_change_it(theirs, ours, draw) -> None:
    def halved(pipe: Any, step: int, time: Any, given: dict[str, Any]) -> dict[str, Any]:
        seen.append((step, given["latents"].clone()))
        return {"latents": given["latents"].mul_(0.9), "prompt_embeds": [given["prompt_embeds"][0] * 0.9]}

    drawn, found = [], []
    for pipe in (theirs, ours):
        seen: list[tuple[int, torch.Tensor]] = []
        more = {"callback_on_step_end": halved, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
        drawn.append(draw(pipe, **more))
        found.append(seen)
    assert [step for step, _ in found[1]] == [0, 1]
    assert all((a - b).norm() <= 1e-5 * a.norm() for (_, a), (_, b) in zip(*found, strict=True))
    assert psnr(*drawn, 1) >= 60


def test_a_callback_interrupts(theirs, ours, draw) -> None:
    def stop(pipe: Any, step: int, time: Any, given: dict[str, Any]) -> dict[str, Any]:
        steps.append(step)
        pipe._interrupt = step == 0
        return given

    drawn = []
    for pipe in (theirs, ours):
        steps: list[int] = []
        drawn.append(draw(pipe, callback_on_step_end=stop))
        assert steps == [0]
    assert psnr(*drawn, 1) >= 60


@pytest.mark.parametrize(("whose", "ends"), always(*ENDS[:2], of=ENDS))
def test_nothing_is_held_after_a_call(ours, draw, whose, ends) -> None:
    def fail(*_: Any) -> dict[str, Any]:
        raise RuntimeError("a fault of the caller's")

    pipe = ours if whose == "ours" else diffusers.ZImagePipeline.from_pipe(ours)
    pipe.set_progress_bar_config(disable=True)
    draw(pipe, num_inference_steps=1)  # what is made once is there
    gc.collect()
    before = held_bytes()
    if ends == "well":
        draw(pipe)
    else:
        with pytest.raises(RuntimeError, match="a fault"):
            draw(pipe, callback_on_step_end=fail)
    gc.collect()
    if whose == "diffusers" and ends == "in a callback":  # which tells nobody
        assert held_bytes() > before + 10**6
        pipe.transformer.ours.close()
        gc.collect()
    assert held_bytes() <= before + 10**5


def test_others_of_diffusers_are_made_of_it(ours) -> None:
    for name in ("ZImageImg2ImgPipeline", "ZImageInpaintPipeline"):
        made = getattr(diffusers, name).from_pipe(ours)
        assert type(made) is getattr(diffusers, name)
        assert made.transformer is ours.transformer and made.vae is ours.vae
        assert diffusers.ZImagePipeline.from_pipe(made).transformer is ours.transformer
    assert isinstance(ours, diffusers.ZImagePipeline)


@pytest.mark.full_size  # diffusers imports all that it has
def test_automatic_pipelines(ours) -> None:
    assert type(diffusers.AutoPipelineForImage2Image.from_pipe(ours)) is diffusers.ZImageImg2ImgPipeline


@pytest.mark.full_size  # as the examples, with a ControlNet on both sides
def test_kinds_of_ours_with_guidance(theirs, ours, controls, draw) -> None:
    from zimage_lite import diffusers as adapted

    image, mask = smooth((64, 64)), hole((64, 64))
    hint, net = {"control_image": smooth((64, 64), 1)}, {"controlnet": controls[0]}
    our_net = {"controlnet": adapted.load_controlnet(controls[1])}
    cases: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
        "ZImageImg2ImgPipeline": ({"image": image}, {}, {}),
        "ZImageControlNetInpaintPipeline": ({"image": image, "mask_image": mask, **hint}, net, our_net),
    }
    for name, (given, more, our_more) in cases.items():
        truth = getattr(diffusers, name)(**theirs.components, **more)
        made = getattr(adapted, name).from_pipe(ours, **our_more)
        for pipe in (truth, made):
            pipe.set_progress_bar_config(disable=True)
        drawn = draw(made, **GUIDED, **given)
        assert psnr(drawn, draw(truth, **GUIDED, **given), 1) >= 60, name


REFUSED: dict[str, tuple[Any, str]] = {
    "another device": (lambda pipe: pipe.to("cuda"), "load_pipeline's device="),
    "another device, elsewhere": (lambda pipe: other(pipe).to("cuda"), "load_pipeline's device="),
    "another dtype": (lambda pipe: pipe.to(torch.bfloat16), "load_pipeline's dtype="),
    "casting": (lambda pipe: pipe.transformer.half(), "casting or moving weights"),
    "moving": (lambda pipe: pipe.transformer.cuda(), "casting or moving weights"),
    "compiling": (lambda pipe: pipe.transformer.compile(), "compile cannot be done here"),
    "other attention": (lambda pipe: pipe.transformer.set_attention_backend("flash"), "backend="),
    "weights": (lambda pipe: pipe.transformer.state_dict(), "never all there"),
    "saving": (lambda pipe: pipe.save_pretrained("x"), "save_pretrained"),
    "others' models": (lambda pipe: type(pipe).from_pipe(empty()), "a pipeline with models of diffusers"),
    "opening": (lambda pipe: type(pipe).from_pretrained("x"), "load_pipeline"),
    "other layers": (lambda pipe: pipe.text_encoder(*torch.ones(2, 1, 4).long()).hidden_states[-1], "-2"),
    "Omni": (lambda pipe: pipe.transformer([[torch.zeros(16, 1, 8, 8)]], torch.ones(1), []), "a latent"),
    "pictures to edit": (lambda pipe: evaluated(pipe, siglip_feats=[[None]]), "siglip_feats"),
    "patches": (lambda pipe: evaluated(pipe, patch_size=4), "patch_size"),
    "other hints": (lambda pipe: evaluated(pipe, controlnet_block_samples={0: torch.zeros(1)}), "load_controlnet"),
}


def empty() -> Any:
    return SimpleNamespace(transformer=torch.nn.Identity())


def other(pipe: Any) -> Any:
    return diffusers.ZImageImg2ImgPipeline.from_pipe(pipe)


def evaluated(pipe: Any, **more: Any) -> Any:
    return pipe.transformer([torch.zeros(16, 1, 8, 8)], torch.ones(1), [torch.zeros(3, 256)], **more)


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_is_refused_by_name(ours, what, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    call, named = REFUSED[what]
    with pytest.raises(UserError, match=named):
        call(ours)
    assert not list(tmp_path.iterdir())


def test_what_is_done_anyway(ours) -> None:
    ours.to("cpu").to(torch.float32).to(device="cpu", dtype=torch.float32)
    ours.enable_model_cpu_offload()
    ours.enable_sequential_cpu_offload()
    ours.enable_group_offload(onload_device=torch.device("cpu"))
    ours.transformer.enable_group_offload(onload_device=torch.device("cpu"))
    ours.vae.enable_tiling()
    assert ours.device == torch.device("cpu") and ours.dtype == torch.float32
    assert ours.transformer.config.n_layers == ours.zimage_lite.model.transformer.config.n_layers


def test_a_budget_is_kept(draw) -> None:
    from zimage_lite.checkpoint.model_card import DEMO
    from zimage_lite.diffusers import load_pipeline

    pipe = load_pipeline(DEMO, device="cpu", cache=False, ram="1MB")
    with pytest.raises(BudgetError):
        draw(pipe)


def test_in_16_bits(ours, draw) -> None:
    """In a pipeline of ours, and in one of diffusers, whose `from_pipe` asks for float32."""
    from zimage_lite.checkpoint.model_card import DEMO
    from zimage_lite.diffusers import ZImagePipeline, load_pipeline

    pipe = load_pipeline(DEMO, device="cpu", cache=False, dtype="bf16")
    for made in (pipe, ZImagePipeline.from_pipe(pipe), diffusers.ZImagePipeline.from_pipe(pipe)):
        made.set_progress_bar_config(disable=True)
        assert made.dtype == torch.bfloat16
        drawn = draw(made)
    assert 30 < psnr(drawn, draw(ours), 1) < 80
    with pytest.raises(UserError, match="dtype="):
        pipe.to(torch.float32)


def test_without_diffusers(monkeypatch) -> None:
    import importlib
    import sys

    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.delitem(sys.modules, "zimage_lite.diffusers", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'zimage-lite\[diffusers\]'"):
        importlib.import_module("zimage_lite.diffusers")


def test_an_omni_is_refused(omni_folder: Path) -> None:
    from zimage_lite.diffusers import load_pipeline

    with pytest.raises(UserError, match="Omni is not put into diffusers' pipelines"):
        load_pipeline(omni_folder)
