"""What a file is, told by its tensor names and a few shapes: which part of Z-Image, under what prefix, or what else."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from ..errors import WrongModelError
from .names import PREFIXES

COMPONENTS = {
    "transformer": "Z-Image transformer",
    "text_encoder": "Qwen3 text encoder",
    "vae": "Flux VAE",
}
CONTROLNET = "controlnet"  # no part of a model, but opened, converted and streamed like one
VISION = "siglip"  # a part of models that see pictures, by diffusers' name
KINDS = {  # whatever a file may be
    **COMPONENTS,
    CONTROLNET: "Z-Image ControlNet",
    VISION: "SigLIP2 vision tower",
}
_EXPECTED = "a Z-Image transformer or ControlNet, a Qwen3 text encoder or a Flux VAE"

# A component is recognised when all names of one of its tuples are there.
_SIGNATURES = {
    "transformer": (
        ("cap_embedder.1.weight", "layers.0.attention.qkv.weight"),
        ("cap_embedder.1.weight", "layers.0.attention.to_q.weight"),
    ),
    "text_encoder": (
        ("embed_tokens.weight", "layers.0.self_attn.q_norm.weight"),
        ("token_embd.weight", "blk.0.attn_q_norm.weight"),
    ),
    "vae": (
        ("decoder.conv_in.weight", "decoder.mid.block_1.conv1.weight"),
        ("decoder.conv_in.weight", "decoder.mid_block.resnets.0.conv1.weight"),
    ),
    CONTROLNET: (
        ("control_all_x_embedder.2-1.weight", "control_layers.0.attention.qkv.weight"),
        ("control_all_x_embedder.2-1.weight", "control_layers.0.attention.to_q.weight"),
    ),
    VISION: (("embeddings.patch_embedding.bias", "encoder.layers.0.self_attn.out_proj.weight"),),
}

# Parts of the names that a LoRA and its kin have. They make a file an adapter only if no whole model is beside them.
_ADAPTERS = (
    "lora_A", "lora_B", "lora_down", "lora_up", "lora.down", "lora.up", "lokr_w", "hada_w", "dora_scale", ".alpha",
)  # fmt: skip

# Part of a name that no file of Z-Image has -> what has it. First hit wins, before any signature: a whole SDXL
# checkpoint has a VAE with the names of Flux's, and Gemma 3 has all the names of Qwen3.
_STRANGERS = {
    "controlnet_cond_embedding.": "a ControlNet for Stable Diffusion or SDXL",
    "input_hint_block.": "a ControlNet for Stable Diffusion or SDXL",
    "controlnet_x_embedder.": "a ControlNet for Flux or Qwen-Image",
    "controlnet_blocks.": "a ControlNet for another model",
    "double_blocks.": "a Flux transformer",
    "single_transformer_blocks.": "a Flux transformer",
    "joint_blocks.": "a Stable Diffusion 3 transformer",
    "txt_norm.weight": "a Qwen-Image transformer",
    "input_blocks.": "a Stable Diffusion or SDXL U-Net",
    "add_embedding.linear_1": "an SDXL U-Net",
    "down_blocks.0.attentions": "a Stable Diffusion U-Net",
    "cross_attn.norm_q": "a Wan transformer",
    "time_caption_embed.": "a Lumina-Image-2 transformer",
    "pre_feedforward_layernorm": "a Gemma text encoder",
    "post_ffw_norm": "a Gemma text encoder",
    "visual.blocks.": "a Qwen-VL model, which reads images",
}

# The same for files in which no signature was found.
_OTHERS = {
    "control_layers.": "a part of a Z-Image ControlNet",
    "SelfAttention": "a T5 text encoder",
    "text_model.encoder": "a CLIP text encoder",
    "v.blk.": "the part of a language model that reads images (mmproj)",
    "attn_q.bias": "a Qwen2 text encoder",
    "self_attn.q_proj.bias": "a Qwen2 text encoder",
    "self_attn.q_proj": "another language model",
    "blk.0.attn_q": "another language model",
}


def detect(names: Collection[str], where: str, component: str | None = None, architecture: str = "") -> tuple[str, str]:
    """-> (component, prefix): the one asked for if it is there, else the first. Raises WrongModelError that says what
    the file seems to be instead. architecture: what a GGUF file says that it is."""
    found = contents(names, where, architecture)
    if component is not None and component not in found:
        first = next(iter(found))
        raise WrongModelError(where, got=f"a {KINDS[first]}", expected=f"a {KINDS[component]}")
    chosen = component or next(iter(found))
    return chosen, found[chosen]


def contents(names: Collection[str], where: str, architecture: str = "") -> dict[str, str]:
    """Every component that the names make up -> its prefix; an all-in-one checkpoint has three. Raises
    WrongModelError if there is none."""
    said = f" (it says {architecture[:60]})" if architecture else ""
    whole = {name for name in names if not is_adapter(name)}
    _refuse(_STRANGERS, whole, where, said)
    found = {component: _prefix(component, names) for component in _SIGNATURES}
    known = {component: prefix for component, prefix in found.items() if prefix is not None}
    if known:
        return known
    if len(whole) < len(names):
        raise WrongModelError(f"{where}: this is a LoRA", expected=_EXPECTED)
    _refuse(_OTHERS, names, where, said)
    sample = ", ".join(name[:60] for name in sorted(names)[:3]) or "no tensors"
    raise WrongModelError(
        f"{where}: no model that is known here{said}", got=f"{len(names)} tensors ({sample})", expected=_EXPECTED
    )


def is_adapter(name: str) -> bool:
    """Whether a tensor belongs to a LoRA, not to a model."""
    return any(part in name for part in _ADAPTERS)


def said_of_unused(names: Collection[str]) -> str:
    """For people: what the tensors are that no model has a place for, the names of the first ones."""
    adapters = sum(map(is_adapter, names))
    others = [name[:60] for name in names if not is_adapter(name)]
    more = f" and {len(others) - 3} more" if len(others) > 3 else ""
    said = [f"an unmerged LoRA ({adapters} tensors)"] if adapters else []
    return ", ".join([*said, *others[:3]]) + more


def _prefix(component: str, names: Collection[str]) -> str | None:
    for prefix in PREFIXES[component]:
        if any(all(prefix + name in names for name in signature) for signature in _SIGNATURES[component]):
            return prefix
    return None


def _refuse(others: Mapping[str, str], names: Collection[str], where: str, said: str) -> None:
    for part, what in others.items():
        if any(part in name for name in names):
            raise WrongModelError(f"{where}: this is {what}{said}", expected=_EXPECTED)


# Beginnings of names that fine-tunes with another architecture have beside Z-Image's own.
_RELATIVES = {
    "dec_net.": "Zeta-Chroma or its like, a fine-tune of Z-Image that draws pixels, with a decoder of its own",
    "__x0__": "a fine-tune of Z-Image that answers with the picture itself, as Zeta-Chroma does",
    "__ming_image__": "Ming-Image, which shares Z-Image's transformer and no other part",
}


def refuse_relatives(shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raise for models that share Z-Image's names. shapes: canonical name -> shape."""
    dim = next(iter(shapes["cap_embedder.1.weight"]), 0)
    if dim == 2304 or "layers.0.adaLN_modulation.1.weight" in shapes:
        raise WrongModelError(
            f"{where}: this is a Lumina-Image-2 transformer", got=f"width {dim}", expected="Z-Image's 3840"
        )
    for beginning, what in _RELATIVES.items():
        if any(name.startswith(beginning) for name in shapes):
            raise WrongModelError(f"{where}: this is {what}", expected="Z-Image, which draws latents of Flux's VAE")
