"""One naming inside, many outside. Canonical names are those of diffusers (and of transformers' Qwen3Model).

A rule pairs a canonical spelling with a foreign one and works in both directions; `{word}` stands for any text, the
same on both sides. The rules of a map are applied one after another to every name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

# Tried in this order; the empty prefix always matches.
PREFIXES = {
    "transformer": (
        "model.diffusion_model.", "diffusion_model.", "model.model.", "net.", "transformer.", "model.", "",
    ),
    "text_encoder": (
        "text_encoders.qwen3_4b.transformer.model.", "text_encoders.llm.model.", "text_encoder.model.",
        "language_model.model.", "model.", "text_encoder.", "",
    ),
    "vae": ("first_stage_model.", "vae.", ""),
    "siglip": ("siglip.vision_model.", "siglip.", "model.vision_model.", "vision_model.", ""),
    "controlnet": ("model.diffusion_model.", "diffusion_model.", "controlnet.", ""),
}  # fmt: skip


@dataclass(frozen=True)
class Rule:
    """canonical <-> foreign, both whole names with `{word}` holes."""

    canonical: str
    foreign: str

    @cached_property
    def _patterns(self) -> tuple[re.Pattern[str], re.Pattern[str]]:
        return _compile(self.canonical), _compile(self.foreign)

    def to_foreign(self, name: str) -> str:
        match = self._patterns[0].fullmatch(name)
        return self.foreign.format(**match.groupdict()) if match else name

    def to_canonical(self, name: str) -> str:
        match = self._patterns[1].fullmatch(name)
        return self.canonical.format(**match.groupdict()) if match else name


def _compile(template: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", template)
    return re.compile("".join(f"(?P<{part}>.*)" if i % 2 else re.escape(part) for i, part in enumerate(parts)))


@dataclass(frozen=True)
class NameMap:
    """fused: a foreign tensor -> the canonical tensors whose rows it holds, in order."""

    rules: tuple[Rule, ...]
    fused: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def to_canonical(self, name: str) -> tuple[str, ...]:
        """The canonical names of a foreign tensor: one, or several if it is fused."""
        for foreign, parts in self.fused:
            match = _compile(foreign).fullmatch(name)
            if match:
                return tuple(part.format(**match.groupdict()) for part in parts)
        for rule in self.rules:
            name = rule.to_canonical(name)
        return (name,)

    def to_foreign(self, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """Canonical names -> {foreign name: the canonical tensors it is made of}, in the order of the input."""
        out: dict[str, tuple[str, ...]] = {}
        left = dict.fromkeys(names)
        for name in list(left):
            if name not in left:
                continue
            foreign, parts = self._fused_target(name, left) or (self._rename(name), (name,))
            out[foreign] = parts
            for part in parts:
                del left[part]
        return out

    def _rename(self, name: str) -> str:
        for rule in reversed(self.rules):
            name = rule.to_foreign(name)
        return name

    def _fused_target(self, name: str, available: dict[str, None]) -> tuple[str, tuple[str, ...]] | None:
        for foreign, parts in self.fused:
            # Any part may come first: safetensors files are sorted by name, and k comes before q.
            match = next(filter(None, (_compile(part).fullmatch(name) for part in parts)), None)
            if match:
                members = tuple(part.format(**match.groupdict()) for part in parts)
                if all(member in available for member in members):
                    return foreign.format(**match.groupdict()), members
        return None


# Lumina2's names, used by ComfyUI, by GGUF files and by every single-file release; in a ControlNet's blocks, too.
NATIVE_TRANSFORMER = NameMap(
    rules=(
        Rule("all_x_embedder.2-1.{rest}", "x_embedder.{rest}"),
        Rule("all_final_layer.2-1.{rest}", "final_layer.{rest}"),
        Rule("{block}.attention.to_out.0.{rest}", "{block}.attention.out.{rest}"),
        Rule("{block}.attention.norm_q.{rest}", "{block}.attention.q_norm.{rest}"),
        Rule("{block}.attention.norm_k.{rest}", "{block}.attention.k_norm.{rest}"),
    ),
    fused=(
        (
            "{block}.attention.qkv.{rest}",
            ("{block}.attention.to_q.{rest}", "{block}.attention.to_k.{rest}", "{block}.attention.to_v.{rest}"),
        ),
    ),
)

LLAMA_CPP_QWEN3 = NameMap(
    rules=(
        Rule("embed_tokens.{rest}", "token_embd.{rest}"),
        Rule("norm.{rest}", "output_norm.{rest}"),
        Rule("layers.{n}.input_layernorm.{rest}", "blk.{n}.attn_norm.{rest}"),
        Rule("layers.{n}.post_attention_layernorm.{rest}", "blk.{n}.ffn_norm.{rest}"),
        Rule("layers.{n}.self_attn.q_norm.{rest}", "blk.{n}.attn_q_norm.{rest}"),
        Rule("layers.{n}.self_attn.k_norm.{rest}", "blk.{n}.attn_k_norm.{rest}"),
        Rule("layers.{n}.self_attn.q_proj.{rest}", "blk.{n}.attn_q.{rest}"),
        Rule("layers.{n}.self_attn.k_proj.{rest}", "blk.{n}.attn_k.{rest}"),
        Rule("layers.{n}.self_attn.v_proj.{rest}", "blk.{n}.attn_v.{rest}"),
        Rule("layers.{n}.self_attn.o_proj.{rest}", "blk.{n}.attn_output.{rest}"),
        Rule("layers.{n}.mlp.{part}_proj.{rest}", "blk.{n}.ffn_{part}.{rest}"),
    ),
)


def flux_vae(levels: int = 4) -> NameMap:
    """The original autoencoder counts decoder levels from the small end, diffusers from the large one."""
    rules = [
        Rule("{side}coder.conv_norm_out.{rest}", "{side}coder.norm_out.{rest}"),
        Rule("{side}.mid_block.resnets.0.{rest}", "{side}.mid.block_1.{rest}"),
        Rule("{side}.mid_block.resnets.1.{rest}", "{side}.mid.block_2.{rest}"),
        Rule("{side}.mid_block.attentions.0.group_norm.{rest}", "{side}.mid.attn_1.norm.{rest}"),
        Rule("{side}.mid_block.attentions.0.to_out.0.{rest}", "{side}.mid.attn_1.proj_out.{rest}"),
    ]
    rules += [
        Rule(f"{{side}}.mid_block.attentions.0.to_{x}.{{rest}}", f"{{side}}.mid.attn_1.{x}.{{rest}}") for x in "qkv"
    ]
    for i in range(levels):
        up, down = f"decoder.up_blocks.{i}", f"encoder.down_blocks.{i}"
        old_up, old_down = f"decoder.up.{levels - 1 - i}", f"encoder.down.{i}"
        rules += [
            Rule(f"{up}.resnets.{{rest}}", f"{old_up}.block.{{rest}}"),
            Rule(f"{up}.upsamplers.0.conv.{{rest}}", f"{old_up}.upsample.conv.{{rest}}"),
            Rule(f"{down}.resnets.{{rest}}", f"{old_down}.block.{{rest}}"),
            Rule(f"{down}.downsamplers.0.conv.{{rest}}", f"{old_down}.downsample.conv.{{rest}}"),
        ]
    rules.append(Rule("{block}.conv_shortcut.{rest}", "{block}.nin_shortcut.{rest}"))
    return NameMap(tuple(rules))


# diffusers' own spelling of the attention before 0.19; only ever read.
OLD_DIFFUSERS_VAE = NameMap(
    tuple(
        Rule(f"{{block}}.attentions.0.{new}.{{rest}}", f"{{block}}.attentions.0.{old}.{{rest}}")
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn"))
    )
)


def natural_order(name: str) -> list[tuple[int, int, str]]:
    """Sort key under which layers.2 comes before layers.10."""
    return [(0, int(part), "") if part.isdecimal() and len(part) < 10 else (1, 0, part) for part in name.split(".")]
