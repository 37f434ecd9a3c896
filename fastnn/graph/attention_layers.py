"""How torch's modules of attention are layers of a network: the same steps as in torch's Python, in the same order in
memory, so that dropouts draw the same numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node

from fastnn.graph.mask_layers import attention_mask
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
    if enable_gqa or isinstance(scale, Node) or (is_causal and attn_mask is not None):
        raise NotANetworkError("an attention has groups of queries, a scale that is computed, or two masks")
    inputs = {"query": [read.data(query)], "key": [read.data(key)], "value": [read.data(value)]}
    inputs["mask"] = attention_mask(read, attn_mask, "shown")
    _add_attention(read, node, inputs, is_causal, dropout_p, "" if scale is None else repr(float(scale)))


def _add_attention(
    read: Reader, node: Node | None, inputs: dict[str, list[Value]], is_causal: bool, drops: float, scale: str = ""
) -> Value:
    if drops:
        read.draws = True
    return read.add(node, "attention", inputs, is_causal=bool(is_causal), dropout=float(drops), scale=scale)


@dataclass
class _Masks:
    """What hides keys from queries: `is_causal` the later ones; `mask` (queries, keys) and `padding` (batch, keys), of
    which each is none or one value, as an attention adds it to its scores."""

    is_causal: bool
    mask: Sequence[Value] = ()
    padding: Sequence[Value] = ()
    _sum: list[Value] | None = None  # which the further layers of a transformer take, too

    def added(self, read: Reader, query: Value, key: Value) -> list[Value]:
        """The sum of both, for queries and keys (steps, batch, features). Masks of other sizes are refused."""
        if self._sum is not None:
            return self._sum
        masks = [_sized(read, one, ["0.0", "1.0"], [query, key]) for one in self.mask]
        for one in self.padding:  # (batch, keys) -> (batch, 1, 1, keys)
            padding = _sized(read, one, ["0.1", "0.0"], [key])
            for _ in range(2):
                padding = read.add(None, "unsqueeze", {"input": [padding]}, dim=1)
            if masks:
                padding = read.add(None, "binary", {"input": [padding], "other": masks}, function="add")
            masks = [padding]
        self._sum = masks
        return masks


def _sized(read: Reader, value: Value, sizes: Sequence[str], like: Sequence[Value]) -> Value:
    return read.add(None, "check_sizes", {"input": [value], "like": list(like)}, sizes=list(sizes))


def _masks(read: Reader, mask: Any, padding: Any, is_causal: Any, *, runs: bool, needs_weights: bool = False) -> _Masks:
    """mask, padding: as torch's modules take them, with True for what is hidden. torch wants a mask beside the hint
    that it hides the later keys, and goes by the hint where nothing else needs the mask. runs: whether torch runs the
    module's Python, and not operators of its own that treat masks in other ways."""
    if is_causal and mask is None:
        raise NotANetworkError("an attention is said to be causal, and has no mask")
    if is_causal and padding is None and not needs_weights:
        return _Masks(True)
    if not runs and (mask is not None or padding is not None):
        raise NotANetworkError("torch has an operator of its own for an attention with a mask in eval mode")
    form = "hidden exactly" if needs_weights else "hidden"
    return _Masks(False, attention_mask(read, mask, form), attention_mask(read, padding, form))


@module_row(nn.MultiheadAttention)
def _multihead(
    read: Reader, node: Node, module: Any, query: Any, key: Any, value: Any, key_padding_mask: Any = None,
    need_weights: bool = True, attn_mask: Any = None, average_attn_weights: bool = True, is_causal: bool = False
) -> None:  # fmt: skip
    if not only_first_is_taken(node):
        raise NotANetworkError("the weights of an attention are read")
    nodes = list(dict.fromkeys((query, key, value)))
    runs = module.training or len(nodes) > 1
    masks = _masks(read, attn_mask, key_padding_mask, is_causal, runs=runs, needs_weights=need_weights)
    given = [read.data(one) for one in (query, key, value)] if len(nodes) > 1 else [read.data(query)]
    if key is value and len(nodes) > 1:
        del given[2]
    # (The weights are no value of a network.)
    read.parts[node] = [_multihead_attention(read, module, given, masks, need_weights)]


def _multihead_attention(
    read: Reader, module: Any, given: Sequence[Value], masks: _Masks, needs_weights: bool = False
) -> Value:
    """given: a sequence that attends to itself; or the queries, and what both keys and values are made of; or what each
    of the three is made of. needs_weights: whether torch computes the weights, which are NaN for a query that sees no
    key. (Else such a query gives 0.)"""
    has_more = module.add_zero_attn or module.bias_k is not None or module.bias_v is not None
    if has_more or not module.embed_dim == module.kdim == module.vdim:
        raise NotANetworkError("an attention has keys of other sizes, or more of them")
    heads, features = module.num_heads, module.embed_dim
    read.note(module, *_SETTINGS)
    if module.batch_first:
        given = [read.add(None, "transpose", {"input": [value]}, first=0, second=1) for value in given]
    parameters = {"weight": read.own(module, "in_proj_weight"), "bias": read.own(module, "in_proj_bias")}
    addends = masks.added(read, given[0], given[min(1, len(given) - 1)])
    parts: list[Value] = []
    for value, count in zip(given, {1: (3,), 2: (1, 2), 3: (1, 1, 1)}[len(given)], strict=True):
        first = len(parts) * features
        own = parameters if count == 3 else {
            name: [read.add(None, "slice", {"input": some}, dim=0, start=first, stop=first + count * features)]
            for name, some in parameters.items() if some
        }  # fmt: skip
        joined = read.add(None, "linear", {"input": [value], **own})
        some = [joined] if count == 1 else [Value(()) for _ in range(count)]
        if count > 1:
            read.lines.append(Line("split", {"input": [joined]}, some, {"dim": -1, "chunks": count}))
        parts += some
    inputs: dict[str, list[Value]] = {}
    for name, part in zip(("query", "key", "value"), parts, strict=True):
        part = read.add(None, "unflatten", {"input": [part]}, dim=-1, sizes=[heads, module.head_dim])
        inputs[name] = [read.add(None, "permute", {"input": [part]}, dims=[1, 2, 0, 3])]
    drops = module.dropout if module.training else 0.0
    if needs_weights and addends:
        value = _add_attention_by_weights(read, inputs, addends, drops, module.head_dim**-0.5)
    else:
        value = _add_attention(read, None, {**inputs, "mask": addends}, masks.is_causal, drops)
    value = read.add(None, "permute", {"input": [value]}, dims=[2, 0, 1, 3])
    value = read.add(None, "flatten", {"input": [value]}, start_dim=2)
    value = _linear(read, module.out_proj, value)
    if module.batch_first:
        value = read.add(None, "transpose", {"input": [value]}, first=0, second=1)
    return value


def _add_attention_by_weights(
    read: Reader, inputs: dict[str, list[Value]], addends: list[Value], drops: float, scale: float
) -> Value:
    queries = read.add(None, "binary", {"input": inputs["query"]}, function="mul", number=scale)
    keys = read.add(None, "transpose", {"input": inputs["key"]}, first=-2, second=-1)
    scores = read.add(None, "matmul", {"input": [queries], "other": [keys]})
    scores = read.add(None, "binary", {"input": [scores], "other": addends}, function="add")
    weights = read.add(None, "softmax", {"input": [scores]}, dim=-1)
    if drops:
        read.draws = True
        weights = read.add(None, "dropout", {"input": [weights]}, p=float(drops))
    return read.add(None, "matmul", {"input": [weights], "other": inputs["value"]})


@module_row(nn.TransformerEncoderLayer)
def _encoder_layer(
    read: Reader, node: Node, module: Any, src: Any, src_mask: Any = None, src_key_padding_mask: Any = None,
    is_causal: bool = False
) -> None:  # fmt: skip
    masks = _masks(read, src_mask, src_key_padding_mask, is_causal, runs=module.training)
    read.values[node] = _through_layer(read, module, read.data(src), masks)


@module_row(nn.TransformerEncoder)
def _encoder(
    read: Reader, node: Node, module: Any, src: Any, mask: Any = None, src_key_padding_mask: Any = None,
    is_causal: Any = None
) -> None:  # fmt: skip
    masks = _masks(read, mask, src_key_padding_mask, is_causal, runs=module.training)
    read.values[node] = _through_layers(read, module, read.data(src), masks)


@module_row(nn.TransformerDecoder, nn.TransformerDecoderLayer)
def _decoder(
    read: Reader, node: Node, module: Any, tgt: Any, memory: Any, tgt_mask: Any = None, memory_mask: Any = None,
    tgt_key_padding_mask: Any = None, memory_key_padding_mask: Any = None, tgt_is_causal: Any = None,
    memory_is_causal: bool = False
) -> None:  # fmt: skip
    own = _masks(read, tgt_mask, tgt_key_padding_mask, tgt_is_causal, runs=module.training)
    others = _masks(read, memory_mask, memory_key_padding_mask, memory_is_causal, runs=True)
    passes = _through_layer if isinstance(module, nn.TransformerDecoderLayer) else _through_layers
    read.values[node] = passes(read, module, read.data(tgt), own, (read.data(memory), others))


def _through_layers(
    read: Reader, module: Any, value: Value, masks: _Masks, memory: tuple[Value, _Masks] | None = None
) -> Value:
    """All layers of an encoder, or, with a memory, of a decoder."""
    read.note(module, "training")
    for layer in module.layers:
        _check(layer, nn.TransformerEncoderLayer if memory is None else nn.TransformerDecoderLayer)
        value = _through_layer(read, layer, value, masks, memory)
    return value if module.norm is None else _normalized(read, module.norm, value)


@module_row(nn.Transformer)
def _transformer(
    read: Reader, node: Node, module: Any, src: Any, tgt: Any, src_mask: Any = None, tgt_mask: Any = None,
    memory_mask: Any = None, src_key_padding_mask: Any = None, tgt_key_padding_mask: Any = None,
    memory_key_padding_mask: Any = None, src_is_causal: Any = None, tgt_is_causal: Any = None,
    memory_is_causal: bool = False
) -> None:  # fmt: skip
    _check(module.encoder, nn.TransformerEncoder)
    _check(module.decoder, nn.TransformerDecoder)
    read.note(module)
    masks = _masks(read, src_mask, src_key_padding_mask, src_is_causal, runs=module.encoder.training)
    memory = _through_layers(read, module.encoder, read.data(src), masks)
    own = _masks(read, tgt_mask, tgt_key_padding_mask, tgt_is_causal, runs=module.decoder.training)
    others = _masks(read, memory_mask, memory_key_padding_mask, memory_is_causal, runs=True)
    read.values[node] = _through_layers(read, module.decoder, read.data(tgt), own, (memory, others))


def _through_layer(
    read: Reader, module: Any, value: Value, masks: _Masks, memory: tuple[Value, _Masks] | None = None
) -> Value:
    """A layer of an encoder: attention and two linear layers, each with a norm and a way around it; or of a decoder,
    which attends to a memory between the two."""
    activation = _ACTIVATIONS.get(module.activation)
    if activation is None:
        raise NotANetworkError("a transformer's activation is neither relu nor gelu")
    read.note(module, "activation", "norm_first", "training")

    def attended(value: Value) -> Value:
        _check(module.self_attn, nn.MultiheadAttention)
        return _dropped(read, module.dropout1, _multihead_attention(read, module.self_attn, [value], masks))

    def attended_to_memory(value: Value) -> Value:
        assert memory is not None
        _check(module.multihead_attn, nn.MultiheadAttention)
        given = [value, memory[0]]
        return _dropped(read, module.dropout2, _multihead_attention(read, module.multihead_attn, given, memory[1]))

    def fed_forward(value: Value) -> Value:
        value = _dropped(read, module.dropout, _linear(read, module.linear1, value, activation))
        last = module.dropout2 if memory is None else module.dropout3
        return _dropped(read, last, _linear(read, module.linear2, value))

    if memory is None:
        parts = [(attended, module.norm1), (fed_forward, module.norm2)]
    else:
        parts = [(attended, module.norm1), (attended_to_memory, module.norm2), (fed_forward, module.norm3)]
    for part, norm in parts:
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
    if module.inplace:
        raise NotANetworkError("a dropout changes a tensor in place")
    if not module.training or not module.p:
        return value
    read.draws = True
    return read.add(None, "dropout", {"input": [value]}, p=float(module.p))
