"""A whole transformer with an adapter, as diffusers and peft compute it, its blocks staying or coming and going."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted import MOST, STRENGTHS, changes_of, set_of
from adapter_files import TINY
from oracles import randomize
from torch import Tensor, nn
from trainers import ADAPTERS

from zimage_lite.adapters.joined import AdapterSet
from zimage_lite.adapters.load import load_of
from zimage_lite.adapters.reading import open_adapter
from zimage_lite.checkpoint.checkpoint import open_checkpoint
from zimage_lite.memory.hardware import Hardware
from zimage_lite.memory.machine import Machine, Work
from zimage_lite.memory.placement import GRANULE_BYTES
from zimage_lite.memory.plan import Block, Phase, Plan
from zimage_lite.memory.planner import budgets_in_force, plan_phases
from zimage_lite.model.transformer import Transformer
from zimage_lite.pipeline.weights import Component, opened, time_weights

CPU = Hardware(torch.device("cpu"), torch.float32)
LATENTS, FEATURES = (1, 4, 8, 12), (21, 32)
TIME = torch.tensor([0.3])


@pytest.fixture(scope="module")
def theirs() -> Any:
    diffusers, _ = pytest.importorskip("diffusers"), pytest.importorskip("peft")
    torch.manual_seed(0)
    model = diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=64, n_layers=2, n_refiner_layers=1, n_heads=4,
        n_kv_heads=4, cap_feat_dim=32, axes_dims=[4, 6, 6], axes_lens=[64, 32, 32], qk_norm=True,
    ).eval()  # fmt: skip
    randomize(model)
    return model


@pytest.fixture(scope="module")
def folder(theirs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(found)
    return found


def inputs() -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    return torch.randn(LATENTS[1:], generator=random), torch.randn(FEATURES, generator=random)


def planned(component: Component, slots: bool) -> Plan:
    """All blocks stay, or the budget holds one and what passes through."""
    added = load_of(component.adapters, "fp32").bytes
    blocks = [Block(name, n + added.get(name, 0), Work(1e9)) for name, n in component.block_bytes.items()]
    prelude, main = ([block for block in blocks if block.name.startswith("context") is way] for way in (True, False))
    phase = Phase("denoise", tuple(main), passes=2, prelude=tuple(prelude), device="cpu")
    there = Machine("test", 10**10, process_bytes=0)
    most = 2 * GRANULE_BYTES if slots else 10**9  # in which a tiny block takes one granule
    (plan,) = plan_phases([[phase]], there, budgets_in_force(there, ram_bytes=most))
    assert bool(plan.streamed) == slots
    return plan


def ours(folder: Path, adapters: AdapterSet, slots: bool = False) -> Tensor:
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config == TINY
    transformer = Transformer(checkpoint.config)
    adapters.measure(checkpoint.tensors)
    component = Component(transformer, checkpoint, ("context_refiner", "noise_refiner", "layers"), adapters=adapters)
    latent, feature = inputs()
    with torch.inference_mode():
        with time_weights(component, CPU) as stream:
            (modulation,) = transformer.modulations(TIME, torch.float32, stream)
        with opened(component, planned(component, slots), CPU) as weights:
            with weights.prelude() as stream:
                captions = transformer.refine_captions([feature], stream)
            with weights.passes(2) as stream:
                first, second = (transformer([latent], captions, modulation, stream)[0] for _ in range(2))
    assert torch.equal(first, second)
    return first


def of_diffusers(model: Any) -> Tensor:
    latent, feature = inputs()
    with torch.inference_mode():
        return model([latent[:, None]], TIME, [feature], return_dict=False)[0][0].squeeze(1)


# Spellings that diffusers 0.42 reads right and whole.
SPELLINGS = {"peft in diffusers": False, "ai-toolkit with adaLN": True, "musubi, alpha not the rank": False}


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_lora_as_diffusers_applies_it(name: str, theirs: Any, folder: Path, tmp_path: Path) -> None:
    loader = pytest.importorskip("diffusers.loaders").ZImageLoraLoaderMixin
    described = ADAPTERS[name]()
    adapter = open_adapter(described.write(tmp_path), TINY)
    before, plain = of_diffusers(theirs), ours(folder, AdapterSet())
    loader.load_lora_into_transformer(loader.lora_state_dict(dict(described.tensors)), theirs, adapter_name="a")
    try:
        for m in STRENGTHS:
            theirs.set_adapters(["a"], [m])
            change = of_diffusers(theirs).double() - before
            got = ours(folder, set_of((adapter, m)), SPELLINGS[name]).double() - plain
            assert (got - change).norm() <= MOST * change.norm()
            assert m == 0 or change.norm() > 0.1 * before.norm()
    finally:
        theirs.unload_lora()


# What diffusers 0.42 refuses, loads in part or not at all: held against its model with weights merged by hand.
OTHERS = (
    "native fused", "DiffSynth, bare, .default", "peft folder, rslora, patterns", "LoHa", "LoKr and LoRA",
    "LoKr fused, rows across q, k, v", "DoRA [1, K]", "DoRA magnitude", "differences", "lora_bias", "OFT of outputs",
    "OFT of inputs",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_as_diffusers_with_merged_weights(name: str, theirs: Any, folder: Path, tmp_path: Path) -> None:
    m = -0.7
    described, model = ADAPTERS[name](), copy.deepcopy(theirs)
    with torch.no_grad():
        for module, (change, bias) in changes_of(described, lambda name: weight_of(theirs, name)).items():
            if change is not None:
                weight = weight_of(model, module)
                weight.copy_(weight.double() + m * change)
            if bias is not None:
                owner = model.get_submodule(module)
                owner.bias = nn.Parameter(m * bias.float() + (0 if owner.bias is None else owner.bias))
    adapter = open_adapter(described.write(tmp_path), TINY)
    before = of_diffusers(theirs)
    change = of_diffusers(model).double() - before
    got = ours(folder, set_of((adapter, m))).double() - ours(folder, AdapterSet())
    # What a change makes of the output is the difference of two float32 outputs, each off by some 3e-7.
    assert (got - change).norm() <= MOST * change.norm() + 1e-6 * before.norm()
    assert change.norm() > 0.03 * before.norm()


def weight_of(model: nn.Module, module: str) -> Tensor:
    """[rows, columns], as a view."""
    *path, leaf = module.split(".")
    owner = getattr(model.get_submodule(".".join(path)), leaf)
    weight = owner if isinstance(owner, Tensor) else owner.weight
    return weight.data if weight.ndim == 2 else weight.data[None]
