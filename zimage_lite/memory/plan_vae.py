"""How the autoencoder runs in the memory there is. Pure, as `plan.py`: the twin of `model/banded.py`, in bytes.

From the fastest to the smallest: the whole image at once; bands of rows with every map stored; with the maps at full
size computed again instead, first the input of that level, then the hidden maps; with all maps in the host's memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

from ..config import VAE_FACTOR, VAE_QUERIES, VaeConfig

_BAND_ROWS = (64, 32, 16)
_SMALL_SHARE, _SMALL_BYTES = 500, 2**15  # vectors that norms are made of: 1/500 of the whole, and so many bytes more
_SMALL_BAND_ROWS = (8, 4, 2)  # of the smallest way only: half of what they compute is computed twice

# What a convolution takes inside, of the sizes of its input and its output.
Inside = Callable[[int, int], int]


def gpu_convolution(given: int, made: int) -> int:
    """Assumed."""
    return given + made


def cpu_convolution(given: int, made: int) -> int:
    """oneDNN copies the input into a layout of its own, or the output out of it: one of them at a time. Measured in
    float32 (Zen 3) from 8 to 512 channels, 3x3 and 1x1. Not counted: its copy of the weights (9 MB where 512 channels
    become 512, far from the largest maps), and that 3 channels made are padded to 8."""
    return max(given, made)


def no_convolution(_given: int, _made: int) -> int:
    """For counts of tensors, which do not see inside."""
    return 0


@dataclass(frozen=True)
class VaePlan:
    """rows_per_band: 0 is the whole image at once. spilled: the maps lie in the host's memory.

    What it takes: bytes held; flops of convolutions and linears, and of the attention in the middle, with all that is
    computed again; traffic_bytes between the device and the host; reads: how often a convolution runs on a band.
    """

    rows_per_band: int = 0
    store_input: bool = True
    store_hidden: bool = True
    spilled: bool = False
    device_bytes: int = 0
    host_bytes: int = 0
    flops: float = 0.0
    attention_flops: float = 0.0
    traffic_bytes: float = 0.0
    reads: int = 0

    def __str__(self) -> str:
        if not self.rows_per_band:
            return "whole image"
        how = "maps in RAM" if self.spilled else "" if self.store_input else "input computed again"
        how = "all computed again" if not self.store_hidden else how
        return f"bands of {self.rows_per_band} rows" + (f", {how}" if how else "")


_ALL_STORED, _NO_INPUT = VaePlan(), VaePlan(store_input=False)
_NEITHER = VaePlan(store_input=False, store_hidden=False)


@lru_cache(maxsize=32)
def decode_ways(config: VaeConfig, height: int, width: int, item_bytes: int, gpu: bool) -> tuple[VaePlan, ...]:
    """All of them, the whole image first. gpu: or else the CPU; beside a GPU, maps may lie in the host's memory."""
    ways = _ways(height, gpu, _ALL_STORED, _NO_INPUT, _NEITHER)
    inside = gpu_convolution if gpu else cpu_convolution
    return tuple(predict_decode(config, height, width, item_bytes, way, inside) for way in ways)


@lru_cache(maxsize=32)
def encode_ways(config: VaeConfig, height: int, width: int, item_bytes: int, gpu: bool) -> tuple[VaePlan, ...]:
    """The same for a picture that is encoded. Where its input alone is not stored, the second block at full size holds
    as much all the same."""
    ways = _ways(height, gpu, _ALL_STORED, _NEITHER)
    inside = gpu_convolution if gpu else cpu_convolution
    return tuple(predict_encode(config, height, width, item_bytes, way, inside) for way in ways)


def _ways(height: int, gpu: bool, *kinds: VaePlan) -> list[VaePlan]:
    """kinds: of bands, the smallest last."""
    bands = [replace(kind, rows_per_band=rows) for kind in kinds for rows in _BAND_ROWS]
    bands += [replace(kinds[-1], rows_per_band=rows) for rows in _SMALL_BAND_ROWS]
    bands += [VaePlan(rows, spilled=True) for rows in _BAND_ROWS * gpu]
    return [VaePlan(), *(way for way in bands if way.rows_per_band < height)]


def predict_decode(
    config: VaeConfig, height: int, width: int, item_bytes: int, way: VaePlan, inside: Inside = gpu_convolution
) -> VaePlan:
    """The same way with its bytes."""
    walk = _Walk(way.rows_per_band or height, item_bytes, way.spilled, inside)
    walk.decode(config, height // VAE_FACTOR, width // VAE_FACTOR, way)
    plan = walk.took(way)
    if way.rows_per_band:
        return plan
    return replace(plan, device_bytes=_whole_decode_bytes(config, height, width, item_bytes, inside) + _SMALL_BYTES)


def predict_encode(
    config: VaeConfig, height: int, width: int, item_bytes: int, way: VaePlan, inside: Inside = gpu_convolution
) -> VaePlan:
    """The picture included, in the dtype that computes."""
    walk = _Walk(way.rows_per_band or height, item_bytes, way.spilled, inside)
    walk.encode(config, height, width, way)
    plan = walk.took(way)
    if way.rows_per_band:
        return plan
    return replace(plan, device_bytes=_whole_encode_bytes(config, height, width, item_bytes, inside) + _SMALL_BYTES)


def _whole_encode_bytes(c: VaeConfig, height: int, width: int, item: int, inside: Inside) -> int:
    """The most that `Encoder.forward` holds, and the picture."""
    image, before = c.in_channels * height * width * item, c.block_out_channels[0] * height * width * item
    found = [before + inside(image, before)]
    for level, channels in enumerate(c.block_out_channels):
        if level > 0:  # halving: its input, the same with a row and a column more, and its output
            padded = before // (height * width) * (height + 1) * (width + 1)
            found.append(before + padded + before // 4 + inside(padded, before // 4))
            height, width, before = height // 2, width // 2, before // 4
        after = channels * height * width * item
        found += [_res_block(n, after, inside) for n in (before, after)[: c.layers_per_block]]
        before = after
    found.append(_middle(c.block_out_channels[-1], height * width, item))
    return image + max(found)


def _whole_decode_bytes(c: VaeConfig, height: int, width: int, item: int, inside: Inside) -> int:
    """The most that `Decoder.forward` holds, and the latent."""
    widths = list(reversed(c.block_out_channels))
    pixels = height * width // 4 ** (len(widths) - 1)
    latent = 4 * c.latent_channels * pixels
    found, before = [_middle(widths[0], pixels, item)], widths[0]
    for level, channels in enumerate(widths):
        n, m = (wide * pixels * item for wide in (before, channels))
        found += [_res_block(n, m, inside), _res_block(m, m, inside)]
        before = channels
        if level < len(widths) - 1:
            coarse, pixels = channels * pixels * item, 4 * pixels
            found.append(9 * coarse + inside(4 * coarse, 4 * coarse))
    last, image = before * pixels * item, c.in_channels * pixels * item
    return latent + max(*found, 2 * last + image + inside(last, image))


def _res_block(n: int, m: int, inside: Inside) -> int:
    """From a map of n bytes to one of m. It holds its input to its end; what is live at each convolution: that, the
    hidden map, its normed input, its output, and what it takes inside."""
    shortcut = n + 2 * m + inside(n, m) if n != m else 0
    return max(2 * n + m + inside(n, m), n + 3 * m + inside(m, m), shortcut)


def _middle(channels: int, pixels: int, item: int) -> int:
    """Its input and that of the attention, and what that takes."""
    return 2 * channels * pixels * item + _attending(channels, pixels, item)


def _attending(channels: int, pixels: int, item: int) -> int:
    """Beside the input of the attention: the normed input, keys, values and output, and some queries at a time with
    their scores."""
    some = min(VAE_QUERIES, pixels)
    return 4 * channels * pixels * item + 5 * some * channels * item + some * pixels * 8


@dataclass(slots=True)
class _Rows:
    """A map that is stored ("map") or computed: "norm", "conv", "double", "add"."""

    kind: str
    channels: int
    height: int
    width: int
    sources: tuple[_Rows, ...] = ()
    kernel: int = 1
    stride: int = 1

    def values(self, rows: int) -> int:
        return self.channels * rows * self.width


def _map(channels: int, height: int, width: int) -> _Rows:
    return _Rows("map", channels, height, width)


def _norm(x: _Rows) -> _Rows:
    return _Rows("norm", x.channels, x.height, x.width, (x,))


def _conv(x: _Rows, channels: int, kernel: int = 3, stride: int = 1) -> _Rows:
    return _Rows("conv", channels, x.height // stride, x.width // stride, (x,), kernel, stride)


def _double(x: _Rows) -> _Rows:
    return _Rows("double", x.channels, 2 * x.height, 2 * x.width, (x,))


class _Walk:
    """Goes through the model as `Banded` does. most: the highest sum of the maps and of what a band takes. flops,
    traffic, reads: of all bands together; those at an edge count as if they were inside."""

    def __init__(self, band: int, item: int, spilled: bool, inside: Inside) -> None:
        self.band, self.item, self.spilled, self.inside = band, item, spilled, inside
        self.live = self.most = self.live_spilled = self.most_spilled = 0
        self.flops = self.attention_flops = self.traffic = 0.0
        self.reads = 0
        self.input: _Rows | None = None

    def took(self, way: VaePlan) -> VaePlan:
        return replace(
            way,
            device_bytes=self.most + self.most // _SMALL_SHARE + _SMALL_BYTES,
            host_bytes=self.most_spilled,
            flops=self.flops,
            attention_flops=self.attention_flops,
            traffic_bytes=self.traffic,
            reads=self.reads,
        )

    def decode(self, c: VaeConfig, height: int, width: int, way: VaePlan) -> None:
        widths = list(reversed(c.block_out_channels))
        x = self.mid_block(self.stored(_conv(self.given(c.latent_channels, height, width), widths[0])))
        for i, channels in enumerate(widths):
            last = i == len(widths) - 1
            for _ in range(c.layers_per_block + 1):
                x = self.res_block(x, channels, way.store_hidden or not last)
            if not last:
                finer = _conv(_double(x), channels)
                x = self.replaced(x, finer) if way.store_input or i < len(widths) - 2 else finer
        self.end(x, c.in_channels)

    def encode(self, c: VaeConfig, height: int, width: int, way: VaePlan) -> None:
        x = _conv(self.given(c.in_channels, height, width), c.block_out_channels[0])
        x = self.stored(x) if way.store_input else x
        for i, channels in enumerate(c.block_out_channels):
            for _ in range(c.layers_per_block):
                x = self.res_block(x, channels, way.store_hidden or i > 0)
            if i < len(c.block_out_channels) - 1:
                x = self.replaced(x, _conv(x, channels, stride=2))
        self.end(self.mid_block(x), 2 * c.latent_channels)

    def given(self, channels: int, height: int, width: int) -> _Rows:
        """The input, which the caller holds."""
        self.input = _map(channels, height, width)
        self.live += self.input.values(height) * self.item
        return self.input

    def res_block(self, x: _Rows, channels: int, store_hidden: bool = True) -> _Rows:
        self.moments(x)
        hidden = _conv(_norm(x), channels)
        shortcut = x if x.channels == channels else _conv(x, channels, kernel=1)
        in_place = x.kind == "map" and shortcut is x and not store_hidden
        if not in_place:
            hidden = self.stored(hidden)
        self.moments(hidden)
        new = _conv(_norm(hidden), channels)
        out = self.stored(_Rows("add", new.channels, new.height, new.width, (new, shortcut)), in_place=True)
        if not in_place:
            self.free(x)
        return out

    def mid_block(self, x: _Rows) -> _Rows:
        x = self.res_block(x, x.channels)
        whole = x.values(x.height)
        normed = whole * (4 if self.item == 4 else 4 + self.item)
        attending = _attending(x.channels, x.height * x.width, self.item)
        self.peak(max(normed, attending) + whole * self.item * self.spilled)
        self.attention_flops += 4 * whole * x.height * x.width
        self.flops += 8 * whole * x.channels
        return self.res_block(x, x.channels)

    def end(self, x: _Rows, channels: int) -> None:
        out = _conv(_norm(x), channels)
        self.compute(out)
        whole = out.values(out.height) * self.item
        self.peak(max(self.read(out, self.band)[0] + whole, 2 * whole))

    def compute(self, x: _Rows) -> None:
        """Every band of it."""
        n_bands = -(-x.height // self.band)
        flops, values, reads = self.of_a_band(x, min(self.band, x.height))
        self.flops += n_bands * flops
        self.traffic += n_bands * values * self.item * self.spilled
        self.reads += n_bands * reads

    def of_a_band(self, x: _Rows, rows: int) -> tuple[float, int, int]:
        """-> flops, values read of stored maps, and convolutions."""
        rows = min(rows, x.height)
        if x.kind == "map":
            return 0.0, x.values(rows), 0
        wanted = rows
        if x.kind == "conv":
            wanted = (rows - 1) * x.stride + x.kernel
        elif x.kind == "double":
            wanted = rows // 2 + 1
        flops, values, reads = self.of_a_band(x.sources[0], wanted)
        if x.kind == "conv":
            return flops + 2 * x.kernel**2 * x.sources[0].channels * x.values(rows), values, reads + 1
        if x.kind == "add":
            more = self.of_a_band(x.sources[1], rows)
            return flops + more[0], values + more[1], reads + more[2]
        return flops, values, reads

    def stored(self, x: _Rows, in_place: bool = False) -> _Rows:
        most, band = self.read(x, self.band)
        waiting = x.values(min(max(self.band, 2), x.height)) * self.item if in_place and self.band < x.height else 0
        widened = band + x.values(min(self.band, x.height)) * 4 * (self.item < 4)
        most = max(most, widened) + waiting
        n_bytes = self.map_bytes(x)
        self.compute(x)
        self.traffic += n_bytes * self.spilled
        if not in_place:
            if self.band < x.height:
                self.hold(n_bytes)
            else:  # the only band is complete before its place is made
                self.peak(most)
                self.hold(n_bytes)
                most = band
        self.peak(most)
        return _map(x.channels, x.height, x.width)

    def replaced(self, x: _Rows, by: _Rows) -> _Rows:
        new = self.stored(by)
        self.free(x)
        return new

    def moments(self, x: _Rows) -> None:
        if x.kind != "map":
            self.compute(x)
            most, band = self.read(x, self.band)
            self.peak(max(most, band + x.values(min(self.band, x.height)) * 4 * (self.item < 4)))

    def hold(self, n_bytes: int) -> None:
        if self.spilled:
            self.live_spilled += n_bytes
            self.most_spilled = max(self.most_spilled, self.live_spilled)
        else:
            self.live += n_bytes
            self.peak(0)

    def free(self, x: _Rows) -> None:
        """Or the map that it is computed from."""
        while x.kind != "map":
            x = x.sources[0]
        if x is not self.input:
            self.hold(-self.map_bytes(x))

    def map_bytes(self, x: _Rows) -> int:
        """With its statistics, two float32 for each channel and band, and those of the map whose place it took."""
        return x.values(x.height) * self.item + 2 * x.channels * 8 * -(-x.height // self.band)

    def peak(self, n_bytes: int) -> None:
        self.most = max(self.most, self.live + n_bytes)

    def read(self, x: _Rows, rows: int) -> tuple[int, int]:
        """-> the most that reading so many rows takes, and what they take when they are there."""
        rows = min(rows, x.height)
        n_bytes = x.values(rows) * self.item
        if x.kind == "map":
            return (n_bytes, n_bytes) if self.spilled else (0, 0)
        if x.kind == "conv":
            return self.read_conv(x, rows, n_bytes)
        if x.kind == "double":
            most, source = self.read(x.sources[0], rows // 2 + 1)
            n_bytes = x.values(min(2 * (rows // 2 + 1), x.height)) * self.item
            return max(most, source + n_bytes), n_bytes
        most, source = self.read(x.sources[0], rows)
        if x.kind == "norm":
            wide = x.values(rows) * 4
            return max(most, source + wide, wide + n_bytes * (self.item < 4)), n_bytes
        shortcut = self.read(x.sources[1], rows)
        return max(most, source + max(shortcut)), source

    def read_conv(self, x: _Rows, rows: int, n_bytes: int) -> tuple[int, int]:
        """At an edge of the map the input is copied, to add a row of zeros."""
        source, wanted = x.sources[0], (rows - 1) * x.stride + x.kernel
        most, inner = self.read(source, wanted)
        if x.kernel == 1:
            given = source.values(wanted) * self.item
            return max(most, inner + n_bytes + self.inside(given, n_bytes)), n_bytes
        padded = source.values(wanted) * self.item
        edge = self.read(source, wanted - 1)[1] + padded
        inside = self.inside(padded, n_bytes)
        return max(most, edge, max(inner, padded) + n_bytes + inside), n_bytes
