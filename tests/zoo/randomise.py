"""Give a module random parameters that hide no mistake.

Freshly initialised networks are full of ones and zeros: norms that do nothing, layer scales that switch branches off,
empty position tables. A wrong slice of such a parameter goes unnoticed. Here every parameter and every running
statistic gets values of a size that shows in the output.
"""

import math
import re

import torch
from torch import Tensor, nn

__all__ = ["randomise"]

_NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)
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
    """
    generator = torch.Generator().manual_seed(seed)
    seen: set[int] = set()
    with torch.no_grad():
        for owner in module.modules():
            for name, parameter in owner.named_parameters(recurse=False):
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    _fill(owner, name, parameter, generator)
            for name, buffer in owner.named_buffers(recurse=False):
                if name == "running_mean":
                    _normal(buffer, 0.2, generator)
                elif name == "running_var":
                    _uniform(buffer, 0.5, 1.5, generator)


def _fill(owner: nn.Module, name: str, parameter: Tensor, generator: torch.Generator) -> None:
    if _is_norm(owner) and name == "weight":
        _uniform(parameter, 0.5, 1.5, generator)
    elif isinstance(owner, nn.Embedding) or _TABLE.search(name):
        _normal(parameter, 0.5, generator)
    elif "bias" in name:
        _normal(parameter, 0.2, generator)
    elif name == "A_log":
        _uniform(parameter, -1.0, 1.0, generator)
    elif max(parameter.shape, default=1) == parameter.numel():
        _uniform(parameter, 0.5, 1.5, generator)
    else:
        _normal(parameter, 1 / math.sqrt(_fan_in(owner, parameter)), generator)


def _is_norm(owner: nn.Module) -> bool:
    return isinstance(owner, _NORMS) or type(owner).__name__.endswith("Norm")


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
