"""Which tensor gets which format: against llama.cpp's rules for Qwen3 and the community's for this transformer, written
down here once more, and against the sizes of the files that people download. And the user's own rules."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
from make_checkpoint import component_shapes
from planned_files import CONFIGS, n_bytes, planned, true_model

from zimage_lite.checkpoint.checkpoint import open_checkpoint
from zimage_lite.checkpoint.opening import open_tensor_file
from zimage_lite.cli import run
from zimage_lite.config import OmniConfig
from zimage_lite.convert import catalog
from zimage_lite.convert import recipe as recipes
from zimage_lite.convert.output_file import OutTensor, metadata, output_tensors
from zimage_lite.convert.recipe import GROUPS, KEEP, overridden, target, targets
from zimage_lite.errors import UserError
from zimage_lite.quant.formats import FORMATS

NAMES = {component: tuple(component_shapes(config)) for component, config in CONFIGS.items()}
NAMES["transformer"] = tuple(component_shapes(OmniConfig()))  # all that any transformer has
GGUF = tuple(name for name in targets() if target(name).container == "gguf")


def kinds(tensors: dict[str, OutTensor]) -> dict[str, str]:
    return {name: tensor.format.name for name, tensor in tensors.items()}


# --- The files themselves


def test_these_formats_can_be_written() -> None:
    quants = "q8_0 q6_k q5_k_m q5_k_s q5_1 q5_0 q4_k_m q4_k_s q4_1 q4_0 iq4_nl iq4_xs q3_k_l q3_k_m q3_k_s q2_k"
    assert set(GGUF) == {"bf16", "f16", *quants.split()}
    others = {"int8", "int4", "fp8", "nf4", "bnb-int8", "qint8", "qint4", "qfloat8"}
    assert set(targets()) == set(GGUF) | others


def test_what_is_computed_in_8_bits() -> None:
    """By hand: all integers and nf4 are re-encoded, and nothing multiplies 8-bit floats."""
    said = {name: catalog.computed(target(name)) for name in targets()}
    assert {name for name in said if said[name] == "multiplied as it is"} == {"int8"}
    reencoded = {"int4", "nf4", "bnb-int8", "qint8", "qint4", *GGUF} - {"bf16", "f16"}
    assert {name for name in said if "re-encoded" in said[name]} == reencoded
    assert {name for name in said if said[name].startswith("unpacked")} == {"fp8", "qfloat8"}


@pytest.mark.parametrize("name", targets())
def test_recipe_names_what_there_is(name: str) -> None:
    found = target(name)
    assert found.name == name and found.summary and found.read_by
    assert found.container in ("gguf", "comfy", "bnb", "quanto")
    assert found.text_encoder_to in (*targets(), KEEP)
    for part in found.recipes.values():
        formats = {part.format, *(rule.to for rule in part.rules)}
        for row in map(FORMATS.__getitem__, formats):
            assert row.writable and row.container in (found.container, "any")
        groups = {*part.keep, *(rule.tensors for rule in part.rules)}
        assert all(group in GROUPS or "." in group for group in groups), groups  # or a pattern of names
        for component, names in NAMES.items():
            if part is found.recipes[component]:
                unused = [rule for rule in part._all_rules if not any(rule.fits((name,), 36) for name in names)]
                assert not [rule for rule in unused if rule.layers is None], unused
        assert {rule.layers for rule in part.rules} <= {None, *recipes._LAYERS}
    raw = json.loads((Path(recipes.__file__).parent / "recipes" / f"{name}.json").read_text(encoding="utf-8"))
    known = {"summary", "container", "file_type", "read_by", "text_encoder_to", *CONFIGS}
    assert set(raw) <= known  # a misspelled key would be ignored


@pytest.mark.parametrize("name", GGUF)
def test_file_type_is_llama_cpps(name: str) -> None:
    assert target(name).file_type == gguf.LlamaFileType["MOSTLY_" + name.upper()].value
    info = metadata(true_model("text_encoder"), target(name))
    assert info["general.file_type"] == target(name).file_type
    assert (info["general.architecture"], info["qwen3.block_count"]) == ("qwen3", 36)


# --- The transformer: formats.md, section 2.4 (a)

MIXES = {  # format, that of qkv, that of w2
    "q8_0": ("q8_0", "q8_0", "q8_0"), "q6_k": ("q6_k", "q6_k", "q6_k"), "q5_k_m": ("q5_k", "q6_k", "q6_k"),
    "q5_k_s": ("q5_k", "q5_k", "q5_k"), "q5_1": ("q5_1", "q5_1", "q5_1"), "q5_0": ("q5_0", "q5_0", "q5_1"),
    "q4_k_m": ("q4_k", "q5_k", "q6_k"), "q4_k_s": ("q4_k", "q4_k", "q5_k"), "q4_1": ("q4_1", "q4_1", "q4_1"),
    "q4_0": ("q4_0", "q4_0", "q4_1"), "iq4_nl": ("iq4_nl",) * 3, "iq4_xs": ("iq4_xs",) * 3,
    "q3_k_l": ("q3_k", "q4_k", "q5_k"), "q3_k_m": ("q3_k", "q4_k", "q4_k"), "q3_k_s": ("q3_k", "q3_k", "q3_k"),
    "q2_k": ("q2_k", "q2_k", "q2_k"),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXES)
def test_transformer_is_the_communitys(name: str) -> None:
    main, qkv, w2 = MIXES[name]
    tensors = planned(name)
    assert len(tensors) == 453
    for tensor in tensors.values():
        if len(tensor.shape) == 1 or tensor.name in ("x_pad_token", "cap_pad_token"):
            wanted = "f32"
        elif not tensor.name.startswith("layers."):
            wanted = "bf16"
        else:
            wanted = qkv if ".qkv." in tensor.name else w2 if ".w2." in tensor.name else main
        assert tensor.format.name == wanted, tensor.name
    counts = Counter(kinds(tensors).values())
    assert (counts["f32"], counts["bf16"]) == (245, 28)  # as in the files of others


# As shown where they are offered (jayn7/Z-Image-Turbo-GGUF, Qwen/Qwen3-4B-GGUF), in GB.
@pytest.mark.parametrize(
    ("name", "size"),
    [("q8_0", 7.22), ("q6_k", 5.91), ("q5_k_m", 5.52), ("q5_k_s", 5.19), ("q4_k_m", 4.98), ("q4_k_s", 4.66),
     ("q3_k_m", 4.12), ("q3_k_s", 3.79), ("bf16", 12.31)],
)  # fmt: skip
def test_transformer_has_the_published_size(name: str, size: float) -> None:
    assert round(n_bytes(planned(name)) / 1e9, 2) == size


@pytest.mark.parametrize("name", ["int8", "fp8", "bnb-int8", "qint8", "qfloat8", "int4", "nf4", "qint4"])
def test_other_programs_formats_keep_what_they_keep(name: str) -> None:
    """8 bits are enough for the refiners; with 4, they stay 16-bit, or get 8 where the container has them.

    Of quanto's files diffusers tells what was kept by the last part of a name, so there refiners get 4 bits, and
    t_embedder's first matrix is quantized like the adaLN matrices, which are also called 0."""
    refiners = {"int4": "int8", "nf4": "bf16"}.get(name, name)
    for tensor in planned(name).values():
        vector = len([size for size in tensor.shape if size > 1]) < 2
        if target(name).container == "quanto" and tensor.name == "t_embedder.mlp.0.weight":
            wanted = name
        elif vector or not tensor.name.startswith(("layers.", "noise_refiner.", "context_refiner.")):
            wanted = "bf16"
        elif not tensor.name.startswith("layers."):
            wanted = refiners
        else:
            wanted = "int8" if name == "int4" and ".adaLN_" in tensor.name else name
        assert tensor.format.name == wanted, tensor.name


# --- The text encoder: llama.cpp's llama_tensor_get_type, for Qwen3 with 36 layers and 4 queries for each key


def llama_cpp_type(ftype: str, kind: str, i: int) -> str:
    """kind: of a matrix in blk.i"""
    n = 36
    more_bits = i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2
    special: dict[tuple[str, str], str | None] = {
        ("q2_k", "attn_v"): "q4_k", ("q2_k", "ffn_down"): "q3_k", ("q2_k", "attn_output"): "q3_k",
        ("q3_k_m", "attn_v"): "q5_k" if i < 2 else "q4_k", ("q3_k_m", "attn_output"): "q4_k",
        ("q3_k_m", "ffn_down"): "q5_k" if i < n // 16 else "q4_k",
        ("q3_k_l", "attn_v"): "q5_k", ("q3_k_l", "ffn_down"): "q5_k", ("q3_k_l", "attn_output"): "q5_k",
        ("q4_k_s", "attn_v"): "q5_k" if i < 4 else None, ("q4_k_s", "ffn_down"): "q5_k" if i < n // 8 else None,
        ("q4_k_m", "attn_v"): "q6_k" if more_bits else None, ("q4_k_m", "ffn_down"): "q6_k" if more_bits else None,
        ("q5_k_m", "attn_v"): "q6_k" if more_bits else None, ("q5_k_m", "ffn_down"): "q6_k" if more_bits else None,
        ("iq4_nl", "attn_v"): "q5_k", ("iq4_nl", "ffn_down"): "q5_k" if i < n // 8 else None,
        ("iq4_xs", "attn_v"): "q5_k", ("iq4_xs", "ffn_down"): "q5_k" if i < n // 8 else None,
    }  # fmt: skip
    main = ftype if ftype[-2:] not in ("_s", "_m", "_l") else ftype[:-2]
    return special.get((ftype, kind)) or main


@pytest.mark.parametrize("name", MIXES)
def test_text_encoder_is_llama_cpps(name: str) -> None:
    tensors = kinds(planned(name, "text_encoder"))
    assert len(tensors) == 398
    assert tensors["token_embd.weight"] == ("q8_0" if name == "q8_0" else "q6_k")
    for tensor, kind in tensors.items():
        if tensor.endswith("norm.weight"):
            assert kind == "f32"
        elif tensor != "token_embd.weight":
            _, layer, part, _ = tensor.split(".")
            assert kind == llama_cpp_type(name, part, int(layer)), tensor


def test_q4_k_m_counts_as_the_file_of_others() -> None:
    tensors = kinds(planned("q4_k_m", "text_encoder"))
    assert Counter(tensors.values()) == {"f32": 145, "q4_k": 216, "q6_k": 37}
    more = Counter(name.split(".")[-2] for name, kind in tensors.items() if kind == "q6_k")
    assert more == {"attn_v": 18, "ffn_down": 18, "token_embd": 1}


@pytest.mark.parametrize(("name", "size"), [("q4_k_m", 2.497), ("q5_k_m", 2.890), ("q6_k", 3.306), ("q8_0", 4.280)])
def test_text_encoder_has_the_published_size(name: str, size: float) -> None:
    tokenizer = 0.006  # GB of tokens and merges in the header
    assert n_bytes(planned(name, "text_encoder")) / 1e9 + tokenizer == pytest.approx(size, abs=0.001)


def test_short_rows_get_what_llama_cpp_gives_them() -> None:
    recipe = target("q4_k_m").recipe("text_encoder")
    wanted = {256: "q4_k", 128: "q5_0", 2528: "q5_0", 100: "bf16"}
    name = "layers.0.self_attn.q_proj.weight"
    for columns, kind in wanted.items():
        assert recipe.format_of((name,), (64, columns), FORMATS["bf16"], 36).name == kind
        kept = recipe.format_of((name,), (64, columns), FORMATS["f16"], 36).name  # 16-bit stays what it was
        assert kept == ("f16" if kind == "bf16" else kind)
    simple = target("q8_0").recipe("text_encoder")
    assert simple.format_of((name,), (64, 100), FORMATS["f16"], 36).name == "f16"


# --- The user's own rules


def changed(to: str, keep: tuple[str, ...] = (), tensors: tuple[str, ...] = ()) -> dict[str, str]:
    """Output name -> format, of what is not as the recipe says."""
    chosen = overridden(target(to), keep, tensors)
    found = {tensor.name: tensor.format.name for tensor in output_tensors(true_model("transformer"), chosen)}
    before = kinds(planned(to))
    return {name: kind for name, kind in found.items() if kind != before[name]}


LAYER_29 = {f"layers.29.{part}.weight" for part in ("attention.qkv", "attention.out", "adaLN_modulation.0")}
LAYER_29 |= {f"layers.29.feed_forward.w{i}.weight" for i in (1, 2, 3)}


@pytest.mark.parametrize(
    ("keep", "tensors", "wanted"),
    [
        (("layers.29.*",), (), dict.fromkeys(LAYER_29, "bf16")),
        (("layers.29.attention.qkv.weight",), (), {"layers.29.attention.qkv.weight": "bf16"}),  # as in the output
        (("layers.29.attention.to_k.weight",), (), {"layers.29.attention.qkv.weight": "bf16"}),  # as in diffusers
        ((), ("*.3.*.w2.*=q8_0",), {"layers.3.feed_forward.w2.weight": "q8_0"}),
        ((), ("*.3.*.w2.*=Q8_0",), {"layers.3.feed_forward.w2.weight": "q8_0"}),
        ((), ("noise_refiner.0.*.w1.weight=q6_k",), {"noise_refiner.0.feed_forward.w1.weight": "q6_k"}),
        ((), ("cap_embedder.1.*=q8_0",), {"cap_embedder.1.weight": "q8_0"}),  # the bias stays a vector
        ((), ("layers.0.attention_norm1.weight=q8_0",), {}),
        # --keep comes before --tensor, and of several --tensor the first that fits
        (("layers.7.*",), ("layers.7.*.w2.*=q2_k", "layers.8.*.w2.*=q2_k"), None),
        ((), ("layers.9.*.w2.*=q2_k", "layers.9.*=q8_0"), None),
    ],
)  # fmt: skip
def test_overrides(keep: tuple[str, ...], tensors: tuple[str, ...], wanted: dict[str, str] | None) -> None:
    found = changed("q4_k_m", keep, tensors)
    if wanted is not None:
        assert found == wanted
    elif keep:
        assert found.pop("layers.8.feed_forward.w2.weight") == "q2_k"
        assert len(found) == 6 and set(found.values()) == {"bf16"}
    else:
        assert found.pop("layers.9.feed_forward.w2.weight") == "q2_k"
        assert len(found) == 5 and set(found.values()) == {"q8_0"}


def test_overrides_reach_the_file(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    args = ["--component", "transformer", "--keep", "layers.1.*", "--tensor", "*.attention.out.*=q4_1"]
    assert run(["quantize", str(tiny), "--to", "q8_0", "-o", str(out), *args]) == 0
    for name, entry in open_tensor_file(out).entries.items():
        if name.startswith("layers.1.") and len(entry.shape) == 2:
            assert entry.kind == "bf16", name
        elif name.endswith(".attention.out.weight"):
            assert entry.kind == "q4_1", name
    said = open_checkpoint(out).metadata["zimage_lite.recipe"]
    assert said == "q8_0 layers.1.*=keep *.attention.out.*=q4_1"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--keep", "layers.99.*"), ("'layers.99.*' fits no tensor", "layers.")),
        (("--tensor", "*.w9.*=q8_0"), ("'*.w9.*' fits no tensor",)),
        (("--tensor", "*.w2.*=q9_k"), ("--tensor *.w2.*=q9_k", "'q9_k'", "q6_k")),
        (("--tensor", "*.w2.*=int8"), ("'int8'", "not a format for q8_0", "q6_k")),
        (("--tensor", "*.w2.*=iq3_xxs"), ("'iq3_xxs'",)),  # can be read only
        (("--tensor", "*.w2.*=fp8"), ("'fp8'",)),
        (("--tensor", "*.w2.*"), ("'*.w2.*'", "PATTERN=FORMAT")),
        (("--tensor", "=q8_0"), ("'=q8_0'", "PATTERN=FORMAT")),
        (("--tensor", "*.w2.*="), ("''",)),
    ],
)
def test_overrides_that_cannot_be(tiny: Path, tmp_path: Path, refused: Callable[..., str], args, words) -> None:
    line = refused("quantize", tiny, "--to", "q8_0", "-o", tmp_path / "out", *args)
    assert all(word in line for word in words), line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("to", "wanted", "allowed"), [("int8", "int4", True), ("int4", "q8_0", False),
    ("nf4", "bf16", True), ("nf4", "bnb-int8", False), ("qint4", "qint8", False), ("q4_0", "f32", True)])  # fmt: skip
def test_a_container_holds_its_own_formats(to: str, wanted: str, allowed: bool) -> None:
    if allowed:
        assert set(changed(to, tensors=(f"*.w2.*={wanted}",)).values()) == {wanted}
        return
    with pytest.raises(UserError, match=f"not a format for {to}: got '{wanted}'"):
        overridden(target(to), tensors=(f"*.w2.*={wanted}",))
