"""The autoencoder in bands: the same image as whole, to rounding, in the bytes that were predicted."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from live_bytes import LiveBytes
from make_checkpoint import SIZES, random_weights
from marking import always
from oracles import bound, relative_error

from zimage_lite.checkpoint.checkpoint import open_checkpoint
from zimage_lite.checkpoint.model_card import DEMO, model_folder
from zimage_lite.checkpoint.model_files import open_model
from zimage_lite.config import RuntimeOptions, VaeConfig
from zimage_lite.errors import BudgetError
from zimage_lite.memory import hardware
from zimage_lite.memory.plan_vae import (
    VaePlan,
    decode_ways,
    encode_ways,
    no_convolution,
    predict_decode,
    predict_encode,
)
from zimage_lite.model import vae
from zimage_lite.model.banded import Banded, Moments
from zimage_lite.model.linear import bind, shapes
from zimage_lite.model.vae import Decoder, Encoder, from_pixels, latent_of, to_pixels
from zimage_lite.pipeline.decode import decode_as_planned
from zimage_lite.pipeline.drawing import Pipeline
from zimage_lite.pipeline.picture import encode_as_planned
from zimage_lite.quant.formats import PLAIN_BY_DTYPE
from zimage_lite.quant.tensor import QTensor
from zimage_lite.units import parse_bytes

TINY, TRUE = SIZES["tiny"][2], VaeConfig()
WAYS = ((True, True), (False, True), (False, False))  # store_input, store_hidden
LATENTS = ((2, 2), (2, 6), (6, 2), (4, 10), (10, 4), (14, 6), (6, 22), (18, 2), (16, 14), (12, 18))
BANDS = (1, 2, 3, 7, 1000)
LABELS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def model(part: type, config: VaeConfig, dtype: torch.dtype, device: str = "cpu", gain: float = 1.0) -> Any:
    """An encoder or decoder with random weights. gain: of what each block adds to the stream."""
    made = part(config)
    for name, shape in shapes(made).items():
        if device == "meta":
            values = torch.empty(shape, device=device)
        else:
            values = torch.cat(list(random_weights("vae", name, shape, 0))).view(shape).to(device)
        if gain != 1 and re.search(r"conv1|conv2|conv_in", name):
            values = values * gain
        bind(made, {name: QTensor(PLAIN_BY_DTYPE[LABELS[dtype]], shape, {"": values.to(dtype)})}, dtype)
    return made


@pytest.fixture(scope="module")
def tiny_parts() -> tuple[Encoder, Decoder]:
    return model(Encoder, TINY, torch.float32), model(Decoder, TINY, torch.float32)


def image_of(height: int, width: int) -> torch.Tensor:
    return torch.rand(3, 8 * height, 8 * width) * 2 - 1


def assert_same(value: torch.Tensor, truth: torch.Tensor) -> None:
    """To rounding: 30 layers of float32, 6e-8 each, measured at 1e-6 of the range. A seam would be 1e-2."""
    assert value.shape == truth.shape and value.dtype == truth.dtype
    assert (value - truth).abs().max() <= 5e-6 * (truth.max() - truth.min())


@pytest.mark.slow  # every size in every way
@pytest.mark.parametrize("rows", BANDS)
@pytest.mark.parametrize("size", range(len(LATENTS)))
@torch.inference_mode()
def test_bands_give_what_the_whole_image_gives(tiny_parts, size: int, rows: int) -> None:
    encoder, decoder = tiny_parts
    banded = Banded(rows, *WAYS[(size + BANDS.index(rows)) % len(WAYS)])
    latent, image = torch.randn(16, *LATENTS[size]), image_of(*LATENTS[size])
    assert_same(banded.decode(decoder, latent), decoder(latent))
    assert_same(banded.encode(encoder, image), encoder(image))


@pytest.mark.slow  # large maps
@pytest.mark.parametrize("way", [WAYS[0], *(pytest.param(way, marks=pytest.mark.full_size) for way in WAYS[1:])])
@torch.inference_mode()
def test_the_true_widths(way: tuple[bool, bool]) -> None:
    encoder, decoder = model(Encoder, TRUE, torch.float32), model(Decoder, TRUE, torch.float32)
    latent, image = torch.randn(16, 2, 4), image_of(2, 4)
    assert_same(Banded(5, *way).decode(decoder, latent), decoder(latent))
    assert_same(Banded(5, *way).encode(encoder, image), encoder(image))


@pytest.mark.slow
@torch.inference_mode()
def test_bands_give_what_diffusers_gives(diffusers_pipeline, diffusers_folder) -> None:
    parts: Any = torch.nn.ModuleDict({"encoder": Encoder(TINY), "decoder": Decoder(TINY)})
    bound(parts, diffusers_folder / "vae")
    latent, image, theirs = torch.randn(16, 10, 14), image_of(10, 14), diffusers_pipeline.vae
    decoded = theirs.decode((latent / TINY.scaling_factor + TINY.shift_factor).unsqueeze(0)).sample[0]
    encoded = theirs.encode(image.unsqueeze(0)).latent_dist.parameters[0]
    for way in WAYS:
        assert relative_error(Banded(6, *way).decode(parts["decoder"], latent), decoded) <= 1e-5
        assert relative_error(Banded(6, *way).encode(parts["encoder"], image), encoded) <= 1e-5


@pytest.mark.slow
@torch.inference_mode()
def test_encoding_in_bands_is_as_exact_as_float32_is(diffusers_pipeline, diffusers_folder) -> None:
    """At ten sizes the bands are as near to what diffusers gives in float64 as its own float32 is: 0.78 to 1.02
    times its error, measured, for sums in another order."""
    parts: Any = torch.nn.ModuleDict({"encoder": Encoder(TINY)})
    bound(parts, diffusers_folder / "vae")
    double = deepcopy(diffusers_pipeline.vae).double()
    for number, size in enumerate(LATENTS):
        image = image_of(*size)
        truth = double.encode(image.double().unsqueeze(0)).latent_dist.parameters[0]
        single = diffusers_pipeline.vae.encode(image.unsqueeze(0)).latent_dist.parameters[0]
        ours = Banded(7, *WAYS[number % len(WAYS)]).encode(parts["encoder"], image)
        assert relative_error(ours, truth) <= 1.5 * relative_error(single, truth)


@torch.inference_mode()
def test_encoding_in_bands_with_trained_weights() -> None:
    """Those of the demo: 2.6e-7 of the range, measured, where random ones, whose sums cancel more, have up to 2e-6."""
    folder = model_folder(DEMO) / "vae"
    config = open_checkpoint(folder).config
    encoder = bound(torch.nn.ModuleDict({"encoder": Encoder(config)}), folder).get_submodule("encoder")
    for number, size in enumerate(LATENTS):
        image, banded = image_of(*size) * 0.1, Banded(7, *WAYS[number % len(WAYS)])
        mean, truth = (latent_of(moments, config) for moments in (banded.encode(encoder, image), encoder(image)))
        assert (mean - truth).abs().max() <= 1e-6 * (truth.max() - truth.min())


@pytest.mark.parametrize("size", [0.0, 1.0, 100.0])
def test_a_sample_is_that_of_diffusers(size: float) -> None:
    """To the bit, and within its bounds of the variance."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    moments, noise = torch.randn(32, 5, 7) * size, torch.randn(1, 16, 5, 7, generator=torch.Generator().manual_seed(1))
    theirs = DiagonalGaussianDistribution(moments.unsqueeze(0))
    sample, mean = (x[0] for x in (theirs.sample(torch.Generator().manual_seed(1)), theirs.mode()))
    for noise_or_none, truth in ((noise[0], sample), (None, mean)):
        found = latent_of(moments, TINY, noise_or_none)
        assert torch.equal(found, (truth - TINY.shift_factor) * TINY.scaling_factor)


def test_pixels_are_read_as_diffusers_reads_them() -> None:
    """To the bit, and back to the same pixels."""
    from diffusers.image_processor import VaeImageProcessor
    from PIL import Image

    pixels = torch.randint(256, (48, 32, 3), dtype=torch.uint8)
    image = from_pixels(pixels, torch.float32)
    assert torch.equal(image, VaeImageProcessor().preprocess(Image.fromarray(pixels.numpy()))[0])
    assert torch.equal(to_pixels(image), pixels) and image.is_contiguous()


@torch.inference_mode()
def test_maps_may_lie_elsewhere(tiny_parts) -> None:
    (encoder, decoder), banded = tiny_parts, Banded(9, store=torch.device("cpu"))
    latent, image = torch.randn(16, 6, 4), image_of(6, 4)
    assert_same(banded.decode(decoder, latent), decoder(latent))
    assert_same(banded.encode(encoder, image), encoder(image))


@pytest.mark.slow
@torch.inference_mode()
def test_bands_in_bf16_are_as_exact_as_the_whole() -> None:
    latent = torch.randn(16, 6, 8)
    truth = model(Decoder, TINY, torch.float32)(latent)
    half = model(Decoder, TINY, torch.bfloat16)
    assert relative_error(Banded(16).decode(half, latent), truth) <= 1.2 * relative_error(half(latent), truth)


@torch.inference_mode()
def test_fp16_stays_finite_where_its_range_is_too_small() -> None:
    """Maps of 10^5 and more, as real weights are said to make."""
    latent, image, gain = torch.randn(16, 2, 4), image_of(2, 4), 3e4
    for part, given, run in ((Decoder, latent, "decode"), (Encoder, image.half(), "encode")):
        truth = model(part, TINY, torch.float32, gain=gain)(given.float())
        half = model(part, TINY, torch.float16, gain=gain)
        assert not torch.isfinite(half(given)).all()
        ours = getattr(Banded(16), run)(half, given)
        assert torch.isfinite(ours).all()
        assert relative_error(ours, truth) <= 0.01  # without the gain the whole has 0.003


@torch.inference_mode()
def test_attention_in_chunks(tiny_parts, monkeypatch: pytest.MonkeyPatch) -> None:
    attention, normed = tiny_parts[1].mid_block.attentions[0], torch.randn(64, 6, 7)
    whole = attention.attended(normed)
    monkeypatch.setattr(vae, "VAE_QUERIES", 5)
    assert_same(attention.attended(normed), whole)


@pytest.mark.parametrize(("mean", "deviation"), [(0.0, 1.0), (1000.0, 0.1), (-5e4, 30.0)])
def test_statistics_of_pieces(mean: float, deviation: float) -> None:
    x = torch.randn(8, 50, 11) * deviation + mean + torch.arange(8)[:, None, None] * deviation
    moments = Moments()
    for rows in x.split([1, 7, 20, 22], dim=1):
        moments.add(rows)
    means, variances = moments.of_groups(4)
    truth = x.double().reshape(4, -1)
    assert ((means[:, 0] - truth.mean(1)).abs() <= 1e-6 * abs(mean) + 1e-6 * deviation).all()
    assert torch.allclose(variances[:, 0], truth.var(1, correction=0), rtol=1e-4)


# The plan


def count(run: Any, *args: Any) -> int:
    with torch.inference_mode(), LiveBytes() as live:
        run(*args)
    return live.peak_bytes


def encoding(encoder: Encoder, run: Callable[[torch.Tensor], torch.Tensor], height: int, width: int) -> Any:
    """From pixels on."""
    pixels = torch.empty(height, width, 3, dtype=torch.uint8, device="meta")
    return lambda: run(from_pixels(pixels, encoder.conv_in.weight.dtype))


COUNTED = [(TINY, 128, 272, 9), (TINY, 208, 112, 16), (TRUE, 256, 512, 32), (TRUE, 1024, 1024, 64)]


@pytest.mark.slow  # large images
@pytest.mark.parametrize("dtype", always(torch.bfloat16, of=[torch.float32, torch.bfloat16]))
@pytest.mark.parametrize(("config", "height", "width", "rows"), always(*COUNTED[::2], of=COUNTED))
def test_what_is_predicted_is_used(config: VaeConfig, height: int, width: int, rows: int, dtype: torch.dtype) -> None:
    """On the meta device, which counts tensors of any size; what a convolution takes inside is left out."""
    encoder, decoder = model(Encoder, config, dtype, "meta"), model(Decoder, config, dtype, "meta")
    latent = torch.empty(16, height // 8, width // 8, device="meta")
    for way in WAYS:
        plan = VaePlan(rows, *way)
        used = count(Banded(rows, *way).decode, decoder, latent)
        promised = predict_decode(config, height, width, dtype.itemsize, plan, no_convolution).device_bytes
        assert used <= promised <= 1.1 * used
        used = count(encoding(encoder, partial(Banded(rows, *way).encode, encoder), height, width))
        promised = predict_encode(config, height, width, dtype.itemsize, plan, no_convolution).device_bytes
        assert used <= promised <= 1.1 * used


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("config", "height", "width"), [(TINY, 128, 272), (TINY, 720, 1280), (TRUE, 1024, 1024)])
def test_what_the_whole_image_takes(config: VaeConfig, height: int, width: int, dtype: torch.dtype) -> None:
    """Narrow levels hold another share of maps than wide ones."""
    decoder = model(Decoder, config, dtype, "meta")
    used = count(decoder, torch.empty(16, height // 8, width // 8, device="meta"))
    promised = predict_decode(config, height, width, dtype.itemsize, VaePlan(), no_convolution).device_bytes
    assert used <= promised <= 1.02 * used + 2**15
    encoder = model(Encoder, config, dtype, "meta")
    used = count(encoding(encoder, encoder, height, width))
    promised = predict_encode(config, height, width, dtype.itemsize, VaePlan(), no_convolution).device_bytes
    assert used <= promised <= 1.02 * used + 2**15


@pytest.mark.slow
@pytest.mark.parametrize("size", always(0, 3, of=range(len(LATENTS))))
def test_small_pictures_take_what_is_predicted(size: int) -> None:
    """Where vectors count, and what lies beyond the edges of maps; in bands as narrow as there are."""
    height, width = (8 * side for side in LATENTS[size])
    for dtype in (torch.float32, torch.bfloat16):
        encoder = model(Encoder, TINY, dtype, "meta")
        for plan in encode_ways(TINY, height, width, dtype.itemsize, gpu=False):
            banded = Banded(plan.rows_per_band, plan.store_input, plan.store_hidden)
            run = partial(banded.encode, encoder) if plan.rows_per_band else encoder
            promised = predict_encode(TINY, height, width, dtype.itemsize, plan, no_convolution).device_bytes
            assert count(encoding(encoder, run, height, width)) <= promised


def test_counting() -> None:
    kept = torch.empty(1000)
    with LiveBytes() as live:
        a = torch.empty(100, dtype=torch.uint8)
        kept.view(10, 100)[0].add_(1)  # was there before
        b = a.view(10, 10)[3:]  # takes nothing
        del a
        torch.empty(50, dtype=torch.uint8)  # gone at once
        c = torch.empty(20, dtype=torch.uint8)
    assert live.peak_bytes == 150 and len(b) + len(c) == 27


GIB = 2**30


@pytest.mark.parametrize(("height", "width", "budget"), [(1024, 1024, 1.0 * GIB), (2048, 3072, 4.0 * GIB)])
def test_16_bit_images_fit_where_they_should(height: int, width: int, budget: float) -> None:
    """Without computing more than a third twice, and without the host's memory."""
    weights = 2 * sum(torch.Size(shape).numel() for shape in shapes(Decoder(TRUE)).values())
    ways = decode_ways(TRUE, height, width, 2, gpu=False)
    fits = [way for way in ways if way.device_bytes + weights <= budget]
    assert fits and fits[0].flops <= 1.33 * ways[0].flops


@pytest.mark.parametrize(("height", "width"), [(16, 16), (208, 336), (1024, 1024), (3072, 2048)])
def test_ways(height: int, width: int) -> None:
    """The whole image first; each kind of band in turn; what is stored less takes less and computes more."""
    whole, *bands = decode_ways(TRUE, height, width, 2, gpu=True)
    assert whole.rows_per_band == 0 and len(set(bands)) == len(bands)
    for stored, again in pairwise([way for way in bands if way.rows_per_band == 16 and not way.spilled]):
        assert again.flops > stored.flops and again.device_bytes <= stored.device_bytes
    assert all(way.host_bytes > 0 and way.device_bytes < bands[0].device_bytes for way in bands if way.spilled)


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("item_bytes", [2, 4])
@pytest.mark.parametrize(("height", "width"), [(16, 16), (208, 336), (1024, 1024), (3072, 2048)])
def test_a_picture_fits_where_its_image_does(height: int, width: int, item_bytes: int, gpu: bool) -> None:
    """Each way to encode takes less than the same way to decode; of two, the later takes less or computes less."""
    decode = {way_of(plan): plan for plan in decode_ways(TRUE, height, width, item_bytes, gpu)}
    encode = encode_ways(TRUE, height, width, item_bytes, gpu)
    for plan in encode:
        twin = decode[way_of(plan)]
        assert plan.device_bytes + plan.host_bytes < twin.device_bytes + twin.host_bytes and plan.flops < twin.flops
    for stored, again in pairwise([way for way in encode if way.rows_per_band == 16 and not way.spilled]):
        assert again.flops > stored.flops and again.device_bytes < stored.device_bytes


def way_of(plan: VaePlan) -> tuple[int, bool, bool, bool]:
    return plan.rows_per_band, plan.store_input, plan.store_hidden, plan.spilled


def test_planning_loads_no_torch() -> None:
    code = "import sys, zimage_lite.memory.plan_vae; sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Whole runs


@pytest.fixture
def pipeline(diffusers_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    monkeypatch.setattr(hardware, "rss_bytes", lambda: 0)
    return Pipeline(open_model(diffusers_folder), RuntimeOptions(device="cpu", dtype="fp32"))


@pytest.mark.slow
@torch.inference_mode()
def test_the_image_does_not_depend_on_the_budget(pipeline: Pipeline) -> None:
    """From the whole image at once to the smallest bands; less than that is refused, and names what would do."""
    latent = torch.randn(16, 26, 34)
    truth = pipeline.decode([latent])[0]
    ways, budget = [pipeline.plans["decode"].way], 0
    with pytest.raises(BudgetError) as caught:
        while True:
            budget = pipeline.plans["decode"].peak_ram_bytes - 1
            pipeline.work.options = replace(pipeline.options, ram_bytes=budget)
            image = pipeline.decode([latent])[0]
            assert (image.int() - truth.int()).abs().max() <= 1
            assert pipeline.plans["decode"].peak_ram_bytes <= budget
            ways.append(pipeline.plans["decode"].way)
    assert ways[0].rows_per_band == 0 and len(set(ways)) == len(ways) >= 3
    assert ways[-1].rows_per_band <= 4 and not ways[-1].store_hidden
    named = re.search(r"the smallest that works is --ram (\S+)", str(caught.value))
    assert named and budget < parse_bytes(named[1]) <= budget + 10**8 + 1


@pytest.mark.gpu
@pytest.mark.parametrize("plan", [VaePlan(), VaePlan(32), VaePlan(32, False, False), VaePlan(32, spilled=True)])
@torch.inference_mode()
def test_on_a_gpu(plan: VaePlan) -> None:
    decoder = model(Decoder, TRUE, torch.bfloat16, "cuda")
    latent = torch.randn(16, 64, 96).cuda()
    truth = to_pixels(decoder(latent))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    image = decode_as_planned(decoder, latent, plan)
    used = torch.cuda.max_memory_allocated() - before
    assert used <= predict_decode(TRUE, 512, 768, 2, plan).device_bytes
    assert (to_pixels(image).int() - truth.int()).float().mean() < 2  # bf16, of 255


@pytest.mark.gpu
@pytest.mark.parametrize("plan", [VaePlan(), VaePlan(32), VaePlan(32, False, False), VaePlan(32, spilled=True)])
@torch.inference_mode()
def test_a_picture_on_a_gpu(plan: VaePlan) -> None:
    encoder = model(Encoder, TRUE, torch.bfloat16, "cuda")
    pixels = torch.randint(256, (512, 768, 3), dtype=torch.uint8).cuda()
    truth = encoder(from_pixels(pixels, torch.bfloat16))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    moments = encode_as_planned(encoder, from_pixels(pixels, torch.bfloat16), plan)
    used = torch.cuda.max_memory_allocated() - before
    assert used <= predict_encode(TRUE, 512, 768, 2, plan).device_bytes
    assert relative_error(moments, truth) < 0.05  # bf16
