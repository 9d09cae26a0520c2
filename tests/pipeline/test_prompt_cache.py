"""Kept prompt embeddings: the same bits, no encoder, and never in the way of a picture."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from zimage_lite import load
from zimage_lite.checkpoint.checkpoint import open_checkpoint
from zimage_lite.checkpoint.stored import StoredTensor
from zimage_lite.cli import run
from zimage_lite.config import GenerateOptions
from zimage_lite.convert.recipe import target
from zimage_lite.convert.synthetic import TRUE_CONFIGS, synthetic_checkpoint
from zimage_lite.errors import UserError
from zimage_lite.pipeline.prompt_cache import PromptCache, cache_folder, embedding_key

pytestmark = pytest.mark.slow  # pictures, drawn again and again

KEY, OTHER = "0" * 64, "1" * 64
CAT = GenerateOptions("a cat", 64, 64, steps=2)
DOG = GenerateOptions("a dog", 64, 64, steps=2)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where embeddings are kept in this test."""
    monkeypatch.setenv("ZIMAGE_LITE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "prompts"


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def draw(model: Path, *requests: GenerateOptions, **options: bool) -> list[Tensor]:
    return load(model, device="cpu", **options).generate(requests)


def no_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any look at the encoder's weights fails from here on."""
    read = StoredTensor.read

    def refuse(self: StoredTensor, *args, **kwargs):
        assert "text_encoder" not in str(self.parts[""].path), f"{self.name} was read"
        return read(self, *args, **kwargs)

    monkeypatch.setattr(StoredTensor, "read", refuse)


# --- What is kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_bits_come_back(tmp_path: Path, dtype: torch.dtype) -> None:
    embedding = torch.randn(7, 24).to(dtype)
    PromptCache(tmp_path).put(KEY, embedding)
    found = PromptCache(tmp_path).get(KEY)
    assert found is not None and found.dtype == dtype and torch.equal(found, embedding)
    assert PromptCache(tmp_path).get(OTHER) is None
    (file,) = tmp_path.iterdir()  # any other program reads it too
    assert torch.equal(safetensors.torch.load_file(file)["embedding"], embedding)


def test_a_kept_prompt_draws_the_same_without_the_encoder(
    model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = draw(model, CAT, cache=False)
    assert not folder.exists()
    first = draw(model, CAT)
    assert len(list(folder.iterdir())) == 1
    no_encoder(monkeypatch)
    pipeline = load(model, device="cpu")
    again = pipeline.generate([CAT])
    assert torch.equal(without[0], first[0]) and torch.equal(first[0], again[0])
    assert "text_encoder" not in pipeline.plans
    with pytest.raises(AssertionError, match="was read"):
        draw(model, DOG)
    with pytest.raises(AssertionError, match="was read"):
        draw(model, CAT, cache=False)


def test_only_unknown_prompts_are_encoded(model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(model, CAT)
    pipeline, encoded = load(model, device="cpu"), []
    encode = pipeline.encoding.run
    monkeypatch.setattr(pipeline.encoding, "run", lambda texts, *rest: encoded.extend(texts) or encode(texts, *rest))
    both = pipeline.generate([CAT, DOG, CAT])
    assert encoded == ["a dog"]
    assert torch.equal(both[0], both[2])
    alone = draw(model, DOG, CAT, cache=False)
    assert torch.equal(both[0], alone[1])


def test_the_encoder_is_not_planned_for(model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(model, CAT)
    pipeline = load(model, device="cpu")

    def refuse(*args: object) -> None:
        raise AssertionError("planned")

    monkeypatch.setattr("zimage_lite.pipeline.encode.ways_to_encode", refuse)
    pipeline.generate([CAT])
    with pytest.raises(AssertionError, match="planned"):
        pipeline.generate([DOG])


def test_prompts_are_private(model: Path, folder: Path) -> None:
    draw(model, GenerateOptions("a secret zebra", 64, 64, steps=1))
    (file,) = folder.iterdir()
    assert len(file.stem) == 64 and b"zebra" not in file.read_bytes()
    if os.name == "posix":
        assert folder.stat().st_mode & 0o077 == 0


# --- What makes another key


def test_keys_tell_apart_all_that_matters(model: Path, tiny: Path) -> None:
    encoder = open_checkpoint(model / "text_encoder")
    (file,) = (model / "text_encoder").glob("*.safetensors")

    def keys() -> list[str]:
        again = open_checkpoint(model / "text_encoder")
        return [
            embedding_key([1, 2], again, torch.float32),
            embedding_key([1, 2], again, torch.bfloat16),
            embedding_key([12], again, torch.float32),
        ]

    before = keys()
    assert len(set(before)) == 3 and keys() == before and before[0] == embedding_key([1, 2], encoder, torch.float32)
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    assert not set(keys()) & set(before)
    config = json.loads((model / "text_encoder" / "config.json").read_text())
    stamped = keys()
    (model / "text_encoder" / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    assert not set(keys()) & set(stamped)


def test_synthetic_encoders_have_stable_keys() -> None:
    def key(to: str) -> str:
        return embedding_key([1], synthetic_checkpoint(TRUE_CONFIGS[1], target(to)), torch.float32)

    assert key("q8_0") == key("q8_0") != key("q4_k_m")


def test_a_changed_encoder_is_asked_again(model: Path, folder: Path) -> None:
    first = draw(model, CAT)
    (file,) = (model / "text_encoder").glob("*.safetensors")
    weights = safetensors.torch.load_file(file)
    safetensors.torch.save_file({name: weight * 1.5 for name, weight in weights.items()}, file)
    second = draw(model, CAT)
    assert not torch.equal(first[0], second[0])
    assert torch.equal(second[0], draw(model, CAT, cache=False)[0])


def test_nothing_is_kept_of_an_encoder_that_changes(model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = load(model, device="cpu")
    encode = pipeline.encoding.run
    (file,) = (model / "text_encoder").glob("*.safetensors")

    def change(*args):
        os.utime(file, ns=(0, 0))
        return encode(*args)

    monkeypatch.setattr(pipeline.encoding, "run", change)
    with pytest.raises(UserError, match="changed while it was read"):
        pipeline.generate([CAT])
    assert not folder.exists()


# --- What may go wrong


def cut(data: bytes) -> bytes:
    return data[:-1]


def empty(data: bytes) -> bytes:
    return b""


def flip(data: bytes) -> bytes:
    return data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]


def foreign(data: bytes) -> bytes:
    return safetensors.torch.save({"embedding": torch.zeros(3, 24)})


def junk(data: bytes) -> bytes:
    return b"\x80" * len(data)


@pytest.mark.parametrize("damage", [cut, empty, flip, foreign, junk])
def test_damaged_files_are_computed_anew(model: Path, folder: Path, damage) -> None:
    first = draw(model, CAT)
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert PromptCache(folder).get(file.stem) is None and not file.exists()
    file.write_bytes(damage(whole))
    assert torch.equal(draw(model, CAT)[0], first[0])
    assert file.read_bytes() == whole


def test_another_prompts_file_is_no_answer(tmp_path: Path) -> None:
    cache = PromptCache(tmp_path)
    cache.put(KEY, torch.ones(2, 4))
    (tmp_path / f"{KEY}.safetensors").rename(tmp_path / f"{OTHER}.safetensors")
    assert cache.get(OTHER) is None and cache.get(KEY) is None


def test_where_nothing_can_be_written_nothing_is_kept(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    cache = PromptCache(tmp_path / "file" / "prompts")
    cache.put(KEY, torch.ones(2, 4))
    assert cache.get(KEY) is None


def test_a_full_disk_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 100, 0))
    cache = PromptCache(tmp_path)
    cache.put(KEY, torch.ones(2, 4))
    assert cache.get(KEY) is None and list(tmp_path.iterdir()) == []


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    keys = [f"{i:064x}" for i in range(4)]
    one = torch.zeros(16, 64)
    PromptCache(tmp_path).put(keys[0], one)
    (file,) = tmp_path.iterdir()
    cache = PromptCache(tmp_path, limit_bytes=int(3.3 * file.stat().st_size))
    (tmp_path / "notes.txt").write_text("x" * 100_000)  # not ours, so it neither counts nor goes
    (tmp_path / "model.safetensors").write_bytes(b"x" * 100_000)
    leftover = tmp_path / f".{keys[3]}.safetensors.1.partial"  # of a run that was killed
    leftover.write_bytes(b"x")
    for path in (leftover, file):
        os.utime(path, ns=(0, 0))
    for key in keys[1:3]:
        time.sleep(0.01)  # so that the clock of the file system moves
        cache.put(key, one)
    time.sleep(0.01)
    assert cache.get(keys[0]) is not None  # used again
    cache.put(keys[3], one)
    assert [cache.get(key) is not None for key in keys] == [True, False, True, True]
    assert {path.name for path in tmp_path.iterdir()} == {
        "notes.txt", "model.safetensors", *(f"{keys[i]}.safetensors" for i in (0, 2, 3))
    }  # fmt: skip


PUT_AND_GET = """
import sys
from pathlib import Path
import torch
from zimage_lite.pipeline.prompt_cache import PromptCache
cache = PromptCache(Path(sys.argv[1]), limit_bytes=40_000)
for i in range(60):
    key = f"{(i + int(sys.argv[2])) % 7:064x}"
    put = torch.full((8, 64), float(int(key, 16)))
    cache.put(key, put)
    found = cache.get(key)
    assert found is None or torch.equal(found, put)
"""


def test_thousands_of_prompts_do_not_count_the_folder_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts, iterdir = [], Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda path: (counts.append(path), iterdir(path))[1])
    cache, sizes = PromptCache(tmp_path, limit_bytes=300_000), []
    for i in range(200):
        cache.put(f"{i:064x}", torch.zeros(1, 16))
        sizes.append(sum(path.stat().st_size for path in iterdir(tmp_path)))
    assert 290_000 < max(sizes) <= 300_000
    assert len(counts) < 40  # 1/16 of the limit is 4 files


@pytest.mark.slow  # several processes
def test_processes_share_a_folder(tmp_path: Path) -> None:
    """Two of them write, read and remove the same few files."""
    both = [subprocess.Popen([sys.executable, "-c", PUT_AND_GET, str(tmp_path), seed]) for seed in ("0", "3")]
    assert [process.wait() for process in both] == [0, 0]
    left = list(tmp_path.iterdir())
    assert left and all(path.name.endswith(".safetensors") for path in left)


# --- Switches


def test_the_variable_names_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for off in ("0", "off", "OFF"):
        monkeypatch.setenv("ZIMAGE_LITE_CACHE", off)
        assert cache_folder() is None
    monkeypatch.setenv("ZIMAGE_LITE_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path / "prompts"
    monkeypatch.delenv("ZIMAGE_LITE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = cache_folder()
    assert found is not None and found.name == "prompts" and "zimage-lite" in found.parts
    if sys.platform == "linux":
        assert found == tmp_path / "zimage-lite" / "prompts"


def test_no_cache_flag(model: Path, folder: Path, tmp_path: Path) -> None:
    out = ("-o", str(tmp_path / "x.png"), "--width", "64", "--height", "64", "--steps", "1", "--device", "cpu")
    assert run(["generate", "a cat", "--model", str(model), *out, "--no-cache"]) == 0
    assert not folder.exists()
    assert run(["generate", "a cat", "--model", str(model), *out]) == 0
    assert len(list(folder.iterdir())) == 1


@pytest.mark.full_size  # a process that loads everything
def test_another_process_finds_it(model: Path, folder: Path) -> None:
    """Keys must not hang on anything that a process has to itself, such as Python's hash seeds."""
    draw(model, CAT)
    (file,) = folder.iterdir()
    script = (
        "import sys, torch\nfrom pathlib import Path\nfrom zimage_lite import load\n"
        "p = load(sys.argv[1], device='cpu')\nprint(p.encoding._key('a cat'))"
    )
    done = subprocess.run([sys.executable, "-c", script, str(model)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [file.stem]
