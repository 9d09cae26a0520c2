"""What travels to another process."""

from __future__ import annotations

import pickle
from pathlib import Path

from served import png

from zimage_lite.config import GenerateOptions
from zimage_lite.workers.orders import DrawError, Order


def test_pictures_travel_once_and_keep_their_names(tmp_path: Path) -> None:
    path = tmp_path / "fox.png"
    path.write_bytes(png())
    requests = [GenerateOptions("x", image=str(path), mask="none", seed=seed) for seed in range(3)]
    order = Order("demo", requests).carried()
    assert [request.image for request in order.requests] == [path.read_bytes()] * 3
    assert [request.mask for request in order.requests] == ["none"] * 3
    assert [told["image"]["name"] for told in order.told] == ["fox.png"] * 3
    assert len(pickle.dumps(order)) < 2 * path.stat().st_size
    again = pickle.loads(pickle.dumps(order)).requests
    assert again[0].image is again[1].image  # one picture still, which is encoded once


def test_what_needs_no_picture_stays_as_it_is() -> None:
    request = GenerateOptions("x", latents="somewhere/x.safetensors")
    assert Order("demo", [request]).carried().requests == [request]


def test_errors_travel() -> None:
    error = pickle.loads(pickle.dumps(DrawError("too_large", "no room", "trace")))
    assert (error.code, error.message, error.detail) == ("too_large", "no room", "trace")
