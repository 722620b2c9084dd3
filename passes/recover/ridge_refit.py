"""Fit the layers that are left anew, so that they compute what they computed in the whole model."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import ClassVar, Final, Literal

import torch
from torch import Tensor

from graphopt.errors import PipelineError
from graphopt.graph import Graph
from graphopt.moments import Moments
from graphopt.passes.recover.consumers import Layer, calibration_inputs, paired, relative, rework, sharing, tolerance
from graphopt.passes.recover.least_squares import Regression
from graphopt.pipeline import Context, Pass, PassResult, Preserves, Reference, register
from graphopt.report.wording import bytes_of
from graphopt.sweep import Sweep

LEAST_GAIN: Final = 0.999
"""What of a layer's error may be left at most for a fit to be worth it; less is gained when the pass is repeated."""

_CHUNK: Final = 1 << 22
"""How many entries of A are there at a time."""


@register
@dataclass(frozen=True)
class RidgeRefit(Pass):
    """Fit weight and bias of every layer whose input changed, by least squares, to what it computed before pruning.

    Layer by layer, in the order of the graph: with A the input that the layer has now, after those before it were
    fitted, ``(samples, inputs · taps)``, Y what the layer computed in the whole model, in the outputs that are left,
    and W what is left of the weight it had there::

        W', b' = argmin ‖A W'ᵀ + b' − Y‖² + λ ‖W' − W‖²,        λ = ridge · mean diag(Aᶜᵀ Aᶜ)

    with Aᶜ the centred A. The bias is not shrunk, so it goes out by centring; what is left are normal equations,
    ``(Aᶜᵀ Aᶜ + λ I) (W' − W)ᵀ = Aᶜᵀ Rᶜ`` with R = Y − A Wᵀ, solved in float64 from moments that are accumulated batch
    by batch. Rows of A are a linear layer's inputs, or the patches under a kernel with the zeros of the padding among
    them, so that the fit of a convolution is one of least squares, too. Groups are fitted one by one.

    A removed input that is a linear combination of inputs that are left is made up for exactly, as λ goes to zero. The
    error on the calibration data, measured after rounding to the model's precision, never grows: a layer for which it
    would stays as it is. Labels are not needed. How much the data say is the samples' number against the layer's width:
    with less samples than inputs the ridge decides, which shrinks towards the weights there are.

    Args:
        ridge: λ in units of the mean of the inputs' summed squared deviations.
        towards: what the ridge shrinks to: the "kept" weights, or "zero".
        samples: how many samples a layer takes at most, for each of its inputs (times taps), chosen at random over all
            batches; 0 for all.
        width: the largest number of inputs (times taps) of a layer that is fitted; its Gram matrix takes 8 · width²
            bytes.
        bias: give a bias to layers that have none.

    Source: the layer-by-layer least squares on propagated inputs of He et al. 2017, arXiv:1707.06168, section 3.2
    (there without a ridge); Hoerl and Kennard 1970, Technometrics 12(1), for the ridge.
    """

    name: ClassVar[str] = "ridge-refit"
    preserves: ClassVar[Preserves] = Preserves.APPROXIMATE

    ridge: float = 3e-2
    towards: Literal["kept", "zero"] = "kept"
    samples: int = 64
    width: int = 16384
    bias: bool = True

    def __post_init__(self) -> None:
        if not self.ridge >= 0 or self.samples < 0 or self.width < 1:
            raise PipelineError(
                f"{self.name} needs ridge and samples of 0 or above and a width of 1 or above; found "
                f"ridge={self.ridge}, samples={self.samples}, width={self.width}"
            )

    def run(self, graph: Graph, context: Context) -> PassResult:
        if context.reference is None:
            context.note("nothing was removed since the last lossless change, so there is nothing to fit anew")
            return PassResult(graph)
        inputs = calibration_inputs(self.name, graph, context)
        layers, refused = paired(graph, context.reference)
        for each in refused:
            context.skipped(each.tensor, each.reason)
        reference = context.reference
        chosen: dict[str, Layer] = {}
        for name, layer in layers.items():
            reason = self._refusal(graph, layer)
            if reason is None:
                chosen[name] = layer
            else:
                context.skipped(layer.name, reason)

        def change(layer: Layer, left: Sweep, right: Sweep) -> dict[str, Tensor] | None:
            return self._refitted(layer, left, right, graph, self._pull(layer, graph, reference), context)

        rework(graph, context.reference, inputs, chosen, change, give_bias=self.bias)
        return PassResult(graph)

    def _refusal(self, graph: Graph, layer: Layer) -> str | None:
        for name in filter(None, (layer.pruned.weight, layer.pruned.bias)):
            found = sharing(graph, name)
            if found is not None:
                return f"{found}: what fits one would not fit the others"
        width = layer.pruned.matrix(graph.tensor(layer.pruned.weight)).shape[2]
        if width > self.width:
            memory = bytes_of(8 * layer.pruned.groups * width**2)
            return (
                f"its Gram matrix of {width:,} inputs would take {memory}; at most {self.width:,} are asked for (width)"
            )
        return None

    def _refitted(
        self, layer: Layer, left: Sweep, right: Sweep, graph: Graph, pull: Tensor, context: Context
    ) -> dict[str, Tensor] | None:
        """Return new weight and bias; None where the layer stays as it is."""
        before = _Error.of(layer, left, right, graph, None)
        weight = graph.tensor(layer.pruned.weight)
        if before.relative <= tolerance(weight.dtype):
            context.skipped(
                layer.name,
                f"its output is what it was (error {before.relative:.1g} of its spread)",
                error=before.relative,
            )
            return None
        regression = self._regression(layer, left, right, graph, before.count, context.seed)
        new = self._solved(regression, layer, graph, pull)
        for name, tensor in new.items():
            right.replace(name, tensor)
        after = _Error.of(layer, left, right, graph, before.expected)
        width = pull.shape[1]
        facts = {
            "samples": regression.count,
            "inputs": width,
            "error_before": before.relative,
            "error_after": after.relative,
        }
        numbers = f"error {before.relative:.3g} -> {after.relative:.3g} of the output's spread"
        if not after.relative < LEAST_GAIN * before.relative:
            for name in new:
                right.replace(name, graph.tensor(name))
            context.skipped(layer.name, f"no fit is noticeably better: {numbers}, ridge {self.ridge:g}", **facts)
            return None
        what = f"{numbers}, from {regression.count:,} samples of {width:,} inputs"
        if regression.count <= width:
            what += "; with as few samples as that the ridge decides"
        context.applied(layer.name, what, **facts)
        return new

    def _regression(self, layer: Layer, left: Sweep, right: Sweep, graph: Graph, count: int, seed: int) -> Regression:
        """Accumulate the moments of inputs, and of inputs and what is missing of the outputs."""
        pruned = layer.pruned
        weight = graph.tensor(pruned.weight)
        groups, outputs, width = pruned.matrix(weight).shape
        intercept = pruned.bias is not None
        found = Regression.empty(width, outputs, groups, weight.device, intercept=intercept)
        generator = torch.Generator().manual_seed(seed)
        share = min(1.0, self.samples * width / count) if self.samples else 1.0
        missing = (gap for _, gap in layer.residuals(left, right, graph))
        for x, gap in zip(right.values(pruned.input), missing, strict=True):
            patches = pruned.patches(x)
            rows = torch.arange(len(gap))
            if share < 1:
                rows = torch.randperm(len(gap), generator=generator)[: ceil(share * len(gap))].sort().values
            for part in rows.to(x.device).split(max(1, _CHUNK // (groups * width))):
                found.add(pruned.take(patches, part), pruned.grouped(gap[part]))
        return found

    def _solved(self, regression: Regression, layer: Layer, graph: Graph, pull: Tensor) -> dict[str, Tensor]:
        pruned = layer.pruned
        old = graph.tensor(pruned.weight).detach()
        matrix = pruned.matrix(old).double()
        change = regression.change(self.ridge, pull)
        found = {pruned.weight: pruned.stored(matrix + change.mT, old)}
        if pruned.bias is not None:
            bias = graph.tensor(pruned.bias).detach()
            # The weight's rounding moves the mean, and the bias makes up for that, too.
            moved = pruned.matrix(found[pruned.weight]).double() - matrix
            found[pruned.bias] = (bias.double() + regression.constant(moved.mT).flatten()).to(bias.dtype)
        return found

    def _pull(self, layer: Layer, graph: Graph, reference: Reference) -> Tensor:
        """Return how far the weights are from where the ridge draws them, ``(g, inputs, outputs)``."""
        pruned = layer.pruned
        matrix = pruned.matrix(graph.tensor(pruned.weight).detach()).double()
        if self.towards == "kept":
            matrix = matrix - pruned.matrix(layer.weight_before(reference)).double()
        return matrix.mT


@dataclass(frozen=True)
class _Error:
    """How far a layer's output is from what it was, in units of its spread."""

    relative: float
    count: int
    expected: Moments

    @classmethod
    def of(cls, layer: Layer, left: Sweep, right: Sweep, graph: Graph, expected: Moments | None) -> _Error:
        """Measure; ``expected`` are the moments of the output as it was, where they are known already."""
        size, device = layer.width, graph.tensor(layer.pruned.weight).device
        missing = Moments(size, device)
        seen = expected or Moments(size, device)
        for y, gap in layer.residuals(left, right, graph):
            missing.add(gap)
            if expected is None:
                seen.add(y)
        return cls(relative(missing.mean_square, seen), missing.count, seen)
