"""How torch's modules of attention are layers of a network: the same steps as in torch's Python, in the same order in
memory, so that dropouts draw the same numbers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node

from fastnn.graph.reader import NotANetworkError, Reader, module_row, only_first_is_taken, row
from fastnn.network_program import Line, Value
from fastnn.nn._hooks import has_own_call

_SETTINGS = (  # of nn.MultiheadAttention
    *("training", "dropout", "batch_first", "num_heads", "embed_dim", "head_dim", "add_zero_attn", "kdim", "vdim"),
)
_ACTIVATIONS = {F.relu: "relu", torch.relu: "relu", F.gelu: "gelu"}  # that an encoder's layer may have


@row(F.scaled_dot_product_attention)
def _attention(
    read: Reader, node: Node, query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: Any = None, enable_gqa: bool = False
) -> None:  # fmt: skip
    if attn_mask is not None or enable_gqa or isinstance(scale, Node):
        raise NotANetworkError("an attention has a mask, groups of queries, or a scale that is computed")
    inputs = {"query": [read.data(query)], "key": [read.data(key)], "value": [read.data(value)]}
    _add_attention(read, node, inputs, is_causal, dropout_p, "" if scale is None else repr(float(scale)))


def _add_attention(
    read: Reader, node: Node | None, inputs: dict[str, list[Value]], is_causal: bool, drops: float, scale: str = ""
) -> Value:
    if drops:
        read.draws = True
    return read.add(node, "attention", inputs, is_causal=bool(is_causal), dropout=float(drops), scale=scale)


@module_row(nn.MultiheadAttention)
def _multihead(
    read: Reader, node: Node, module: Any, query: Any, key: Any, value: Any, key_padding_mask: Any = None,
    need_weights: bool = True, attn_mask: Any = None, average_attn_weights: bool = True, is_causal: bool = False
) -> None:  # fmt: skip
    if key is not query or value is not query:
        raise NotANetworkError("queries, keys and values are made of different tensors")
    causal = _is_causal(attn_mask, key_padding_mask, is_causal)
    if causal and need_weights:
        raise NotANetworkError("an attention has a mask, and gives its weights")
    if not only_first_is_taken(node):
        raise NotANetworkError("the weights of an attention are read")
    read.parts[node] = [_of_itself(read, module, read.data(query), causal)]  # the weights are no value of a network


def _is_causal(mask: Any, padding: Any, is_causal: Any) -> bool:
    """Whether a call of torch's masks the later steps. torch wants the mask beside the hint that it is this one."""
    if padding is not None or bool(is_causal) != (mask is not None):
        raise NotANetworkError("an attention has a mask that may be any")
    return bool(is_causal)


def _of_itself(read: Reader, module: Any, value: Value, causal: bool) -> Value:
    """The attention of a sequence to itself."""
    has_more = module.add_zero_attn or module.bias_k is not None or module.bias_v is not None
    if has_more or not module.embed_dim == module.kdim == module.vdim:
        raise NotANetworkError("an attention has keys of other sizes, or more of them")
    heads = module.num_heads
    read.note(module, *_SETTINGS)
    if module.batch_first:
        value = read.add(None, "transpose", {"input": [value]}, first=0, second=1)
    weights = {"weight": read.own(module, "in_proj_weight"), "bias": read.own(module, "in_proj_bias")}
    joined = read.add(None, "linear", {"input": [value], **weights})
    parts = [Value(()) for _ in range(3)]
    read.lines.append(Line("split", {"input": [joined]}, parts, {"dim": -1, "chunks": 3}))
    inputs: dict[str, list[Value]] = {}
    for name, part in zip(("query", "key", "value"), parts, strict=True):
        part = read.add(None, "unflatten", {"input": [part]}, dim=-1, sizes=[heads, module.head_dim])
        inputs[name] = [read.add(None, "permute", {"input": [part]}, dims=[1, 2, 0, 3])]
    value = _add_attention(read, None, inputs, causal, module.dropout if module.training else 0.0)
    value = read.add(None, "permute", {"input": [value]}, dims=[2, 0, 1, 3])
    value = read.add(None, "flatten", {"input": [value]}, start_dim=2)
    value = _linear(read, module.out_proj, value)
    if module.batch_first:
        value = read.add(None, "transpose", {"input": [value]}, first=0, second=1)
    return value


@module_row(nn.TransformerEncoderLayer)
def _encoder_layer(
    read: Reader, node: Node, module: Any, src: Any, src_mask: Any = None, src_key_padding_mask: Any = None,
    is_causal: bool = False
) -> None:  # fmt: skip
    read.values[node] = _encoded(read, module, read.data(src), _is_causal(src_mask, src_key_padding_mask, is_causal))


@module_row(nn.TransformerEncoder)
def _encoder(
    read: Reader, node: Node, module: Any, src: Any, mask: Any = None, src_key_padding_mask: Any = None,
    is_causal: Any = None
) -> None:  # fmt: skip
    causal, value = _is_causal(mask, src_key_padding_mask, is_causal), read.data(src)
    read.note(module)
    for layer in module.layers:
        _check(layer, nn.TransformerEncoderLayer)
        value = _encoded(read, layer, value, causal)
    read.values[node] = value if module.norm is None else _normalized(read, module.norm, value)


def _encoded(read: Reader, module: Any, value: Value, causal: bool) -> Value:
    """A layer of an encoder: attention and two linear layers, each with a norm and a way around it."""
    _check(module.self_attn, nn.MultiheadAttention)
    activation = _ACTIVATIONS.get(module.activation)
    if activation is None:
        raise NotANetworkError("an encoder's activation is neither relu nor gelu")
    read.note(module, "activation", "norm_first")

    def attended(value: Value) -> Value:
        return _dropped(read, module.dropout1, _of_itself(read, module.self_attn, value, causal))

    def fed_forward(value: Value) -> Value:
        value = _dropped(read, module.dropout, _linear(read, module.linear1, value, activation))
        return _dropped(read, module.dropout2, _linear(read, module.linear2, value))

    for part, norm in ((attended, module.norm1), (fed_forward, module.norm2)):
        if module.norm_first:
            changed = part(_normalized(read, norm, value))
            value = read.add(None, "binary", {"input": [value], "other": [changed]}, function="add")
        else:
            total = read.add(None, "binary", {"input": [value], "other": [part(value)]}, function="add")
            value = _normalized(read, norm, total)
    return value


def _check(module: nn.Module, *kinds: type) -> None:
    """A module that another one calls must be torch's own."""
    if type(module) not in kinds or has_own_call(module):
        raise NotANetworkError(f"a {type(module).__name__} within torch's own is another module, or has hooks")


def _linear(read: Reader, module: Any, value: Value, activation: str = "identity") -> Value:
    _check(module, nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)
    read.note(module)
    inputs = {"input": [value], "weight": read.own(module, "weight"), "bias": read.own(module, "bias")}
    return read.add(None, "linear", inputs, activation=activation)


def _normalized(read: Reader, module: Any, value: Value) -> Value:
    _check(module, nn.LayerNorm)
    if len(module.normalized_shape) != 1:
        raise NotANetworkError("an encoder's norm is over several dimensions")
    read.note(module, "normalized_shape", "eps")
    inputs = {"input": [value], "weight": read.own(module, "weight"), "bias": read.own(module, "bias")}
    return read.add(None, "layer_norm", inputs, features=module.normalized_shape[0], epsilon=float(module.eps))


def _dropped(read: Reader, module: Any, value: Value) -> Value:
    _check(module, nn.Dropout)
    read.note(module, "p", "training", "inplace")
    if not module.training or not module.p:
        return value
    read.draws = True
    return read.add(None, "dropout", {"input": [value]}, p=float(module.p))
