"""Represent ONNX operators as targets of a ``torch.fx`` graph: callables with a schema.

What may live here: :class:`Op`, the schemas, and which operands are sizes. What an operator computes stands in
``semantics``; what it does to axes in the tables beside this file.

A call's positional arguments are the operator's inputs, in the order of its schema: ``None`` where one is absent, one
list where the input is variadic. Its keyword arguments are the attributes that the file gives. Both are read by name,
with :class:`~graphopt.graph.Call`. Three things differ from the file's form:

- One signature serves all opset versions from 13 on. What was an attribute and became an input (``axes``) is an
  input.
- Operands that hold *sizes* (the shape of a Reshape, the ends of a Slice) are Python lists, whose entries are numbers
  or nodes that yield one, as in the ATen dialect; single numbers (the ``k`` of a TopK) are Python numbers. Where the
  values depend on data, the operand stays a tensor.
- A tensor among the attributes is a :class:`~graphopt.dialects.onnx.types.Filling`, a number with its type.
- A call yields a tuple only where the file names more than one result, and then ``outputs=`` says how many; a Split
  always yields a list.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Final, Literal

__all__ = ["DOMAIN", "MICROSOFT", "NUMBERS", "SIZES", "Op", "Parameter", "known", "op"]

DOMAIN: Final = ""
"""The default domain of ONNX."""
MICROSOFT: Final = "com.microsoft"
"""The domain of what ONNX Runtime adds."""

Kind = Literal["tensor", "optional", "variadic", "attribute"]

SIZES: Final[dict[str, tuple[str, ...]]] = {
    "AffineGrid": ("size",),
    "CenterCropPad": ("shape",),
    "Col2Im": ("image_shape", "block_shape"),
    "ConstantOfShape": ("input",),
    "Expand": ("shape",),
    "MaxUnpool": ("output_shape",),
    "Pad": ("pads", "axes"),
    "ReduceL1": ("axes",),
    "ReduceL2": ("axes",),
    "ReduceLogSum": ("axes",),
    "ReduceLogSumExp": ("axes",),
    "ReduceMax": ("axes",),
    "ReduceMean": ("axes",),
    "ReduceMin": ("axes",),
    "ReduceProd": ("axes",),
    "ReduceSum": ("axes",),
    "ReduceSumSquare": ("axes",),
    "Reshape": ("shape",),
    "Resize": ("roi", "scales", "sizes"),
    "Slice": ("starts", "ends", "axes", "steps"),
    "Split": ("split",),
    "Squeeze": ("axes",),
    "Tile": ("repeats",),
    "Unsqueeze": ("axes",),
    "Upsample": ("scales",),
}
"""Inputs that hold a list of sizes, positions or factors, by operator of the default domain."""

NUMBERS: Final[dict[str, tuple[str, ...]]] = {
    "BlackmanWindow": ("size",),
    "Clip": ("min", "max"),
    "CumSum": ("axis",),
    "CumProd": ("axis",),
    "DFT": ("dft_length", "axis"),
    "Dropout": ("ratio", "training_mode"),
    "HammingWindow": ("size",),
    "HannWindow": ("size",),
    "OneHot": ("depth",),
    "Pad": ("constant_value",),
    "Range": ("start", "limit", "delta"),
    "STFT": ("frame_step", "frame_length"),
    "SequenceAt": ("position",),
    "SequenceErase": ("position",),
    "SequenceInsert": ("position",),
    "TopK": ("K",),
    "Trilu": ("k",),
}
"""Inputs that hold one number, by operator of the default domain."""

# Inputs, then attributes with their defaults: "?" marks an optional input, "*" a variadic one.
_MICROSOFT: Final = """
    BiasGelu(A, B)
    BiasSplitGelu(X, bias)
    BiasSoftmax(data, bias; axis=1, is_inner_broadcast=0)
    DequantizeLinear(x, x_scale, x_zero_point?; axis=1, block_size=0)
    DynamicQuantizeMatMul(A, B, b_scale, b_zero_point?, bias?)
    EmbedLayerNormalization(input_ids, segment_ids?, word_embedding, position_embedding, segment_embedding?, gamma, \
beta, mask?, position_ids?; epsilon=1e-12, mask_index_type=0)
    FastGelu(X, bias?)
    FusedConv(X, W, B?, Z?; activation=None, activation_params=None, auto_pad='NOTSET', dilations=None, group=1, \
kernel_shape=None, pads=None, strides=None)
    FusedGemm(A, B, C?; activation=None, activation_alpha=0.0, activation_beta=0.0, activation_gamma=0.0, alpha=1.0, \
beta=1.0, transA=0, transB=0)
    FusedMatMul(A, B; alpha=1.0, transA=0, transB=0, transBatchA=0, transBatchB=0)
    FusedMatMulActivation(A, B; activation=None, activation_alpha=0.0, activation_axis=0, activation_beta=0.0, \
activation_gamma=0.0, alpha=1.0, transA=0, transB=0, transBatchA=0, transBatchB=0)
    Gelu(X)
    Inverse(X)
    GroupNorm(X, gamma, beta; activation=0, channels_last=1, epsilon=1e-5, groups=1)
    GroupQueryAttention(query, key?, value?, past_key?, past_value?, seqlens_k, total_sequence_length, cos_cache?, \
sin_cache?, position_ids?, attention_bias?, head_sink?, k_scale?, v_scale?, q_norm_weight?, k_norm_weight?; \
num_heads, kv_num_heads, causal=1, do_rotary=0, k_quant_type='NONE', kv_cache_bit_width=0, local_window_size=-1, \
qk_norm_epsilon=1e-6, qk_output=0, rotary_interleaved=0, scale=0.0, sliding_window_cache=0, smooth_softmax=-1, \
softcap=0.0, v_quant_type='NONE')
    MatMulIntegerToFloat(A, B, a_scale, b_scale, a_zero_point?, b_zero_point?, bias?)
    MatMulNBits(A, B, scales, zero_points?, g_idx?, bias?; K, N, bits=4, block_size, accuracy_level=0, \
weight_prepacked=0)
    MultiHeadAttention(query, key?, value?, bias?, key_padding_mask?, attention_bias?, past_key?, past_value?, \
past_sequence_length?, cache_indirection?; num_heads, mask_filter_value=-10000.0, scale=0.0, unidirectional=0)
    NhwcConv(X, W, B?; auto_pad='NOTSET', dilations=None, group=1, kernel_shape=None, pads=None, strides=None)
    Attention(input, weights, bias?, mask_index?, past?, attention_bias?, past_sequence_length?; num_heads, \
do_rotary=0, mask_filter_value=-10000.0, past_present_share_buffer=0, qkv_hidden_sizes=None, \
rotary_embedding_dim=0, scale=0.0, unidirectional=0)
    NhwcMaxPool(x; auto_pad='NOTSET', ceil_mode=0, dilations=None, kernel_shape=None, pads=None, strides=None)
    QGemm(A, a_scale, a_zero_point, B, b_scale, b_zero_point, C?, y_scale?, y_zero_point?; alpha=1.0, transA=0, \
transB=0)
    QLinearAdd(A, A_scale, A_zero_point?, B, B_scale, B_zero_point?, C_scale, C_zero_point?)
    QLinearAveragePool(X, x_scale, x_zero_point?, y_scale, y_zero_point?; auto_pad='NOTSET', ceil_mode=0, \
channels_last=0, count_include_pad=0, kernel_shape=None, pads=None, strides=None)
    QLinearConcat(Y_scale, Y_zero_point, inputs*; axis=0)
    QLinearGlobalAveragePool(X, x_scale, x_zero_point, y_scale, y_zero_point; channels_last=0)
    QLinearLeakyRelu(X, X_scale, X_zero_point?, Y_scale, Y_zero_point?; alpha=0.01)
    QLinearMul(A, A_scale, A_zero_point?, B, B_scale, B_zero_point?, C_scale, C_zero_point?)
    QLinearSigmoid(X, X_scale, X_zero_point?, Y_scale, Y_zero_point?)
    QLinearSoftmax(X, X_scale, x_zero_point?, y_scale, y_zero_point; axis=-1, opset=None)
    QuantizeLinear(x, y_scale, y_zero_point?; axis=1, block_size=0, output_dtype=0, saturate=1)
    QuickGelu(X; alpha=1.702)
    RotaryEmbedding(input, position_ids, cos_cache, sin_cache; interleaved=0, is_packed_batching=0, num_heads=0, \
rotary_embedding_dim=0, scale=1.0)
    SimplifiedLayerNormalization(X, scale; axis=-1, epsilon=1e-5, stash_type=1)
    SkipGroupNorm(X, gamma, beta, skip, bias?; activation=0, channels_last=1, epsilon=1e-5, groups=1)
    SkipLayerNormalization(input, skip, gamma, beta?, bias?; epsilon=1e-12)
    SkipSimplifiedLayerNormalization(input, skip, gamma, bias?; epsilon=1e-12)
    TransposeMatMul(A, B; alpha=1.0, transA=0, transB=0)
    Trilu(X, k?; upper=1)
"""

# Operators that ONNX Runtime knows in the default domain, though the standard has no such operator.
_RUNTIME: Final = """
    SimplifiedLayerNormalization(X, scale; axis=-1, epsilon=1e-5, stash_type=1)
"""


@dataclass(frozen=True, slots=True)
class Alias:
    """Say that a result may lie in the memory of an argument; no operator of ONNX writes into one."""

    before_set: frozenset[str] = frozenset("a")
    is_write: bool = False


VIEWS: Final = frozenset({"Dropout", "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"})
"""Operators for which runtimes allocate no memory."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One argument of an operator: an input or an attribute.

    The fields after ``kind`` are those that torch's own schemas have, for what reads both.
    """

    name: str
    kind: Kind
    default_value: Any = None
    kwarg_only: bool = False
    is_out: bool = False
    alias_info: Alias | None = None
    type: str = "Tensor"

    def has_default_value(self) -> bool:
        """Say whether a call may leave it out."""
        return self.kind != "tensor"

    @property
    def by_position(self) -> bool:
        """Say whether a call gives it by its position alone: an input."""
        return self.kind != "attribute"


@dataclass(frozen=True, slots=True)
class Result:
    """One result of an operator."""

    name: str
    alias_info: Alias | None = None


@dataclass(frozen=True, slots=True)
class Schema:
    """The arguments and results of an operator, in the form of torch's own schemas."""

    name: str
    arguments: tuple[Parameter, ...]
    returns: tuple[Result, ...] = (Result("Y"),)
    is_mutable: bool = False

    @property
    def inputs(self) -> tuple[Parameter, ...]:
        """The arguments that are inputs."""
        return tuple(a for a in self.arguments if a.kind != "attribute")


class Op:
    """An operator of ONNX. There is one object of each; calling it computes its result with torch.

    ``str(op)`` is ``onnx.Conv``, or ``com.microsoft.FusedConv`` for another domain than the default one.
    """

    def __init__(self, domain: str, name: str, schema: Schema) -> None:
        self.domain = domain
        self.name = name
        self.__name__ = name
        self.__qualname__ = name
        self.__module__ = domain or "onnx"
        self._schema = schema

    @property
    def schema(self) -> Schema:
        """The arguments and results."""
        return self._schema

    @property
    def key(self) -> str:
        """The name in tables: with its domain unless that is the default one."""
        return f"{self.domain}.{self.name}" if self.domain else self.name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the result with torch."""
        from graphopt.dialects.onnx.semantics import semantics_of

        return semantics_of(self.key)(*args, **kwargs)

    def __str__(self) -> str:
        return f"{self.__module__}.{self.name}"

    def __repr__(self) -> str:
        return f"<{self}>"

    def __copy__(self) -> Op:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Op:
        return self

    def __reduce__(self) -> Any:
        return op, (self.name, self.domain)


_ALIAS: Final = Alias()


def op(name: str, domain: str = DOMAIN) -> Op:
    """Return the operator of that name; ``name`` may hold the domain, as :attr:`Op.key` does.

    Raises:
        KeyError: no such operator is known.
    """
    if not domain and "." in name:
        domain, _, name = name.rpartition(".")
        return op(name, domain)
    return _made(name, DOMAIN if domain == "ai.onnx" else domain)


@cache
def _made(name: str, domain: str) -> Op:
    found = _described().get((domain, name)) or (_standard(name) if domain == DOMAIN else None)
    if found is None:
        raise KeyError(f"{domain or 'ai.onnx'}.{name}")
    return Op(domain, name, found)


def known(name: str, domain: str = DOMAIN) -> bool:
    """Say whether there is such an operator."""
    try:
        op(name, domain)
    except KeyError:
        return False
    return True


def _standard(name: str) -> Schema | None:
    """Return the schema of an operator of the standard, the union of its versions from opset 13 on."""
    import onnx.defs

    versions = _versions().get(name)
    if not versions:
        return None
    newest = versions[-1]
    variadic = onnx.defs.OpSchema.FormalParameterOption.Variadic
    optional = onnx.defs.OpSchema.FormalParameterOption.Optional
    arguments: list[Parameter] = []
    for given in newest.inputs:
        kind: Kind = "variadic" if given.option == variadic else "optional" if given.option == optional else "tensor"
        arguments.append(Parameter(given.name, kind, alias_info=_ALIAS if name in VIEWS and not arguments else None))
    names = {a.name for a in arguments}
    for schema in versions:
        for attribute in schema.attributes.values():
            if attribute.name not in names:
                names.add(attribute.name)
                default = _default(newest.attributes.get(attribute.name, attribute))
                arguments.append(Parameter(attribute.name, "attribute", default, kwarg_only=True))
    arguments.append(Parameter("outputs", "attribute", 1, kwarg_only=True))
    alias = _ALIAS if name in VIEWS else None
    return Schema(f"onnx.{name}", tuple(arguments), tuple(Result(o.name, alias) for o in newest.outputs))


@cache
def _versions() -> dict[str, list[Any]]:
    """Return the schemas of each operator of the default domain that hold in opset 13 or later, oldest first."""
    import onnx.defs

    found: dict[str, list[Any]] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain == DOMAIN:
            found.setdefault(schema.name, []).append(schema)
    for name, schemas in found.items():
        schemas.sort(key=lambda schema: schema.since_version)
        last_old = max((i for i, s in enumerate(schemas) if s.since_version <= 13), default=0)
        found[name] = schemas[last_old:]
    return found


def _default(attribute: Any) -> Any:
    import onnx.helper

    if not attribute.default_value.name:
        return None
    value = onnx.helper.get_attribute_value(attribute.default_value)
    if isinstance(value, list):
        return [v.decode() if isinstance(v, bytes) else v for v in value]
    return value.decode() if isinstance(value, bytes) else value


@cache
def _described() -> dict[tuple[str, str], Schema]:
    """Return the schemas that are written down here."""
    found: dict[tuple[str, str], Schema] = {}
    for domain, text in ((MICROSOFT, _MICROSOFT), (DOMAIN, _RUNTIME)):
        for line in filter(None, map(str.strip, text.splitlines())):
            name, _, rest = line.removesuffix(")").partition("(")
            inputs, _, attributes = rest.partition(";")
            arguments = [_input(each.strip()) for each in inputs.split(",")]
            arguments += [_attribute(each.strip()) for each in attributes.split(",") if each.strip()]
            arguments.append(Parameter("outputs", "attribute", 1, kwarg_only=True))
            found[domain, name] = Schema(f"{domain or 'onnx'}.{name}", tuple(arguments))
    return found


def _input(text: str) -> Parameter:
    kind: Kind = "optional" if text.endswith("?") else "variadic" if text.endswith("*") else "tensor"
    return Parameter(text.rstrip("?*"), kind)


def _attribute(text: str) -> Parameter:
    import ast

    name, _, default = text.partition("=")
    return Parameter(name, "attribute", ast.literal_eval(default) if default else None, kwarg_only=True)
