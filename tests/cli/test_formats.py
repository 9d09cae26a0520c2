"""The verb formats: the list, and what each group of a format takes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from planned_files import n_bytes, planned

from zimage_lite.checkpoint.checkpoint import open_checkpoint
from zimage_lite.checkpoint.opening import open_tensor_file
from zimage_lite.cli import cli, run
from zimage_lite.convert import catalog
from zimage_lite.convert.quantize import quantize
from zimage_lite.convert.recipe import target, targets


def formats_json(*args: str) -> dict:
    done = CliRunner().invoke(cli, ["formats", *args, "--json"])
    assert done.exit_code == 0
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_list_of_formats(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {row["name"]: row for row in formats_json()["formats"]}
    assert set(rows) == set(targets())
    for name, row in rows.items():
        assert row["bytes"] == n_bytes(planned(name))
        assert row["bits_per_weight"] == pytest.approx(row["bytes"] * 8 / 6_154_908_736, rel=1e-4)
    assert run(["formats"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if line.startswith("q4_k_m ")]
    assert "4.98 GB" in line and "GGUF" in line and "ComfyUI-GGUF" in line


@pytest.mark.parametrize("name", ["q4_k_m", "int4", "nf4"])
def test_groups_of_a_format_add_up(name: str) -> None:
    for component, groups in formats_json(name)["groups"].items():
        everything = {group["name"]: group for group in groups}
        total = everything.pop("all")
        assert "other" not in everything
        for key in ("weights", "bytes"):
            assert total[key] == sum(group[key] for group in everything.values())
        assert total["bytes"] == n_bytes(planned(name, component))
        assert total["weights"] == sum(math.prod(t.shape) for t in planned(name, component).values())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["q4_k_m", "q2_k", "q4_0", "int8", "int4", "fp8", "nf4", "qint4", "bnb-int8"])
def test_sizes_are_those_of_written_files(name: str, tiny: Path, tmp_path: Path, monkeypatch) -> None:
    source = open_checkpoint(tiny / "transformer")
    monkeypatch.setattr(catalog, "_true_model", lambda component: source)
    costs = {cost.name: cost for cost in catalog.costs(target(name))}
    quantize(tiny, tmp_path / "out", name, component="transformer")
    written = open_tensor_file(tmp_path / "out").entries
    sizes = {tensor: entry.nbytes for tensor, entry in written.items() if not tensor.endswith(".comfy_quant")}
    assert costs["all"].bytes == sum(sizes.values())
    feed_forward = sum(size for tensor, size in sizes.items() if ".feed_forward.w2." in tensor and tensor[0] == "l")
    assert costs["w2"].bytes == feed_forward
    kept = {tensor for tensor, entry in written.items() if entry.kind in ("BF16", "bf16")}
    assert ("bf16" in costs["w2"].formats) == ("layers.0.feed_forward.w2.weight" in kept)


def test_unknown_format_is_refused(refused: Callable[..., str]) -> None:
    line = refused("formats", "q9_0")
    assert "'q9_0'" in line and all(name in line for name in targets())
