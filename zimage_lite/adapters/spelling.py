"""Whose weight a tensor of an adapter changes, and what of it the tensor is, whatever tool wrote the name.

No rule here knows a trainer. A name is cut into a module and a parameter at the longest known ending; prefixes are
taken off; what is left is looked up with its separators squashed, since dots, underscores and both mixed are met. A
name is never cut at underscores: `to_q` has one of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

from ..checkpoint.names import NATIVE_TRANSFORMER
from ..config import TransformerConfig
from ..model.linear import Linear
from ..model.omni import transformer

# What a parameter is called here: each ending that files have -> one name.
_ENDINGS = {
    "down": ("lora_down", "lora_A", "lora.down", "lora_linear_layer.down", "_lora.down"),
    "up": ("lora_up", "lora_B", "lora.up", "lora_linear_layer.up", "_lora.up"),
}
_WEIGHTS = "|".join(re.escape(ending) for endings in _ENDINGS.values() for ending in sorted(endings, key=len)[::-1])
_PARAMETER = re.compile(
    rf"(?P<module>.+?)[._]?(?<![a-z])(?:(?P<factor>{_WEIGHTS})(?:\.(?!weight$|bias$).+?)?(?:\.(?P<leaf>weight|bias))?"
    r"|(?P<name>lora_mid(?:\.weight)?|hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t[12])"
    r"|alpha|scale|dora_scale|magnitude|lora_magnitude_vector(?:\.\w+)*|diff|diff_b|set_weight|w_norm|b_norm"
    r"|oft_blocks|oft_R\.(?:\w+\.)?(?:weight|scaled_oft)|rescale|reshape_weight|[ab][12]\.weight|on_input|bias_(?:indices|values|size)))",
)
_PREFIXES = re.compile(
    r"(?:base_model\.model\.|pipe\.dit\.|dit\.|default\.|model\.diffusion_model\.|diffusion_model\.|transformer\.|unet\."
    r"|lora_unet__|lora_unet_|lora_transformer_|lycoris_)"
)
_TEXT_ENCODER = re.compile(r"(?:base_model\.model\.)?(?:text_encoders?[._]|lora_te\d?_|te\d?[._])")
_STRANGERS = {
    "double_blocks": "Flux", "single_blocks": "Flux", "single_transformer_blocks": "Flux",
    "transformer_blocks": "Qwen-Image, Flux or Stable Diffusion 3", "joint_blocks": "Stable Diffusion 3",
    "down_blocks": "Stable Diffusion or SDXL", "input_blocks": "Stable Diffusion or SDXL", "blocks_0_cross_attn": "Wan",
    "blocks.0.cross_attn": "Wan",
}  # fmt: skip

# Of modules under diffusers' names: what else they are called, beside Lumina2's names (NATIVE_TRANSFORMER).
_ALIASES = (
    (".attention.to_out.0", (".attention.out.0", ".attention.wo", ".attention.to_out")),
    (".adaLN_modulation.0", (".adaLN_modulation.1",)),  # SiLU comes first, in other members of the family
    ("t_embedder.", ("t_embedder_2.",)),  # TwinFlow's second time
    (".feed_forward.w2", (".feed_forward.net.2",)),
)
# Names of several modules at once, whose outputs lie one after another.
_FUSED = (
    ("attention.qkv", ("attention.to_q", "attention.to_k", "attention.to_v")),
    ("attention.to_qkv", ("attention.to_q", "attention.to_k", "attention.to_v")),
    ("feed_forward.w13", ("feed_forward.w3", "feed_forward.w1")),  # nunchaku's order
    ("feed_forward.net.0.proj", ("feed_forward.w3", "feed_forward.w1")),
)


@dataclass(frozen=True)
class Key:
    """A tensor's name, taken apart. module: as the file spells it, without prefixes; parameter: under its one name."""

    module: str
    parameter: str


@dataclass(frozen=True)
class Target:
    """A module that exists, [rows, columns] large (vectors: [1, n]); in a fused one its rows begin at first_row of
    all_rows."""

    module: str
    rows: int
    columns: int
    first_row: int = 0
    all_rows: int = 0
    is_linear: bool = True

    @property
    def is_part(self) -> bool:
        """Of several that share one name."""
        return self.rows != self.all_rows


def split(name: str) -> Key | None:
    """None: not the name of an adapter's tensor."""
    found = _PARAMETER.fullmatch(name)
    if not found:
        return None
    module = _bare(found["module"].removesuffix(".lora").removesuffix("_lora"))
    if found["factor"] is None:
        return Key(module, _plain(found["name"]))
    parameter = next(known for known, endings in _ENDINGS.items() if found["factor"] in endings)
    return Key(module, f"{parameter}_bias" if found["leaf"] == "bias" else parameter)


def owner_of(name: str, known: Mapping[str, object]) -> str:
    """The module that a tensor belongs to which is of no known kind, squashed; empty if there is none of that name."""
    while name:
        name = name.rpartition(".")[0]
        if (module := squashed(_bare(name))) in known:
            return module
    return ""


def _bare(module: str) -> str:
    """Without prefixes."""
    while prefix := _PREFIXES.match(module):
        module = module[prefix.end() :]
    return module


def _plain(name: str) -> str:
    """Without an adapter's own name in it."""
    if name.startswith("oft_R"):
        return f"oft_R.{name.rpartition('.')[2]}"
    return next((known for known in ("lora_magnitude_vector", "lora_mid") if name.startswith(known)), name)


def squashed(module: str) -> str:
    return re.sub(r"[._-]+", "_", module).lower()


def stranger(name: str) -> str | None:
    """The model that such a name belongs to, if it is no Z-Image."""
    return next((model for part, model in _STRANGERS.items() if part in name), None)


def is_text_encoder(name: str) -> bool:
    return bool(_TEXT_ENCODER.match(name))


@lru_cache(maxsize=4)
def table(config: TransformerConfig) -> Mapping[str, tuple[Target, ...]]:
    """Squashed spelling -> the modules that it stands for."""
    known, found = _targets(config), dict[str, tuple[Target, ...]]()
    for module, target in known.items():
        for name in {module, *_other_names(module)}:
            found[squashed(name)] = (target,)
    for fused, parts in _FUSED:
        for module in [name for name in known if name.endswith(parts[0])]:
            block = module.removesuffix(parts[0])
            found[squashed(block + fused)] = tuple(_stacked([known[block + part] for part in parts]))
    return found


def _targets(config: TransformerConfig) -> dict[str, Target]:
    """Every module with a weight, and every parameter that is one itself."""
    found, model = {}, transformer(config)
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is not None:
            rows, columns = weight.shape if weight.ndim == 2 else (1, len(weight))
            found[name] = Target(name, rows, columns, all_rows=rows, is_linear=isinstance(module, Linear))
    for name, parameter in model.named_parameters(recurse=False):  # the pad tokens
        rows, columns = parameter.shape
        found[name] = Target(name, rows, columns, all_rows=rows, is_linear=False)
    return found


def _other_names(module: str) -> Iterator[str]:
    (native,) = NATIVE_TRANSFORMER.to_foreign([f"{module}.weight"])
    yield native.removesuffix(".weight")
    for known, others in _ALIASES:
        for other in others:
            if module.startswith(known):
                yield other + module.removeprefix(known)
            elif module.endswith(known):
                yield module.removesuffix(known) + other


def _stacked(targets: list[Target]) -> Iterator[Target]:
    first, all_rows = 0, sum(target.rows for target in targets)
    for target in targets:
        yield Target(target.module, target.rows, target.columns, first, all_rows)
        first += target.rows
