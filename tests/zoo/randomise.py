"""Give a module random parameters that hide no mistake.

Freshly initialised networks are full of ones and zeros: norms that do nothing, layer scales that switch branches off,
empty position tables. A wrong slice of such a parameter goes unnoticed. Here every parameter and every running
statistic gets values of a size that shows in the output.
"""

import math
import re
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["calibrate", "randomise"]

_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_TABLE = re.compile(r"pos|token|table|biases|embed|queries")


def randomise(module: nn.Module, seed: int) -> None:
    """Overwrite every parameter and running statistic of `module`, in place.

    Depends on the module's structure and the seed alone, not on its former values or its floating-point type. With
    fan-in n (inputs that one output sums over) the distributions are:

    - weights of linear layers and convolutions: normal, standard deviation 1/sqrt(n), which keeps the mean square;
    - biases: normal, 0.2;
    - scales (of norms, layer scales, gates, temperatures): uniform in [0.5, 1.5];
    - embeddings, position tables, class tokens, queries: normal, 0.5;
    - running means: normal, 0.2; running variances: uniform in [0.5, 1.5].

    Deep networks of batch norms may amplify or lose their input under such statistics; `calibrate` makes them fit.
    """
    generator = torch.Generator().manual_seed(seed)
    seen: set[int] = set()
    with torch.no_grad():
        for owner in module.modules():
            for name, parameter in owner.named_parameters(recurse=False):
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    _fill(owner, name, parameter, generator)
            if _has_statistics(owner):
                for name, buffer in owner.named_buffers(recurse=False):
                    _fill(owner, name, buffer, generator)


def calibrate(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], seed: int) -> None:
    """Scale each batch norm's running statistics to the mean square of its input, in one forward pass and in place.

    The signal then neither fades nor explodes, however deep the network is. The statistics stay random: normalising
    each channel by its own mean and variance would make a deep network chaotic, and float32 useless on it.
    """
    norms = [owner for owner in module.modules() if _has_statistics(owner)]
    if not norms:
        return
    generator = torch.Generator().manual_seed(seed)
    done: set[nn.Module] = set()

    def observe(owner: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if owner in done:
            return
        done.add(owner)
        mean, var = owner.get_buffer("running_mean"), owner.get_buffer("running_var")
        _normal(mean, 0.3, generator)
        _uniform(var, 0.5, 1.5, generator)
        x = inputs[0]
        mean_square = x.square().mean() + 1e-6
        # A fifth of each channel's mean leaves fewer channels for good on the dead side of a ReLU.
        mean.mul_(mean_square.sqrt()).add_(x.transpose(0, 1).flatten(1).mean(1), alpha=0.2)
        var.mul_(mean_square)

    hooks = [owner.register_forward_pre_hook(observe) for owner in norms]
    try:
        with torch.no_grad():
            module(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()


def _has_statistics(owner: nn.Module) -> bool:
    return isinstance(getattr(owner, "running_var", None), Tensor)


def _fill(owner: nn.Module, name: str, tensor: Tensor, generator: torch.Generator) -> None:
    if not tensor.is_floating_point():
        return  # the count of batches seen
    if name == "running_var" or (_is_norm(owner) and name == "weight"):
        _uniform(tensor, 0.5, 1.5, generator)
    elif isinstance(owner, nn.Embedding) or _TABLE.search(name):
        _normal(tensor, 0.5, generator)
    elif "bias" in name or name == "running_mean":
        _normal(tensor, 0.2, generator)
    elif name == "A_log":  # of Mamba: the logarithm of a decay rate, a matrix though it is a scale
        _uniform(tensor, -1.0, 1.0, generator)
    elif max(tensor.shape, default=1) == tensor.numel():
        _uniform(tensor, 0.5, 1.5, generator)
    else:
        _normal(tensor, 1 / math.sqrt(_fan_in(owner, tensor)), generator)


def _is_norm(owner: nn.Module) -> bool:
    return isinstance(owner, _NORMS) or type(owner).__name__.endswith("Norm") or _has_statistics(owner)


def _fan_in(owner: nn.Module, weight: Tensor) -> float:
    if isinstance(owner, nn.modules.conv._ConvTransposeNd):
        # Every output position is reached by kernel / stride taps of each input channel.
        return weight.shape[0] / owner.groups * math.prod(owner.kernel_size) / math.prod(owner.stride)
    if isinstance(owner, nn.modules.conv._ConvNd):
        return math.prod(weight.shape[1:])
    if type(owner).__name__ == "Conv1D":
        return weight.shape[0]  # GPT-2's linear layer, whose weight is (in, out)
    return weight.shape[-1]


def _normal(tensor: Tensor, std: float, generator: torch.Generator) -> None:
    # Drawn in float32 whatever the type, so that a float64 copy of a model gets the same values.
    tensor.copy_(torch.empty(tensor.shape).normal_(0.0, std, generator=generator))


def _uniform(tensor: Tensor, low: float, high: float, generator: torch.Generator) -> None:
    tensor.copy_(torch.empty(tensor.shape).uniform_(low, high, generator=generator))
