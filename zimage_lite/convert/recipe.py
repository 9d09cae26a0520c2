"""Which tensor gets which format: data, one small file per target in recipes/.

GGUF recipes follow what llama.cpp does for Qwen3, and its usual patch for this transformer, so that files equal what
people already use: embedders, final layer and refiners stay 16-bit, vectors are float32. A file says, per component:

    format   what a weight matrix gets
    keep     groups that stay 16-bit
    rules    groups that get another format, perhaps in some layers only; the first that fits wins
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cache
from importlib.resources import files
from typing import Any

from ..errors import UserError
from ..quant.formats import FORMATS, Format
from ..units import parse_bytes

AUTO = "auto:"  # and a size: the transformer's tensors get what makes it so large
KEEP = "keep"  # as a format: what the tensor has, or 16 bits

# Group -> patterns of canonical names.
GROUPS = {
    "embedders": (
        "t_embedder.*",
        "all_x_embedder.*",
        "cap_embedder.*",
        "siglip_embedder.*",
        "control_all_x_embedder.*",
    ),
    "final_layer": ("all_final_layer.*",),
    "refiners": ("context_refiner.*", "noise_refiner.*", "siglip_refiner.*"),
    "hints": ("*.before_proj.*", "*.after_proj.*"),
    "adaln": ("*.adaLN_modulation.*",),
    "qkv": ("*.attention.to_q.*", "*.attention.to_k.*", "*.attention.to_v.*"),
    "out": ("*.attention.to_out.0.*",),
    "w1, w3": ("*.feed_forward.w1.*", "*.feed_forward.w3.*"),
    "w2": ("*.feed_forward.w2.*",),
    "embedding": ("embed_tokens.*",),
    "attn_qk": ("*.self_attn.q_proj.*", "*.self_attn.k_proj.*"),
    "attn_v": ("*.self_attn.v_proj.*",),
    "attn_out": ("*.self_attn.o_proj.*",),
    "ffn_gate, ffn_up": ("*.mlp.gate_proj.*", "*.mlp.up_proj.*"),
    "ffn_down": ("*.mlp.down_proj.*",),
}

# Layer choices of llama.cpp: (layer, number of layers) -> whether it is meant. `more_bits` gives the first and the last
# eighth and every third between them.
_LAYERS: dict[str, Callable[[int, int], bool]] = {
    "first_2": lambda i, n: i < 2,
    "first_4": lambda i, n: i < 4,
    "first_eighth": lambda i, n: i < n // 8,
    "first_sixteenth": lambda i, n: i < n // 16,
    "more_bits": lambda i, n: i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2,
}

# What a row that is no multiple of 256 long gets instead, as in llama.cpp. The true model has no such row.
_SHORT_ROWS = {"q2_k": "iq4_nl", "q3_k": "iq4_nl", "iq4_xs": "iq4_nl", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
_HINTS_TO = {"gguf": "q8_0", "comfy": "int8"}  # container -> what makes hints gets where the rest gets less than 8 bits
_GUESTS = ("bf16", "f16", "f32")  # what every container holds beside its own formats


@dataclass(frozen=True)
class Rule:
    """tensors: a group, or a pattern of a canonical or an output name."""

    tensors: str
    to: str
    layers: str | None = None

    def fits(self, names: Iterable[str], n_layers: int) -> bool:
        patterns = GROUPS.get(self.tensors, (self.tensors,))
        meant = [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
        return bool(meant) and (self.layers is None or _LAYERS[self.layers](_layer(meant[0]), n_layers))


@dataclass(frozen=True)
class Recipe:
    """What one component gets. vectors: format of 1-D tensors; None: like the kept ones."""

    format: str
    keep: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = ()
    vectors: str | None = None

    def format_of(self, names: tuple[str, ...], shape: tuple[int, ...], source: Format, n_layers: int) -> Format:
        """The format a tensor is written in. names: those it may be called by."""
        row, kept = self.wanted(names, shape, source, n_layers), _kept(source)
        columns = shape[-1] if shape else 1
        if not row.fits(columns):
            row = FORMATS[_SHORT_ROWS.get(row.name, kept.name)]
        return row if row.fits(columns) else kept

    def wanted(self, names: tuple[str, ...], shape: tuple[int, ...], source: Format, n_layers: int) -> Format:
        """The same, whether or not its blocks fit into the rows. What is kept stays 16-bit."""
        if self.format == KEEP and source.writable and source.container in ("any", "comfy"):
            return source
        kept = _kept(source)
        if len([size for size in shape if size > 1]) < 2:  # vectors, and the pad tokens, [1, dim]
            return FORMATS[self.vectors] if self.vectors else kept
        if not names[0].endswith(".weight"):
            return kept
        name = next((rule.to for rule in self._all_rules if rule.fits(names, n_layers)), self.format)
        return kept if name == KEEP else FORMATS[name]

    @property
    def _all_rules(self) -> tuple[Rule, ...]:
        return (*(Rule(group, KEEP) for group in self.keep), *self.rules)


@dataclass(frozen=True)
class Goal:
    """How large the transformer shall be: so many bits for each of its weights, or bytes."""

    bits_per_weight: float = 0.0
    nbytes: int = 0

    @classmethod
    def of(cls, text: str) -> Goal:
        """text: 4.5bpw, or 3.6GB. Raises UserError."""
        number = text.lower().removesuffix("bpw")
        if number == text.lower():
            return cls(nbytes=parse_bytes(text))
        try:
            return cls(bits_per_weight=float(number))
        except ValueError:
            raise UserError("--to auto", got=repr(text), expected="a size such as 4.5bpw or 3.6GB") from None

    def bytes_of(self, weights: int) -> int:
        return self.nbytes or int(self.bits_per_weight * weights / 8)


@dataclass(frozen=True)
class Target:
    """A recipe file: what `quantize --to` offers. overrides: the user's own rules, in front of all others. goal: of
    `auto`, for which rules are still to be found, see `allocation`."""

    name: str
    container: str  # "gguf", "comfy", "bnb" or "quanto"
    summary: str
    read_by: tuple[str, ...]
    text_encoder_to: str  # target of the text encoder beside such a transformer, or "keep"
    file_type: int  # llama.cpp's general.file_type
    recipes: Mapping[str, Recipe]
    overrides: tuple[Rule, ...] = field(default=())
    goal: Goal | None = None

    @property
    def suffix(self) -> str:
        return ".gguf" if self.container == "gguf" else ".safetensors"

    @property
    def lossy(self) -> bool:
        return FORMATS[self.recipes["transformer"].format].lossy

    @property
    def calibrated(self) -> bool:
        """Whether its transformer is quantized by what is known of weights' inputs."""
        return FORMATS[self.recipes["transformer"].format].calibrated

    def recipe(self, component: str) -> Recipe:
        recipe = self.recipes[component]
        return replace(recipe, keep=(), rules=(*self.overrides, *recipe._all_rules))


def targets() -> tuple[str, ...]:
    """The names of all recipes."""
    return tuple(sorted(file.name[:-5] for file in (files(__package__) / "recipes").iterdir() if file.name[0] != "_"))


def target(name: str, flag: str = "--to", also: tuple[str, ...] = ()) -> Target:
    """The recipe of that name, or a UserError that lists them all. also: what else the flag takes."""
    if name.lower().startswith(AUTO) and flag == "--to":
        goal = Goal.of(name[len(AUTO) :])
        return replace(_load("_auto"), name=name.lower().replace(":", "-"), goal=goal)
    if name.lower() not in targets():
        raise UserError(
            f"{flag}: not a format that can be written",
            got=repr(name),
            expected=", ".join((*targets(), *also, *((f"{AUTO}4.5bpw",) if flag == "--to" else ()))),
        )
    return _load(name.lower())


def overridden(chosen: Target, keep: Iterable[str] = (), tensors: Iterable[str] = ()) -> Target:
    """The target with the user's `--keep PATTERN` and `--tensor PATTERN=FORMAT` in front. Raises UserError."""
    rules = [Rule(pattern, KEEP) for pattern in keep]
    for text in tensors:
        pattern, equals, wanted = text.rpartition("=")
        row = FORMATS.get(wanted.lower())
        if not equals or not pattern:
            raise UserError("--tensor", got=repr(text), expected="PATTERN=FORMAT, such as '*.w2.weight=q6_k'")
        known = [r.name for r in FORMATS.values() if _holds(chosen, r)]
        if row is None or row.name not in known:
            raise UserError(
                f"--tensor {text}: not a format for {chosen.name}", got=repr(wanted), expected=", ".join(known)
            )
        rules.append(Rule(pattern, row.name))
    return replace(chosen, overrides=tuple(rules))


def as_it_is() -> Target:
    """Writes what is there under canonical names: for a component that leaves an all-in-one file unconverted."""
    recipes = {component: Recipe(KEEP) for component in ("transformer", "text_encoder", "vae", "controlnet", "siglip")}
    return Target(KEEP, "comfy", "as it is", (), KEEP, 0, recipes)


def _holds(chosen: Target, row: Format) -> bool:
    """bitsandbytes and quanto describe a whole folder in one config, so there only their own format fits."""
    mixes = chosen.container in ("gguf", "comfy") and row.writable and row.container == chosen.container
    return mixes or row.name in (*_GUESTS, chosen.recipes["transformer"].format)


def _kept(source: Format) -> Format:
    return FORMATS["f16" if source.name == "f16" else "bf16"]


def _layer(name: str) -> int:
    return next((int(part) for part in name.split(".") if part.isdecimal()), 0)


@cache
def _load(name: str) -> Target:
    values: dict[str, Any] = json.loads((files(__package__) / "recipes" / f"{name}.json").read_text(encoding="utf-8"))
    vectors = "f32" if values["container"] == "gguf" else None
    recipes = {
        component: Recipe(
            values[component]["format"],
            tuple(values[component]["keep"]),
            tuple(Rule(**rule) for rule in values[component]["rules"]),
            vectors,
        )
        for component in ("transformer", "text_encoder")
    }
    recipes["controlnet"] = _for_controlnets(recipes["transformer"], values["container"])
    return Target(
        name,
        values["container"],
        values["summary"],
        tuple(values["read_by"]),
        values["text_encoder_to"],
        values.get("file_type", 0),
        recipes,
    )


def _for_controlnets(transformer: Recipe, container: str) -> Recipe:
    """Its blocks as the transformer's, the refiner's like all; what makes hints in 8 bits at least, for they are added
    to the residual stream as they are."""
    rules, keep = tuple(rule for rule in transformer.rules if rule.tensors != "refiners"), ("embedders",)
    if FORMATS[transformer.format].bits_per_weight() >= 8:
        return replace(transformer, keep=keep, rules=rules)
    if container in _HINTS_TO:
        return replace(transformer, keep=keep, rules=(Rule("hints", _HINTS_TO[container]), *rules))
    return replace(transformer, keep=(*keep, "hints"), rules=rules)
