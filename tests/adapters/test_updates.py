"""Each kind of adapter, one linear at a time, against peft and LyCORIS, which say what their own tensors do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapted import STRENGTHS, Wanted, Weights, assert_applied
from adapter_files import TINY, size
from safetensors.torch import save_file
from torch import Tensor, nn

from zimage_lite.adapters.reading import open_adapter

MODULES = ("layers.0.attention.to_q", "layers.0.feed_forward.w1", "layers.0.feed_forward.w2")  # square, tall, wide
NAMES = ["to_q", "w1", "w2"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    return Weights(tmp_path_factory.mktemp("tiny"))


def assert_changes(path: Path, wanted: Wanted, weights: Weights) -> None:
    """wanted: at strength 1."""
    adapter = open_adapter(path, TINY)
    for m in STRENGTHS:
        scaled = {name: tuple(None if part is None else m * part for part in parts) for name, parts in wanted.items()}
        assert_applied([(adapter, m)], scaled, weights)


def linear(module: str, weights: Weights, bias: bool = False) -> nn.Linear:
    """torch's own, in float64."""
    rows, columns = size(module)
    made = nn.Linear(columns, rows, bias=bias, dtype=torch.float64).requires_grad_(False)
    made.weight.copy_(weights.of(module))
    return made


def net_of(weights: Weights, bias: bool) -> nn.Module:
    """The linears under the names that they have in the model."""
    net = nn.Module()
    for module in MODULES:
        owner, (*path, leaf) = net, module.split(".")
        for part in path:
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = getattr(owner, part)
        owner.add_module(leaf, linear(module, weights, bias))
    return net


def randomize(module: nn.Module) -> None:
    """Numbers that float32 holds, so that the file has what the module computes with."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            spread = 0.1 if "oft_" in name else 0.3
            parameter.copy_((spread * torch.randn(parameter.shape)).float())
            if "magnitude" in name:
                parameter.abs_().add_(0.5)


# peft: the class of the config, its options, and the bias that its linears need.
PEFT: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("LoraConfig", {"r": 4, "lora_alpha": 8}),
    "rs-LoRA": ("LoraConfig", {"r": 4, "lora_alpha": 8, "use_rslora": True}),
    "LoRA, patterns": (
        "LoraConfig", {"r": 4, "lora_alpha": 8, "rank_pattern": {"w1": 2}, "alpha_pattern": {r"layers\.\d.*w2": 3}},
    ),
    "DoRA": ("LoraConfig", {"r": 4, "lora_alpha": 8, "use_dora": True}),
    "LoRA with biases": ("LoraConfig", {"r": 4, "lora_alpha": 8, "lora_bias": True}),
    "LoHa": ("LoHaConfig", {"r": 3, "alpha": 6}),
    "LoKr": ("LoKrConfig", {"r": 3, "alpha": 6}),
    "LoKr, factor 4": ("LoKrConfig", {"r": 3, "alpha": 6, "decompose_factor": 4}),
    "LoKr, both decomposed": ("LoKrConfig", {"r": 2, "alpha": 6, "decompose_both": True}),
    "LoKr, both whole": ("LoKrConfig", {"r": 64, "alpha": 16}),
    "OFT": ("OFTConfig", {"r": 0, "oft_block_size": 2}),
    "OFT, one block": ("OFTConfig", {"r": 0, "oft_block_size": 2, "block_share": True}),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # peft warns of the shapes of its own biases
@pytest.mark.parametrize("name", PEFT)
def test_as_peft(name: str, weights: Weights, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    cls, options = PEFT[name]
    config = getattr(peft, cls)(target_modules=NAMES, **options)
    net = peft.inject_adapter_in_model(config, net_of(weights, "lora_bias" in options)).double()
    originals = {module: linear(module, weights) for module in MODULES}
    for module in MODULES:
        for part, own in net.get_submodule(module).named_children():
            if part != "base_layer":
                randomize(own)
    tensors = {f"base_model.model.{name}": t.float() for name, t in peft.get_peft_model_state_dict(net).items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config.save_pretrained(tmp_path)
    wanted = {}
    with torch.no_grad():
        for module, original in originals.items():
            layer, x = net.get_submodule(module), torch.eye(original.in_features).double()
            base = layer.base_layer.bias if "lora_bias" in options else 0.0
            bias = layer(torch.zeros_like(x))[0] - base
            wanted[module] = (layer(x) - base - bias - original(x)).T, bias if bias.any() else None
    assert_changes(tmp_path, wanted, weights)


def factors(rows: int, columns: int, rank: int) -> tuple[Tensor, Tensor]:
    return 0.3 * torch.randn(rows, rank), 0.3 * torch.randn(rank, columns)


def lycoris_tensors(kind: str, rows: int, columns: int) -> dict[str, Tensor]:
    w1, w2 = (2, 2), (rows // 2, columns // 2)
    if kind.startswith("LoRA"):
        up, down = factors(rows, columns, 4)
        return {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(2.0)}
    if kind == "LoHa":
        pairs = {
            f"hada_w{i}_{half}": t for i in (1, 2) for half, t in zip("ab", factors(rows, columns, 3), strict=True)
        }
        return {**pairs, "alpha": torch.tensor(2.0)}
    if kind.startswith("OFT"):
        block = 8 if rows % 8 == 0 else 10
        return {
            "oft_blocks": 0.1 * torch.randn(rows // block, block, block),
            "alpha": torch.tensor(0.0005 * ("norm" in kind)),
        }
    found = {"lokr_w1": 0.3 * torch.randn(w1), "lokr_w2": 0.3 * torch.randn(w2), "alpha": torch.tensor(3.0)}
    if kind == "LoKr, w2 decomposed":
        found["lokr_w2_a"], found["lokr_w2_b"] = factors(*w2, 3)
        del found["lokr_w2"]
    return found


def lycoris_module(tensors: dict[str, Tensor], original: nn.Linear) -> Any:
    modules = pytest.importorskip("lycoris.modules")
    named = {f"lycoris_m.{name}": tensor for name, tensor in tensors.items()}
    cls, own = modules.get_module(named, "lycoris_m")
    return modules.make_module(cls, own, "lycoris_m", original)


@pytest.mark.parametrize(
    "kind", ["LoRA", "LoHa", "LoKr, both whole", "LoKr, w2 decomposed", "OFT", "OFT, its norm bounded"]
)
def test_as_lycoris(kind: str, weights: Weights, tmp_path: Path) -> None:
    tensors, wanted = {}, {}
    for module in MODULES:
        own = lycoris_tensors(kind, *size(module))
        tensors |= {f"lycoris_{module.replace('.', '_')}.{name}": tensor for name, tensor in own.items()}
        with torch.no_grad():
            made = lycoris_module(own, linear(module, weights).float())
            made = made if kind.startswith("OFT") else made.double()  # its inverse is float32
            x = torch.eye(size(module)[1], dtype=next(made.parameters()).dtype)
            wanted[module] = made.bypass_forward_diff(x).T.double(), None
    save_file(tensors, tmp_path / "lycoris.safetensors")
    assert_changes(tmp_path / "lycoris.safetensors", wanted, weights)
