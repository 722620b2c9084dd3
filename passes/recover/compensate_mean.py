"""Put the mean of what removed inputs contributed into the bias."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from graphopt.graph import Graph
from graphopt.moments import Moments
from graphopt.passes.recover.consumers import Layer, calibration_inputs, paired, relative, rework, sharing, tolerance
from graphopt.pipeline import Context, Pass, PassResult, Preserves, register
from graphopt.sweep import Sweep


@register
@dataclass(frozen=True)
class CompensateMean(Pass):
    """Add to the bias of every layer that lost inputs the mean of what they contributed.

    With W the weight of a layer (linear, convolution, product with a parameter), x its input before pruning, R the
    inputs that were removed, the layer lacks ``c = W[:, R] x[R]`` in the outputs that are left. Among all constants,
    the mean of c, over samples and places, leaves the least mean squared error, which is the variance of c::

        bias += E[W[:, R] x[R]]  =  W[:, R] E[x[R]]         error before: E[c²], after: Var[c]

    The removal of a single input j of a linear layer so costs ``Var(x_j) · Σ_i W_ij²`` in all. A layer without a bias
    is given one, a new parameter; a norm that follows needs no care, for what is measured is the layer's own input.

    Of a convolution the mean is taken over all places of the output. Without zero padding, a removed channel that is
    constant is replaced exactly. With it, outputs at the border see fewer of the channel's values: no constant is right
    there and inside, and the site says so. The same holds for a transposed convolution, where kernels overlap.

    With ``propagate`` the layer is compared as it stands in the pruned model, on the inputs it has there, those of
    layers that were compensated before it: the bias makes the mean of its output that of the whole model.

    Statistics take one walk over the calibration batches, in float64; labels are not needed. Repeating the pass changes
    nothing.

    Args:
        propagate: measure on the inputs of the pruned model, layer by layer, instead of those before pruning.

    Source: An et al. 2024 (FLAP), arXiv:2312.11983, equation 5; the mean of a convolution's contribution is ours.
    """

    name: ClassVar[str] = "compensate-mean"
    preserves: ClassVar[Preserves] = Preserves.APPROXIMATE

    propagate: bool = True

    def run(self, graph: Graph, context: Context) -> PassResult:
        if context.reference is None:
            context.note("nothing was removed since the last lossless change, so there is nothing to compensate")
            return PassResult(graph)
        inputs = calibration_inputs(self.name, graph, context)
        layers, refused = paired(graph, context.reference)
        for each in refused:
            context.skipped(each.tensor, each.reason)
        chosen: dict[str, Layer] = {}
        for name, layer in layers.items():
            if self.propagate or layer.inputs is not None:
                reason = _refusal(graph, layer)
                if reason is None:
                    chosen[name] = layer
                else:
                    context.skipped(layer.name, reason)

        def change(layer: Layer, left: Sweep, right: Sweep) -> dict[str, Tensor] | None:
            return self._shifted(layer, left, right, graph, context)

        rework(graph, context.reference, inputs, chosen, change)
        return PassResult(graph)

    def _shifted(
        self, layer: Layer, left: Sweep, right: Sweep, graph: Graph, context: Context
    ) -> dict[str, Tensor] | None:
        """Return the new bias; None where it would be what it is."""
        assert layer.pruned.bias is not None
        bias = graph.tensor(layer.pruned.bias)
        expected, missing = Moments(len(bias), bias.device), Moments(len(bias), bias.device)
        for y, gap in layer.residuals(left, right if self.propagate else None, graph):
            expected.add(y)
            missing.add(gap)
        before, after = relative(missing.mean_square, expected), relative(missing.variance, expected)
        facts = {"samples": missing.count, "error_before": before, "error_after": after}
        if relative(missing.mean.square(), expected) <= tolerance(bias.dtype):
            context.skipped(layer.name, f"the mean of its output is what it was ({missing.count:,} samples)", **facts)
            return None
        what = f"error {before:.3g} -> {after:.3g} of the output's spread, over {missing.count:,} samples"
        if layer.pruned.unevenness is not None:
            what += f"; approximate {layer.pruned.unevenness}"
        context.applied(layer.name, what, **facts)
        return {layer.pruned.bias: (bias.detach().double() + missing.mean).to(bias.dtype)}


def _refusal(graph: Graph, layer: Layer) -> str | None:
    bias = layer.pruned.bias
    if bias is not None:
        found = sharing(graph, bias)
        return None if found is None else f"{found}: a change for one would change the others"
    if layer.name != layer.pruned.weight:
        return f"it has no bias, and {layer.pruned.weight} is shared with other layers: one bias could not serve all"
    return None
