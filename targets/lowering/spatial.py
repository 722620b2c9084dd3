"""Translate operators on images: pooling, resizing, padding, sampling, and unfolding into columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from graphopt.dialects.aten.common import overloads
from graphopt.errors import UnsupportedOperatorError
from graphopt.graph import Call, TensorSpec
from graphopt.targets.lowering.elementwise import Translation
from graphopt.targets.lowering.emitter import Emitter, Value, out_spec

aten = torch.ops.aten


def _each(value: Any, count: int) -> list[int]:
    values = [int(v) for v in value] if isinstance(value, list | tuple) else [int(value)]
    return values * count if len(values) == 1 else values


def _batched(spec: TensorSpec, spatial: int) -> TensorSpec:
    """Return the type with a batch dimension, which torch lets a caller leave out."""
    if len(spec.shape) == spatial + 2:
        return spec
    return TensorSpec((1, *spec.shape), spec.dtype, (False, *spec.dynamic))


def _static_space(call: Call, spatial: int, what: str) -> list[int]:
    spec = call.spec("self")
    if any(spec.dynamic[-spatial:]):
        raise UnsupportedOperatorError(f"{what} of an image whose size depends on the inputs")
    return list(spec.shape[-spatial:])


# -- pooling --


class _Window:
    """Read where a pooling's windows lie.

    ``ends`` is what is appended to each dimension so that the last window fits: the padding, and in ceil mode whatever
    the last window sticks out. Windows are then counted as in floor mode, which all runtimes agree on.
    """

    def __init__(self, call: Call, spatial: int) -> None:
        self.kernel = _each(call["kernel_size"], spatial)
        self.stride = _each(call["stride"], spatial) if call["stride"] else list(self.kernel)
        self.padding = _each(call["padding"], spatial)
        self.dilation = _each(call["dilation"], spatial) if call.has("dilation") else [1] * spatial
        spec = call.spec("self")
        result = out_spec(call.node)
        self.ends = list(self.padding)
        if call["ceil_mode"]:
            for i in range(spatial):
                if spec.dynamic[i - spatial]:
                    raise UnsupportedOperatorError("pooling in ceil mode of an image whose size depends on the inputs")
                reach = (result.shape[i - spatial] - 1) * self.stride[i] + self.dilation[i] * (self.kernel[i] - 1) + 1
                self.ends[i] = max(reach - spec.shape[i - spatial] - self.padding[i], 0)

    @property
    def overhangs(self) -> bool:
        """Say whether a window reaches beyond the padding."""
        return any(end > pad for end, pad in zip(self.ends, self.padding, strict=True))


def _max_pool(spatial: int, *, positions: bool = False) -> Translation:
    def translate(e: Emitter, call: Call) -> Value:
        window = _Window(call, spatial)
        spec = call.spec("self")
        batched = len(spec.shape) == spatial + 2
        x = e[call["self"]] if batched else e.unsqueeze(e[call["self"]], 0)
        found = e(
            "MaxPool",
            x,
            kernel_shape=window.kernel,
            strides=window.stride,
            dilations=window.dilation,
            pads=[*window.padding, *window.ends],
        )
        found = found if batched else e.squeeze(found, 0)
        return (found, None) if positions else found

    return translate


def _average_pool(spatial: int) -> Translation:
    def translate(e: Emitter, call: Call) -> Value:
        window = _Window(call, spatial)
        spec = call.spec("self")
        if call.has("divisor_override") and call["divisor_override"] is not None:
            raise UnsupportedOperatorError("average pooling with a divisor of its own")
        batched = len(spec.shape) == spatial + 2
        x = e[call["self"]] if batched else e.unsqueeze(e[call["self"]], 0)
        begins, ends, counted = window.padding, window.ends, bool(call["count_include_pad"])
        if counted and window.overhangs:
            # The padding counts and the overhang does not: the padding is written out, the overhang stays implicit.
            x = _padded(e, x, spatial + 2, begins, begins, spec.dtype)
            ends = [end - pad for end, pad in zip(ends, begins, strict=True)]
            begins, counted = [0] * spatial, False
        found = e(
            "AveragePool",
            x,
            kernel_shape=window.kernel,
            strides=window.stride,
            pads=[*begins, *ends],
            count_include_pad=int(counted and any(begins)),
        )
        return found if batched else e.squeeze(found, 0)

    return translate


def _padded(e: Emitter, x: str, rank: int, begins: Sequence[int], ends: Sequence[int], dtype: torch.dtype) -> str:
    lead = [0] * (rank - len(begins))
    return e("Pad", x, e.constant([*lead, *begins, *lead, *ends], torch.int64), e.zero(dtype))


def _adaptive_average_pool(spatial: int) -> Translation:
    """Translate to a global pooling, to windows of one size, or, where bins are uneven, to products with averages."""

    def translate(e: Emitter, call: Call) -> Value:
        spec = call.spec("self")
        batched = len(spec.shape) == spatial + 2
        x = e[call["self"]] if batched else e.unsqueeze(e[call["self"]], 0)
        size = _each(call["output_size"], spatial)
        if all(n == 1 for n in size):
            found = e("GlobalAveragePool", x)
        else:
            space = _static_space(call, spatial, "adaptive pooling")
            if space == size:
                found = x
            elif all(n % m == 0 for n, m in zip(space, size, strict=True)):
                kernel = [n // m for n, m in zip(space, size, strict=True)]
                found = e("AveragePool", x, kernel_shape=kernel, strides=kernel)
            else:
                found = _uneven_average(e, x, space, size, spec.dtype)
        return found if batched else e.squeeze(found, 0)

    return translate


def _uneven_average(e: Emitter, x: str, space: list[int], size: list[int], dtype: torch.dtype) -> str:
    rank = len(space) + 2
    for i, (old, new) in enumerate(zip(space, size, strict=True)):
        matrix = torch.zeros(old, new, dtype=torch.float64)
        for bin_ in range(new):
            start, end = bin_ * old // new, -(-(bin_ + 1) * old // new)
            matrix[start:end, bin_] = 1 / (end - start)
        order = list(range(rank))
        order[i + 2], order[-1] = order[-1], order[i + 2]
        x = e.transpose(e("MatMul", e.transpose(x, order), e.constant(matrix.to(dtype))), order)
    return x


def _adaptive_max_pool(spatial: int) -> Translation:
    def translate(e: Emitter, call: Call) -> Value:
        size = _each(call["output_size"], spatial)
        space = _static_space(call, spatial, "adaptive pooling")
        if any(n % m for n, m in zip(space, size, strict=True)):
            raise UnsupportedOperatorError(
                f"adaptive maximum pooling of {space} to {size}, with windows of several sizes"
            )
        kernel = [n // m for n, m in zip(space, size, strict=True)]
        batched = len(call.spec("self").shape) == spatial + 2
        x = e[call["self"]] if batched else e.unsqueeze(e[call["self"]], 0)
        found = e("MaxPool", x, kernel_shape=kernel, strides=kernel)
        return [found if batched else e.squeeze(found, 0), None]

    return translate


# -- resizing --


def _resize(mode: str, spatial: int, *, exact: bool = False, antialias: bool = False) -> Translation:
    """Translate a resizing; where factors are given they set the sampling grid, else the two sizes do."""

    def translate(e: Emitter, call: Call) -> Value:
        dims = list(range(2, 2 + spatial))
        attributes: dict[str, Any] = {"mode": mode, "axes": dims}
        if mode == "nearest":
            attributes["coordinate_transformation_mode"] = "half_pixel" if exact else "asymmetric"
            attributes["nearest_mode"] = "round_prefer_ceil" if exact else "floor"
        else:
            aligned = bool(call["align_corners"])
            attributes["coordinate_transformation_mode"] = "align_corners" if aligned else "half_pixel"
        if mode == "cubic":
            attributes["cubic_coeff_a"] = -0.5 if antialias else -0.75
        if antialias:
            attributes |= {"antialias": 1, "exclude_outside": 1}
        x = e[call["input" if call.has("input") else "self"]]
        factors, size = _factors(call, spatial), call["output_size"]
        if factors is not None:
            return e("Resize", x, None, e.constant(factors, torch.float32), **attributes)
        return e("Resize", x, None, None, e.sizes(list(size)), **attributes)

    return translate


def _factors(call: Call, spatial: int) -> list[float] | None:
    if call.has("scale_factors"):
        given = call["scale_factors"]
    else:
        names = ("scales",) if spatial == 1 else ("scales_d", "scales_h", "scales_w")[-spatial:]
        given = [call[name] for name in names]
    if given is None or any(not isinstance(f, int | float) for f in given):
        return None
    return [float(f) for f in given]


# -- padding --

_PADDING = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def _pad(e: Emitter, call: Call) -> Value:
    """Translate padding, which torch lists from the last dimension to the first, begin and end of each together."""
    spec = call.spec("self")
    mode = call["mode"] if call.has("mode") else "constant"
    return _pad_as(e, call, mode, call["value"] or 0 if mode == "constant" else 0, len(spec.shape))


def _pad_as(e: Emitter, call: Call, mode: str, value: Any, rank: int) -> Value:
    spec, pads = call.spec("self"), list(call["pad" if call.has("pad") else "padding"])
    begins: list[Any] = [0] * rank
    ends: list[Any] = [0] * rank
    for i in range(len(pads) // 2):
        begins[rank - 1 - i], ends[rank - 1 - i] = pads[2 * i], pads[2 * i + 1]
    amounts = [*begins, *ends]
    if all(isinstance(n, int) and n == 0 for n in amounts):
        return e[call["self"]]
    boolean = spec.dtype is torch.bool
    x = e.cast(e[call["self"]], torch.bool, torch.int32) if boolean else e[call["self"]]
    inner = torch.int32 if boolean else spec.dtype
    content = e.operand(value, inner) if mode == "constant" else None
    found = e("Pad", x, e.sizes(amounts), content, mode=_PADDING[mode])
    return e.cast(found, inner, spec.dtype)


def _pad_in_mode(mode: str) -> Translation:
    return lambda e, call: _pad_as(e, call, mode, 0, len(call.spec("self").shape))


# -- sampling --


def _grid_sample(e: Emitter, call: Call) -> Value:
    spatial = len(call.spec("input").shape) - 2
    mode = ("linear", "nearest", "cubic")[call["interpolation_mode"]]
    if mode == "cubic" and spatial != 2:
        raise UnsupportedOperatorError("cubic sampling of a volume")
    return e(
        "GridSample",
        e[call["input"]],
        e[call["grid"]],
        mode=mode,
        padding_mode=("zeros", "border", "reflection")[call["padding_mode"]],
        align_corners=int(call["align_corners"]),
    )


# -- columns --


def _im2col(e: Emitter, call: Call) -> Value:
    """Cut an image into patches: ``(n, c, h, w) -> (n, c kh kw, patches)``.

    ONNX has no such operator: rows, then columns, are gathered at constant positions.
    """
    spec = call.spec("self")
    height, width = _static_space(call, 2, "unfolding")
    batched = _batched(spec, 2)
    kernel, dilation, padding, stride = (
        _each(call[name], 2) for name in ("kernel_size", "dilation", "padding", "stride")
    )
    x = e[call["self"]] if batched is spec else e.unsqueeze(e[call["self"]], 0)
    if any(padding):
        x = _padded(e, x, 4, padding, padding, spec.dtype)
    places = []
    for size, k, d, p, s in zip((height, width), kernel, dilation, padding, stride, strict=True):
        count = (size + 2 * p - d * (k - 1) - 1) // s + 1
        places.append(torch.arange(k)[:, None] * d + torch.arange(count) * s)
    rows = e("Gather", x, e.constant(places[0]), axis=2)
    cells = e("Gather", rows, e.constant(places[1]), axis=4)
    moved = e.transpose(cells, [0, 1, 2, 4, 3, 5])
    result = out_spec(call.node)
    lead = [] if batched is not spec else [-1 if result.dynamic[0] else result.shape[0]]
    return e("Reshape", moved, e.constant([*lead, *result.shape[-2:]], torch.int64))


def _col2im(e: Emitter, call: Call) -> Value:
    """Add patches back into an image: ``(n, c kh kw, patches) -> (n, c, h, w)``."""
    spec = call.spec("self")
    x = e[call["self"]] if len(spec.shape) == 3 else e.unsqueeze(e[call["self"]], 0)
    kernel, dilation, padding, stride = (
        _each(call[name], 2) for name in ("kernel_size", "dilation", "padding", "stride")
    )
    found = e(
        "Col2Im",
        x,
        e.sizes(list(call["output_size"])),
        e.constant(kernel, torch.int64),
        dilations=dilation,
        pads=padding * 2,
        strides=stride,
    )
    return found if len(spec.shape) == 3 else e.squeeze(found, 0)


def _table(translation: Translation, *names: str) -> dict[Any, Translation]:
    return dict.fromkeys(overloads(*names), translation)


TRANSLATIONS: dict[Any, Translation] = {
    **_table(_max_pool(1), "max_pool1d.default"),
    **_table(_max_pool(2), "max_pool2d.default"),
    **_table(_max_pool(3), "max_pool3d.default"),
    **_table(_max_pool(2, positions=True), "max_pool2d_with_indices.default"),
    **_table(_average_pool(1), "avg_pool1d.default"),
    **_table(_average_pool(2), "avg_pool2d.default"),
    **_table(_average_pool(3), "avg_pool3d.default"),
    **_table(_adaptive_average_pool(1), "adaptive_avg_pool1d.default"),
    **_table(_adaptive_average_pool(2), "adaptive_avg_pool2d.default", "_adaptive_avg_pool2d.default"),
    **_table(_adaptive_average_pool(3), "adaptive_avg_pool3d.default", "_adaptive_avg_pool3d.default"),
    **_table(_adaptive_max_pool(1), "adaptive_max_pool1d.default"),
    **_table(_adaptive_max_pool(2), "adaptive_max_pool2d.default"),
    **_table(_adaptive_max_pool(3), "adaptive_max_pool3d.default"),
    **_table(_resize("nearest", 1), "upsample_nearest1d.vec", "upsample_nearest1d.default"),
    **_table(_resize("nearest", 2), "upsample_nearest2d.vec", "upsample_nearest2d.default"),
    **_table(_resize("nearest", 3), "upsample_nearest3d.vec", "upsample_nearest3d.default"),
    **_table(_resize("nearest", 1, exact=True), "_upsample_nearest_exact1d.vec", "_upsample_nearest_exact1d.default"),
    **_table(_resize("nearest", 2, exact=True), "_upsample_nearest_exact2d.vec", "_upsample_nearest_exact2d.default"),
    **_table(_resize("linear", 1), "upsample_linear1d.vec", "upsample_linear1d.default"),
    **_table(_resize("linear", 2), "upsample_bilinear2d.vec", "upsample_bilinear2d.default"),
    **_table(_resize("linear", 3), "upsample_trilinear3d.vec", "upsample_trilinear3d.default"),
    **_table(_resize("cubic", 2), "upsample_bicubic2d.vec", "upsample_bicubic2d.default"),
    **_table(_resize("linear", 2, antialias=True), "_upsample_bilinear2d_aa.vec", "_upsample_bilinear2d_aa.default"),
    **_table(_resize("cubic", 2, antialias=True), "_upsample_bicubic2d_aa.vec", "_upsample_bicubic2d_aa.default"),
    **_table(_pad, "pad.default", "constant_pad_nd.default"),
    **_table(
        _pad_in_mode("reflect"), "reflection_pad1d.default", "reflection_pad2d.default", "reflection_pad3d.default"
    ),
    **_table(_pad_in_mode("replicate"), "replication_pad1d.default", "replication_pad2d.default"),
    **_table(_pad_in_mode("replicate"), "replication_pad3d.default"),
    **_table(_grid_sample, "grid_sampler.default", "grid_sampler_2d.default", "grid_sampler_3d.default"),
    **_table(_im2col, "im2col.default"),
    **_table(_col2im, "col2im.default"),
}
