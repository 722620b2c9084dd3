"""Recurrent layers: RNN, GRU and LSTM, in one or both directions, written out step by step.

Weights hold the gates one after the other: (directions, gates · hidden size, inputs). A row that is shorter than the
others keeps its last state, and its outputs behind the end are zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

import torch
import torch.nn.functional as F  # noqa: N812  # as everybody calls it
from torch import Tensor

from graphopt.dialects.onnx.semantics.common import Function, results

__all__ = ["TABLE"]

Step = Callable[[Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]]
"""What makes the next states, the first of which is the output, of a step's input and the states."""

_ACTIVATIONS: Final[dict[str, Callable[[Tensor, float, float], Tensor]]] = {
    "affine": lambda x, alpha, beta: alpha * x + beta,
    "elu": lambda x, alpha, beta: F.elu(x, alpha),
    "hardsigmoid": lambda x, alpha, beta: (alpha * x + beta).clamp(0, 1),
    "leakyrelu": lambda x, alpha, beta: F.leaky_relu(x, alpha),
    "relu": lambda x, alpha, beta: x.clamp(min=0),
    "scaledtanh": lambda x, alpha, beta: alpha * torch.tanh(beta * x),
    "sigmoid": lambda x, alpha, beta: torch.sigmoid(x),
    "softplus": lambda x, alpha, beta: torch.logaddexp(x, torch.zeros_like(x)),
    "softsign": lambda x, alpha, beta: x / (1 + x.abs()),
    "tanh": lambda x, alpha, beta: torch.tanh(x),
    "thresholdedrelu": lambda x, alpha, beta: torch.where(x > alpha, x, torch.zeros_like(x)),
}
_ALPHA: Final = {"elu": 1.0, "hardsigmoid": 0.2, "leakyrelu": 0.01, "thresholdedrelu": 1.0, "affine": 1.0}
_BETA: Final = {"hardsigmoid": 0.5}


def _functions(
    names: Sequence[str], alpha: Sequence[float] | None, beta: Sequence[float] | None
) -> list[Callable[[Tensor], Tensor]]:
    """Return activations by name; the parameters go, in order, to those that have one."""
    alphas, betas = iter(alpha or ()), iter(beta or ())
    found: list[Callable[[Tensor], Tensor]] = []
    for name in map(str.lower, names):
        first = next(alphas, _ALPHA.get(name, 1.0)) if name in _ALPHA or name == "scaledtanh" else 0.0
        second = next(betas, _BETA.get(name, 1.0)) if name in ("affine", "hardsigmoid", "scaledtanh") else 0.0
        found.append(partial(_call, _ACTIVATIONS[name], first, second))
    return found


def _call(function: Callable[[Tensor, float, float], Tensor], alpha: float, beta: float, x: Tensor) -> Tensor:
    return function(x, alpha, beta)


def _layer(
    make: Callable[..., Step],
    gates: int,
    names: Sequence[str],
    states: int,
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None,
    lengths: Tensor | None,
    initial: Sequence[Tensor | None],
    *,
    activation_alpha: Sequence[float] | None = None,
    activation_beta: Sequence[float] | None = None,
    activations: Sequence[str] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    layout: int = 0,
    outputs: int = 1,
    **options: Any,
) -> Any:
    """Run the directions over the time steps; yields all outputs and the last states."""
    if layout:
        x = x.transpose(0, 1)
        initial = [None if s is None else s.transpose(0, 1) for s in initial]
    directions, hidden = r.shape[0], r.shape[-1]
    functions = _functions(activations or list(names) * directions, activation_alpha, activation_beta)
    bias = torch.zeros(directions, 2 * gates * hidden, dtype=x.dtype, device=x.device) if b is None else b
    all_outputs, all_states = [], []
    for d in range(directions):
        backward = direction == "reverse" or d == 1
        per = len(names)
        step = make(
            r[d], bias[d], functions[d * per : d * per + per], _clipping(clip), direction=d, hidden=hidden, **options
        )
        zero = torch.zeros(x.shape[1], hidden, dtype=x.dtype, device=x.device)
        state = tuple(zero if s is None else s[d] for s in initial)
        # The inputs' part of the gates does not wait for the steps before.
        y, state = _run(step, x @ w[d].t(), state, lengths, backward=backward)
        all_outputs.append(y)
        all_states.append(state)
    y = torch.stack(all_outputs, 1)
    last = [torch.stack([s[i] for s in all_states]) for i in range(states)]
    if layout:
        y, last = y.permute(2, 0, 1, 3), [s.transpose(0, 1) for s in last]
    return results(outputs, y, *last)


def _clipping(bound: float | None) -> Callable[[Tensor], Tensor]:
    return (lambda x: x) if bound is None else (lambda x: x.clamp(-bound, bound))


def _run(
    step: Step, projected: Tensor, state: tuple[Tensor, ...], lengths: Tensor | None, *, backward: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run one direction; backward each row begins at its own end."""
    steps = range(projected.shape[0])
    found: list[Tensor] = [state[0]] * len(steps)
    for t in reversed(steps) if backward else steps:
        after = step(projected[t], state)
        if lengths is None:
            found[t], state = after[0], after
        else:
            valid = (lengths > t).unsqueeze(-1)
            state = tuple(torch.where(valid, new, old) for new, old in zip(after, state, strict=True))
            found[t] = torch.where(valid, state[0], torch.zeros_like(state[0]))
    return torch.stack(found), state


def _rnn_step(r: Tensor, b: Tensor, functions: list[Any], clip: Any, *, direction: int, hidden: int) -> Step:
    (f,) = functions
    both = b[:hidden] + b[hidden:]

    def step(x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (f(clip(x + state[0] @ r.t() + both)),)

    return step


def _gru_step(
    r: Tensor, b: Tensor, functions: list[Any], clip: Any, *, direction: int, hidden: int, linear_before_reset: int
) -> Step:
    f, g = functions
    of_input, of_state = b[: 3 * hidden], b[3 * hidden :]
    gates, candidate = r[: 2 * hidden], r[2 * hidden :]

    def step(x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (h,) = state
        x = x + of_input
        update, reset = (
            f(clip(part)) for part in (x[:, : 2 * hidden] + h @ gates.t() + of_state[: 2 * hidden]).chunk(2, -1)
        )
        if linear_before_reset:
            recurrent = reset * (h @ candidate.t() + of_state[2 * hidden :])
        else:
            recurrent = (reset * h) @ candidate.t() + of_state[2 * hidden :]
        new = g(clip(x[:, 2 * hidden :] + recurrent))
        return ((1 - update) * new + update * h,)

    return step


def _lstm_step(
    r: Tensor,
    b: Tensor,
    functions: list[Any],
    clip: Any,
    *,
    direction: int,
    hidden: int,
    input_forget: int,
    peepholes: Tensor | None,
) -> Step:
    f, g, h = functions
    both = b[: 4 * hidden] + b[4 * hidden :]
    peeps = None if peepholes is None else peepholes[direction].chunk(3)

    def step(x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        before, cell = state
        i, o, forget, c = (x + before @ r.t() + both).chunk(4, -1)
        if peeps is not None:
            i, forget = i + peeps[0] * cell, forget + peeps[2] * cell
        i = f(clip(i))
        kept = 1 - i if input_forget else f(clip(forget))
        cell = kept * cell + i * g(clip(c))
        if peeps is not None:
            o = o + peeps[1] * cell
        return f(clip(o)) * h(cell), cell

    return step


def _rnn(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    sequence_lens: Tensor | None = None,
    initial_h: Tensor | None = None,
    **attributes: Any,
) -> Any:
    return _layer(_rnn_step, 1, ["Tanh"], 1, x, w, r, b, sequence_lens, [initial_h], **attributes)


def _gru(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    sequence_lens: Tensor | None = None,
    initial_h: Tensor | None = None,
    *,
    linear_before_reset: int = 0,
    **attributes: Any,
) -> Any:
    make = partial(_gru_step, linear_before_reset=linear_before_reset)
    return _layer(make, 3, ["Sigmoid", "Tanh"], 1, x, w, r, b, sequence_lens, [initial_h], **attributes)


def _lstm(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    sequence_lens: Tensor | None = None,
    initial_h: Tensor | None = None,
    initial_c: Tensor | None = None,
    peepholes: Tensor | None = None,
    *,
    input_forget: int = 0,
    **attributes: Any,
) -> Any:
    make = partial(_lstm_step, input_forget=input_forget, peepholes=peepholes)
    names = ["Sigmoid", "Tanh", "Tanh"]
    return _layer(make, 4, names, 2, x, w, r, b, sequence_lens, [initial_h, initial_c], **attributes)


TABLE: Final[dict[str, Function]] = {
    "GRU": _gru,
    "LSTM": _lstm,
    "RNN": _rnn,
}
