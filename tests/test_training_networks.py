"""Whole networks in one call of a training step: branches, skips, states, several inputs and results."""

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from random_networks import check_training
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm
from torch.testing import assert_close

import fastnn
from fastnn.testing import assert_close_to_reference, using_threads


class By(nn.Module):
    """A function of the module and its inputs; the function's layers are given by name."""

    def __init__(self, function: Callable[..., Any], **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


class OfTwo(By):
    def forward(self, x: Tensor, y: Tensor) -> Any:  # type: ignore[override]
        return self.function(self, x, y)


def _residual(m: Any, x: Tensor) -> Tensor:
    x = m.relu(m.stem_norm(m.stem(x)))
    y = m.norm1(m.conv1(x)).relu()
    y = m.norm2(m.conv2(y))
    y += m.down_norm(m.down(x))
    return m.fc(F.relu(y).mean((2, 3)))


def _u_net(m: Any, x: Tensor) -> Tensor:
    a = F.relu(m.a(x))
    b = F.relu(m.b(F.max_pool2d(a, 2)))
    c = F.relu(m.c(F.avg_pool2d(b, 2)))
    b = F.relu(m.d(torch.cat([m.up(c), b], 1)))
    up = F.interpolate(b, scale_factor=2, mode="bilinear", align_corners=False)
    return m.e(torch.cat((up, a), dim=1))


def _gate(m: Any, x: Tensor) -> Tensor:
    y = F.silu(m.conv(x))
    gate = torch.sigmoid(m.wide(F.relu(m.narrow(F.adaptive_avg_pool2d(y, 1).flatten(1)))))
    return m.fc((y * gate.unsqueeze(-1).unsqueeze(-1) + x).flatten(1))


def _attention(m: Any, x: Tensor) -> Tensor:
    batch, steps, width = x.shape
    q, k, v = m.qkv(m.norm(x) + m.places).chunk(3, dim=-1)
    q, k, v = (one.view(batch, steps, 2, width // 2).transpose(1, 2) for one in (q, k, v))
    weights = F.softmax((q @ k.transpose(-2, -1)) / 2.0, dim=-1)
    y = (m.drop(weights) @ v).transpose(1, 2).reshape(batch, steps, width)
    x = x + m.out(y)
    return m.head((x + m.mlp(x)).mean(1))


def _cells(m: Any, x: Tensor) -> Tensor:
    state = None
    outputs = []
    for step in range(4):
        state = m.cell(x[:, step], state)
        outputs.append(m.fc(state[0]))
    return torch.stack(outputs, dim=1)


def _gru_cells(m: Any, x: Tensor) -> Tensor:
    h = x.new_zeros(x.size(0), 6)
    for step in range(3):
        h = m.cell(x[:, step, :], h)
    return m.fc(h)


def _encoder_decoder(m: Any, x: Tensor) -> Tensor:
    _, state = m.encoder(x)
    output, _ = m.decoder(x[:, 2:], state)
    return m.fc(output)


def _both_results(m: Any, x: Tensor) -> Tensor:
    output, h = m.rnn(x)
    return torch.cat([output[:, -1], h[-1], h[0]], 1)


def _speech(m: Any, x: Tensor) -> Tensor:
    y = F.relu(m.norm(m.conv(x))).transpose(1, 2)
    output, _ = m.rnn(y)
    weights = torch.softmax(m.score(output), dim=1)
    return m.fc((weights * output).sum(1))


def _vae(m: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    h = m.encoder(x)
    mean, log_variance = m.mean(h), m.log_variance(h)
    z = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
    return m.decoder(z), mean, log_variance


def _heads(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    h = torch.tanh(m.body(x))
    return F.log_softmax(m.policy(h), dim=-1), m.value(h).squeeze(-1)


def _named_heads(m: Any, x: Tensor) -> dict[str, Tensor]:
    policy, value = _heads(m, x)
    return {"policy": policy, "value": value}


def _duel(m: Any, x: Tensor) -> Tensor:
    h = m.body(x)
    advantage = m.advantage(h)
    return m.value(h) + advantage - advantage.mean(1, keepdim=True)


def _tied(m: Any, x: Tensor) -> Tensor:
    return F.linear(torch.relu(F.linear(x, m.weight, m.bias)), m.weight, m.bias)


def _shared(m: Any, x: Tensor) -> Tensor:
    return m.layer(torch.tanh(m.layer(x))) / (1.0 + m.other(x).square())


def _gated(m: Any, x: Tensor) -> Tensor:
    skips = 0
    for conv, mix in zip(m.convs, m.mixes, strict=True):
        a, b = torch.split(conv(F.pad(x, (2, 0))), 4, 1)
        y = mix(torch.tanh(a) * torch.sigmoid(b))
        x = x + y
        skips = skips + y
    return m.out(skips).mean(-1)


def _views(m: Any, x: Tensor) -> Tensor:
    y = m.a(x).permute(0, 2, 1).contiguous()
    y = y[:, 1:, ::2].unsqueeze(1).squeeze(1)
    y = y.reshape(y.shape[0], -1)
    return m.b(y)[..., :2] * 2 - 1


def _tagger(m: Any, x: Tensor) -> Tensor:
    y = m.rnn(m.embedding(x))[0]
    return m.fc(y.reshape(x.shape[0] * x.shape[1], 8)).view(x.size(0), -1, 6).transpose(1, 2)


def _pools(m: Any, x: Tensor) -> Tensor:
    y = F.max_pool2d(m.conv(x), 3, stride=2, padding=1, ceil_mode=True)
    return m.fc(m.drop(m.average(y)).flatten(1))


def _sizes(m: Any, x: Tensor) -> Tensor:
    y = F.max_pool1d(F.relu(m.a(x)), 2) + F.avg_pool1d(x, 2)
    batch, channels, length = y.size()
    y = y.permute(0, 2, 1).reshape(batch * length, channels)
    y = m.b(y).view(x.shape[0], x.shape[-1] // 2, 6)
    return y.transpose(1, 2).mean(-1) + F.avg_pool1d(x, x.shape[-1]).mean()


def _borders(m: Any, x: Tensor) -> Tensor:
    y = F.relu(m.replicate(m.reflect(x)))
    y = F.pad(m.shuffle(y), (2, 1, 0, 2), mode="circular")
    y = torch.roll(y, (1, -2), (2, 3)) + y.flip(-1, 2) * torch.roll(y, 1, 1)
    return m.fc(m.out(y).mean((2, 3)))


def _pairs(m: Any, x: Tensor) -> Tensor:
    """Products of pairs of features, as recommenders have them, behind features in another order."""
    y = torch.tanh(m.a(x[:, m.order])).unflatten(1, (4, 3))
    products = torch.bmm(y, y.transpose(1, 2))
    some = torch.cat([products[:, m.first, m.second], y[:, [3, 0, 0]].flatten(1), y[..., m.square].flatten(1)], 1)
    return m.b(some.index_select(1, m.some)) + m.c(y[:, m.square].mean((1, 2)))


class Pairs(By):
    def __init__(self) -> None:
        super().__init__(_pairs, a=nn.Linear(8, 12), b=nn.Linear(5, 2), c=nn.Linear(3, 2))
        first, second = torch.tril_indices(4, 4, -1)
        for name, indices in (
            ("order", torch.tensor([7, 1, 0, 2, 3, 6, 5, 4])),
            ("first", first),
            ("second", second),
            ("some", torch.tensor([8, 0, 0, 11, 5])),
            ("square", torch.tensor([[0, 1], [2, -1]])),
        ):
            self.register_buffer(name, indices)


def _statistics(m: Any, x: Tensor) -> Tensor:
    """Statistics over steps, as of x-vectors, and features of length 1."""
    y = F.softplus(m.a(x))
    pooled = torch.cat([y.mean(1), y.std(1), y.var(dim=1, unbiased=False), torch.std(y, 1, correction=0)], 1)
    z = F.normalize(torch.erf(m.b(pooled)), dim=-1) + F.normalize(m.b(pooled), p=1.0, dim=1)
    lengths = z.norm(dim=1, keepdim=True) + torch.linalg.vector_norm(pooled, dim=-1).unsqueeze(-1)
    sizes = torch.linalg.norm(y, dim=(1, 2))[:, None]
    return z / (1 + lengths) + torch.atan(z) * y.var() + torch.expm1(z * 0.1) * sizes


def _norms(m: Any, x: Tensor) -> Tensor:
    return m.fc(F.relu(m.frozen(m.conv(x))).mean(dim=(-1, -2)))


def _places() -> nn.Parameter:
    return nn.Parameter(torch.randn(5, 8) * 0.1)


def _mlp(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for one, other in itertools.pairwise(sizes):
        layers += [nn.Linear(one, other), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _residual_layers() -> dict[str, nn.Module]:
    layers: dict[str, nn.Module] = {"stem": nn.Conv2d(3, 6, 3, padding=1), "stem_norm": nn.BatchNorm2d(6)}
    layers |= {"conv1": nn.Conv2d(6, 10, 3, 2, 1, bias=False), "norm1": nn.BatchNorm2d(10)}
    layers |= {"conv2": nn.Conv2d(10, 10, 3, padding=1), "norm2": nn.BatchNorm2d(10)}
    layers |= {"down": nn.Conv2d(6, 10, 1, 2), "down_norm": nn.BatchNorm2d(10)}
    return layers | {"relu": nn.ReLU(inplace=True), "fc": nn.Linear(10, 4)}


def _u_net_layers() -> dict[str, nn.Module]:
    sizes = {"a": (2, 5), "b": (5, 7), "c": (7, 9), "d": (13, 8), "e": (13, 3)}
    convs: dict[str, nn.Module] = {name: nn.Conv2d(*size, 3, padding=1) for name, size in sizes.items()}
    return {**convs, "up": nn.ConvTranspose2d(9, 6, 2, stride=2)}


def _sums_of_norms(m: Any, x: Tensor) -> Tensor:
    """Sums on either side of a norm, of values made before and behind it, and of other sizes; each with its bounds."""
    x = m.conv(x)
    y = F.relu6(m.norm1(x) + x)
    z = F.hardtanh(m.norm2(y), -0.5, 0.75)
    late = m.norm3(z)
    y = F.relu(torch.sigmoid(x) + late + y)
    y = F.relu6(m.wide(y.mean((2, 3), keepdim=True)) + y)
    return m.fc(F.relu6(m.rows(y.mean((2, 3)))))


class WithFrozen(By):
    """With a batch norm in eval mode, whatever the model's mode."""

    def train(self, mode: bool = True) -> "WithFrozen":
        super().train(mode)
        self.frozen.eval()  # type: ignore[operator, union-attr]
        return self


def _coordinates(m: Any, x: Tensor) -> Tensor:
    waves = [wave(x * 2.0**k) for k in range(2) for wave in (torch.sin, torch.cos)]
    h = m.body(torch.cat([x, x.sin(), *waves], -1))
    return torch.cat([torch.sigmoid(m.color(h)), torch.exp(-m.density(h))], -1)


def _flow(m: Any, x: Tensor) -> Tensor:
    logarithm = x.new_zeros(x.size(0))
    for scale, shift in zip(m.scales, m.shifts, strict=True):
        s = torch.tanh(scale(x))
        x = x * torch.exp(s) + shift(x) * torch.full_like(x, 0.25)
        logarithm = logarithm + s.sum(-1)
    return torch.cat([x, logarithm.unsqueeze(-1), torch.ones(x.shape[0], 2, dtype=x.dtype)], -1)


def _conv_lstm(m: Any, x: Tensor) -> Tensor:
    h = c = x.new_zeros(x.size(0), 4, x.size(3), x.size(4))
    for step in range(3):
        i, f, g, o = m.conv(torch.cat([x[:, step], h], 1)).chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
    return m.out(h)


def _repeats(m: Any, x: Tensor) -> Tensor:
    _, (h, _) = m.encoder(x)
    code = h[-1]
    y, _ = m.decoder(code.unsqueeze(1).repeat(1, x.size(1), 1))
    style = m.style(code).unsqueeze(1).expand(-1, x.size(1), -1)
    return m.out(y) * style + m.style(code).unsqueeze(1).expand(x.size(0), x.size(1), 3).sin()


def _squeeze_and_expand(m: Any, x: Tensor) -> Tensor:
    x = torch.relu(m.conv(x))
    gate = torch.sigmoid(m.wide(torch.relu(m.narrow(x.mean((2, 3)))))).view(x.size(0), -1, 1, 1)
    return m.out(x * gate.expand_as(x)) + gate[:, :2].expand_as(m.out(x))


def _shuffles_pixels(m: Any, x: Tensor) -> Tensor:
    h = m.body(F.pixel_unshuffle(m.act(m.first(x)), 2))
    return F.pixel_shuffle(m.ends(m.out(m.up(h))), 3)


def _uneven(m: Any, x: Tensor) -> Tensor:
    h = F.elu(m.space(m.norm(m.time(x))))
    return F.selu(m.valid(m.point(F.mish(m.late(h)))))


def _groups(m: Any, x: Tensor) -> Tensor:
    h = F.leaky_relu(m.instance(m.first(x)), 0.01, inplace=True)
    h = F.glu(m.group(m.second(h)), 1)
    h = m.plain(h) + F.group_norm(h, 2, m.scale, m.shift, eps=0.1)
    return F.interpolate(m.out(h), scale_factor=2)


def _points(m: Any, x: Tensor) -> Tensor:
    h = torch.relu(m.first(x))
    found = torch.cat([h.max(2)[0], torch.max(h, dim=-1, keepdim=True).values.squeeze(-1), m.pool(h).flatten(1)], 1)
    return m.fc(torch.cat([found, h.amax((1, 2), keepdim=True).squeeze(1), torch.amax(h, 2)], 1))


def _graph(m: Any, x: Tensor) -> Tensor:
    adjacency = torch.softmax(torch.matmul(x, x.transpose(1, 2)), -1)
    h = torch.relu(adjacency @ (x @ m.first))
    return torch.bmm(adjacency, h @ m.second)


def _arithmetic(m: Any, x: Tensor) -> Tensor:
    h = m.first(x)
    parts = [h.abs(), torch.log1p(h**2), (h.pow(2) + 0.5).sqrt(), torch.log(torch.square(h) + 1), abs(h) ** 3]
    parts += [torch.rsqrt(h * h + 1), h.clamp(-0.4, 0.3), h.clamp(min=0), torch.clamp_max(h, 0.2), (h * h + 1) ** 0.5]
    return m.out(torch.cat(parts, -1)).clip(max=2.0)


def _sizes_of_images(m: Any, x: Tensor) -> Tensor:
    """As of feature pyramids: images become as large as others, and pools are as large as images."""
    a = m.drop(m.slopes(m.a(x)))
    b = m.slope(m.b(F.max_pool2d(a, 3, 2)))
    a = a + F.interpolate(b, size=a.shape[2:]) + F.interpolate(b, (a.size(2), a.size(3)), mode="bilinear")
    a = a + F.interpolate(m.drop(b), a.shape[-2:], mode="bilinear", align_corners=True)
    pooled = F.max_pool2d(a, a.shape[2:]) + F.avg_pool2d(b, b.size()[2:]) + F.avg_pool2d(a, (a.size(2), a.size(3)))
    y = F.dropout2d(m.unflatten(m.fc(pooled.flatten(1))), 0.3, m.training)
    return m.c(F.softsign(y)).unflatten(1, (2, -1)).flatten(1)


def _attentions(m: Any, x: Tensor) -> Tensor:
    """Attention by torch's module and by its function."""
    y, _ = m.attention(x, x, x)
    y = m.norm(x + y)
    q, k, v = m.qkv(y).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
    z = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.2 if m.training else 0.0)
    y = y + z.transpose(1, 2).flatten(2)
    y = y + F.scaled_dot_product_attention(y, y[:, 1:], y[:, 1:, :], scale=0.5)
    y = y + F.scaled_dot_product_attention(y, y, y, is_causal=True)
    return F.rms_norm(m.out(y.mT @ y), (8,), eps=0.01).mean(1)


def _by_blocks(m: Any, x: Tensor) -> Tensor:
    """Attention that torch computes block by block. It has no second derivative, in torch neither."""
    q, k, v = m.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
    y = F.scaled_dot_product_attention(q, k, v) + F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return m.out((y + F.scaled_dot_product_attention(q, k, v, scale=0.3)).transpose(1, 2).flatten(2))


def _positions(m: Any, x: Tensor) -> Tensor:
    """Rows of a table, and parts of parameters, as many as there are steps."""
    y = m.fc(x) + m.table[:, : x.shape[1]] + m.words(torch.arange(x.size(1)))
    y = y + m.words(torch.arange(0, x.shape[1], dtype=torch.long).unsqueeze(0)) * m.words(torch.arange(4)[None]).sum(1)
    return m.out(y.tanh()) + m.last[1 : x.size(1), :].mean(0).unsqueeze(0)


def _encoder_layer(**settings: Any) -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, **settings)


MODELS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "residual": (lambda: By(_residual, **_residual_layers()), (4, 3, 9, 8)),
    "u-net": (lambda: By(_u_net, **_u_net_layers()), (2, 2, 12, 8)),
    "borders": (
        lambda: By(
            _borders,
            reflect=nn.Conv2d(3, 4, 3, padding=(2, 1), padding_mode="reflect"),
            replicate=nn.ReplicationPad2d((1, 0, 2, 1)),
            shuffle=nn.ChannelShuffle(2),
            out=nn.Conv2d(4, 5, 3, padding=1, padding_mode="circular"),
            fc=nn.Linear(5, 2),
        ),
        (3, 3, 6, 5),
    ),
    "pairs": (Pairs, (5, 8)),
    "weight norms": (
        lambda: nn.Sequential(
            weight_norm(nn.Conv2d(3, 8, 3)),
            *(nn.ReLU(), nn.MaxPool2d(2), weight_norm(nn.ConvTranspose2d(8, 4, 2, 2), dim=1), nn.Flatten()),
            *(weight_norm(nn.Linear(256, 6), dim=None), nn.Tanh(), weight_norm(nn.Linear(6, 6), dim=1)),
        ),
        (3, 3, 10, 11),
    ),
    "statistics": (lambda: By(_statistics, a=nn.Linear(8, 6), b=nn.Linear(24, 5)), (4, 7, 8)),
    "gate": (
        lambda: By(
            _gate, conv=nn.Conv2d(4, 4, 3, padding=1), narrow=nn.Linear(4, 3), wide=nn.Linear(3, 4), fc=nn.Linear(80, 3)
        ),
        (3, 4, 4, 5),
    ),
    "attention": (
        lambda: By(
            _attention, norm=nn.LayerNorm(8), qkv=nn.Linear(8, 24), out=nn.Linear(8, 8), mlp=_mlp(8, 16, 8),
            head=nn.Linear(8, 3), drop=nn.Dropout(0.2), places=_places(),
        ),
        (3, 5, 8),
    ),
    "sizes of images": (
        lambda: By(
            _sizes_of_images, a=nn.Conv2d(3, 6, 3), b=nn.Conv2d(6, 6, 2), c=nn.Conv2d(2, 4, 2), drop=nn.Dropout2d(0.4),
            slopes=nn.PReLU(6), slope=nn.PReLU(), fc=nn.Linear(6, 12), unflatten=nn.Unflatten(1, (2, 3, 2)),
        ),
        (4, 3, 12, 9),
    ),
    "heads": (
        lambda: By(
            _attentions, attention=nn.MultiheadAttention(8, 2, 0.2, batch_first=True), norm=nn.RMSNorm(8),
            qkv=nn.Linear(8, 24), out=nn.Linear(8, 8),
        ),
        (3, 5, 8),
    ),
    "positions": (
        lambda: By(
            _positions, fc=nn.Linear(3, 6), words=nn.Embedding(9, 6), out=nn.Linear(6, 2),
            table=nn.Parameter(torch.randn(1, 8, 6)), last=nn.Parameter(torch.randn(7, 2)),
        ),
        (4, 5, 3),
    ),
    "encoder": (
        lambda: nn.Sequential(
            nn.TransformerEncoder(_encoder_layer(), 2, nn.LayerNorm(8), enable_nested_tensor=False), nn.Linear(8, 3)
        ),
        (3, 5, 8),
    ),
    "encoder, norms first": (
        lambda: nn.Sequential(
            nn.TransformerEncoderLayer(8, 4, 12, activation="gelu", norm_first=True, bias=False), nn.Linear(8, 3),
        ),
        (5, 3, 8),
    ),
    "cells": (lambda: By(_cells, cell=nn.LSTMCell(3, 6), fc=nn.Linear(6, 2)), (5, 4, 3)),
    "gru cells": (lambda: By(_gru_cells, cell=nn.GRUCell(3, 6), fc=nn.Linear(6, 2)), (5, 3, 3)),
    "rnn cells": (lambda: By(_gru_cells, cell=nn.RNNCell(3, 6, nonlinearity="relu"), fc=nn.Linear(6, 2)), (5, 3, 3)),
    "encoder and decoder": (
        lambda: By(
            _encoder_decoder, encoder=nn.LSTM(3, 6, 2, batch_first=True), decoder=nn.LSTM(3, 6, 2, batch_first=True),
            fc=nn.Linear(6, 2),
        ),
        (4, 5, 3),
    ),
    "both results": (lambda: By(_both_results, rnn=nn.GRU(3, 5, 2, batch_first=True)), (4, 6, 3)),
    "speech": (
        lambda: By(
            _speech, conv=nn.Conv1d(3, 6, 3, 2), norm=nn.BatchNorm1d(6),
            rnn=nn.GRU(6, 4, bidirectional=True, batch_first=True), score=nn.Linear(8, 1), fc=nn.Linear(8, 3),
        ),
        (4, 3, 15),
    ),
    "duel": (
        lambda: By(_duel, body=_mlp(6, 9, 9), value=nn.Linear(9, 1), advantage=nn.Linear(9, 4)), (5, 6)
    ),
    "tied": (lambda: By(_tied, weight=nn.Parameter(torch.randn(6, 6) / 3), bias=nn.Parameter(torch.zeros(6))), (5, 6)),
    "shared": (lambda: By(_shared, layer=nn.Linear(6, 6), other=nn.Linear(6, 6)), (5, 6)),
    "gated": (
        lambda: By(
            _gated, convs=nn.ModuleList([nn.Conv1d(4, 8, 3) for _ in range(3)]),
            mixes=nn.ModuleList([nn.Conv1d(4, 4, 1) for _ in range(3)]), out=nn.Conv1d(4, 2, 1),
        ),
        (3, 4, 11),
    ),
    "views": (lambda: By(_views, a=nn.Linear(5, 8), b=nn.Linear(14, 3)), (4, 4, 5)),
    "sizes": (lambda: By(_sizes, a=nn.Conv1d(4, 4, 3, padding=1), b=nn.Linear(4, 6)), (3, 4, 10)),
    "pools": (
        lambda: By(
            _pools, conv=nn.Conv2d(3, 6, 3), average=nn.AdaptiveAvgPool2d((2, 1)), drop=nn.Dropout(0.4),
            fc=nn.Linear(12, 3),
        ),
        (4, 3, 9, 8),
    ),
    "sums of norms": (
        lambda: By(
            _sums_of_norms, conv=nn.Conv2d(3, 8, 3, padding=1), norm1=nn.BatchNorm2d(8), norm2=nn.BatchNorm2d(8),
            norm3=nn.BatchNorm2d(8, affine=False), wide=nn.BatchNorm2d(8), rows=nn.BatchNorm1d(8), fc=nn.Linear(8, 3),
        ),
        (4, 3, 9, 8),
    ),
    "coordinates": (
        lambda: By(_coordinates, body=_mlp(18, 16, 16), density=nn.Linear(16, 1), color=nn.Linear(16, 3)), (7, 3)
    ),
    "flow": (
        lambda: By(
            _flow, scales=nn.ModuleList([nn.Linear(6, 6) for _ in range(3)]),
            shifts=nn.ModuleList([nn.Linear(6, 6) for _ in range(3)]),
        ),
        (5, 6),
    ),
    "conv lstm": (lambda: By(_conv_lstm, conv=nn.Conv2d(6, 16, 3, padding=1), out=nn.Conv2d(4, 1, 1)), (2, 3, 2, 6, 5)),
    "sequence autoencoder": (
        lambda: By(
            _repeats, encoder=nn.LSTM(3, 6, batch_first=True), decoder=nn.GRU(6, 5, batch_first=True),
            out=nn.Linear(5, 3), style=nn.Linear(6, 3),
        ),
        (4, 5, 3),
    ),
    "squeeze and expand": (
        lambda: By(
            _squeeze_and_expand, conv=nn.Conv2d(3, 8, 3, padding=1), narrow=nn.Linear(8, 2), wide=nn.Linear(2, 8),
            out=nn.Conv2d(8, 2, 1),
        ),
        (3, 3, 6, 5),
    ),
    "super-resolution": (
        lambda: By(
            _shuffles_pixels, first=nn.Conv2d(2, 4, 3, padding=1), body=nn.Conv2d(16, 16, 3, padding=1),
            up=nn.PixelShuffle(2), out=nn.Conv2d(4, 18, 1), act=nn.Mish(), ends=nn.SELU(),
        ),
        (2, 2, 6, 8),
    ),
    "uneven padding": (
        lambda: By(
            _uneven, time=nn.Conv2d(1, 4, (1, 6), padding="same", bias=False), norm=nn.BatchNorm2d(4),
            space=nn.Conv2d(4, 8, (5, 1), groups=4), late=nn.Conv2d(8, 8, (1, 4), padding="same", groups=8),
            point=nn.Conv2d(8, 3, 1, padding="valid"), valid=nn.Conv2d(3, 3, (1, 2), padding="valid"),
        ),
        (3, 1, 5, 16),
    ),
    "groups": (
        lambda: By(
            _groups, first=nn.Conv2d(3, 4, 3, padding=1), instance=nn.InstanceNorm2d(4, affine=True),
            second=nn.Conv2d(4, 8, 3), group=nn.GroupNorm(2, 8), plain=nn.InstanceNorm2d(4), out=nn.Conv2d(4, 2, 1),
            scale=nn.Parameter(torch.rand(4) + 0.5), shift=nn.Parameter(torch.rand(4)),
        ),
        (3, 3, 7, 6),
    ),
    "points": (
        lambda: By(_points, first=nn.Conv1d(3, 6, 1), pool=nn.AdaptiveMaxPool1d(1), fc=nn.Linear(25, 3)), (4, 3, 11)
    ),
    "graph convolution": (
        lambda: By(_graph, first=nn.Parameter(torch.randn(4, 6) / 2), second=nn.Parameter(torch.randn(6, 3) / 3)),
        (3, 5, 4),
    ),
    "arithmetic": (lambda: By(_arithmetic, first=nn.Linear(3, 4), out=nn.Linear(40, 2)), (6, 3)),
    "frozen statistics": (
        lambda: WithFrozen(
            _norms, conv=nn.Conv2d(3, 6, 3, groups=3, dilation=2), frozen=nn.BatchNorm2d(6), fc=nn.Linear(6, 3)
        ),
        (4, 3, 9, 8),
    ),
}  # fmt: skip


def _pair(make: Callable[[], nn.Module], dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = make().to(dtype).train()
    return model, copy.deepcopy(model)


def _follow(
    models: tuple[nn.Module, nn.Module], loss: Callable[[Any, Any], Tensor], inputs: Sequence[Tensor], target: Any,
    how: str, tolerance: float,
) -> None:  # fmt: skip
    """Some steps of both, from the same seeds."""
    stock, mine = models
    # Adam makes a whole step of a gradient that is nothing but rounding, as of a bias before a batch norm.
    kind = torch.optim.Adam if tolerance < 1e-6 else torch.optim.SGD
    theirs, ours = (kind(model.parameters(), 0.01) for model in models)
    step = fastnn.training_step(mine, loss, ours, strict=True, max_norm=5.0)
    if isinstance(target, Tensor):  # (how many tensors a target has is not known before the first step)
        assert step.explain().startswith(how)
    for number in range(4):
        torch.manual_seed(number)
        theirs.zero_grad()
        expected = loss(stock(*inputs), target)
        expected.backward()
        nn.utils.clip_grad_norm_(stock.parameters(), 5.0)
        theirs.step()
        after = torch.get_rng_state()
        torch.manual_seed(number)
        found = step(inputs[0] if len(inputs) == 1 else tuple(inputs), target)
        assert_close(found, expected.detach(), rtol=tolerance, atol=tolerance)
        assert torch.equal(torch.get_rng_state(), after)
        assert step.explain().startswith(how)
        assert "ordinary" not in step.explain(), step.explain()
    assert_close(mine.state_dict(), stock.state_dict(), rtol=tolerance, atol=tolerance)
    for p, q in zip(mine.parameters(), stock.parameters(), strict=True):
        assert ours.state.keys() >= {p} or q not in theirs.state
        if q in theirs.state:
            assert_close(ours.state[p], theirs.state[q], rtol=tolerance, atol=tolerance)


CASES = [(name, torch.contiguous_format) for name in MODELS]
CASES += [(name, torch.channels_last) for name, (_, sizes) in MODELS.items() if len(sizes) == 4]


@pytest.mark.parametrize("steps", [1, 6, 70])
def test_attention_by_blocks(steps: int) -> None:
    models = _pair(lambda: By(_by_blocks, qkv=nn.Linear(8, 24), out=nn.Linear(8, 3)), torch.float64)
    x = torch.randn(2, steps, 8, dtype=torch.float64)
    _follow(models, F.mse_loss, [x], torch.randn(2, steps, 3, dtype=torch.float64), "one operator call", 1e-8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("name", "memory_format"), CASES)
def test_networks(name: str, memory_format: torch.memory_format, dtype: torch.dtype) -> None:
    make, sizes = MODELS[name]
    models = _pair(make, dtype)
    x = torch.randn(sizes, dtype=dtype).to(memory_format=memory_format)
    target = torch.randn(copy.deepcopy(models[0])(x).shape, dtype=dtype)
    _follow(models, F.mse_loss, [x], target, "one operator call", 1e-9 if dtype == torch.float64 else 1e-3)


@pytest.mark.parametrize("trains", [False, True])
def test_indices_that_a_buffer_holds_are_read_at_every_call(trains: bool) -> None:
    stock, mine = _pair(Pairs, torch.float64)
    x, target = torch.randn(5, 8, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    fastnn.fuse(mine)
    theirs, ours = (torch.optim.SGD(model.parameters(), 0.1) for model in (stock, mine))
    step = fastnn.training_step(mine, F.mse_loss, ours)
    for indices in ([7, 1, 0, 2, 3, 6, 5, 4], [0] * 8, [-1, 3, 5, 7, 0, 2, 4, 6]):
        for model in (stock, mine):
            model.get_buffer("order").copy_(torch.tensor(indices))
        if trains:
            theirs.zero_grad()
            expected = F.mse_loss(stock(x), target)
            expected.backward()
            theirs.step()
            assert_close(step(x, target), expected.detach())
            assert step.explain().startswith("one operator call")
        else:
            with torch.no_grad():
                assert_close(mine(x), stock(x))
    stock.get_buffer("order")[0] = mine.get_buffer("order")[0] = 8
    for model in (stock, mine):
        with pytest.raises((IndexError, RuntimeError), match=r"index 8 is out of bounds for dimension \d with size 8"):
            model(x)


def test_norms_and_deviations_of_zeros() -> None:
    """Their derivatives are 0, as torch has them, although a square root has none at 0."""
    stock, mine = _pair(lambda: By(_lengths, a=nn.Linear(4, 6), b=nn.Linear(6, 3)), torch.float64)
    fastnn.fuse(mine)
    x = torch.randn(5, 4, dtype=torch.float64)
    for model in (stock, mine):
        with torch.no_grad():
            model.get_parameter("a.weight")[:3] = 0
            model.get_parameter("a.bias")[:3] = 0
        x_own = x.clone().index_fill(0, torch.tensor([1, 3]), 0).requires_grad_()
        model(x_own).square().sum().backward()
        model.x_grad = x_own.grad
    assert_close(mine.x_grad, stock.x_grad)
    assert not stock.x_grad.isnan().any()
    assert_close([p.grad for p in mine.parameters()], [p.grad for p in stock.parameters()])


def _lengths(m: Any, x: Tensor) -> Tensor:
    y = torch.tanh(m.a(x))
    return m.b(F.normalize(y, dim=1)) * y.norm(dim=1, keepdim=True) + y[:, :3].std(1, keepdim=True) + y[:, :3].norm()


def test_group_norm_of_images_with_channels_last_that_need_no_gradient() -> None:
    """torch's own backward crashes here."""
    model = nn.Sequential(nn.GroupNorm(2, 8), nn.Conv2d(8, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2)).double()
    images, target = torch.randn(3, 8, 6, 6, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    F.mse_loss(model(images), target).backward()
    expected = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    step = fastnn.training_step(model, F.mse_loss, torch.optim.SGD(model.parameters(), 0.0))
    step(images.contiguous(memory_format=torch.channels_last), target)
    step.accumulate(images.contiguous(memory_format=torch.channels_last), target)
    assert_close([parameter.grad for parameter in model.parameters()], expected)


def test_two_inputs_and_an_embedding() -> None:
    def forward(m: Any, x: Tensor, y: Tensor) -> Tensor:
        return m.fc(torch.cat([m.words(x).mean(1), m.body(y)], dim=-1))

    def make() -> nn.Module:
        return OfTwo(forward, words=nn.Embedding(9, 4, padding_idx=0), body=_mlp(3, 6), fc=nn.Linear(10, 5))

    torch.manual_seed(1)
    inputs = [torch.randint(0, 9, (6, 4)), torch.randn(6, 3, dtype=torch.float64)]
    _follow(
        _pair(make, torch.float64), F.cross_entropy, inputs, torch.randint(0, 5, (6,)), "one operator call", 1e-9
    )  # fmt: skip


def test_hardsigmoid() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.fc(x * m.hard(m.gate(x))) + F.hardsigmoid(m.fc(x))

    def make() -> nn.Module:
        return By(forward, gate=nn.Linear(5, 5), hard=nn.Hardsigmoid(), fc=nn.Linear(5, 2))

    # In single precision alone: torch's gradient has the factor 1/6 in single precision, whatever the dtype.
    models, x = _pair(make, torch.float32), torch.randn(9, 5) * 4
    assert_close(fastnn.freeze(models[0], x)(x), models[0](x))
    _follow(models, F.mse_loss, [x], torch.randn(9, 2), "one operator call", 1e-5)


def test_a_table_with_a_column_for_each_embedding() -> None:
    def forward(m: Any, numbers: Tensor, y: Tensor) -> Tensor:
        found = [embedding(numbers[:, i]) for i, embedding in enumerate(m.embeddings)]
        return m.fc(torch.cat([*found, m.embeddings[2](numbers[:, -1]), y], dim=-1))

    def make() -> nn.Module:
        embeddings = nn.ModuleList([nn.Embedding(rows, 3) for rows in (4, 9, 5)])
        return OfTwo(forward, embeddings=embeddings, fc=nn.Linear(14, 2))

    torch.manual_seed(1)
    inputs = [torch.randint(0, 4, (6, 3)), torch.randn(6, 2, dtype=torch.float64)]
    for numbers in (inputs[0], inputs[0].t().contiguous().t()):
        models = _pair(make, torch.float64)
        target = torch.randn(6, 2, dtype=torch.float64)
        _follow(models, F.mse_loss, [numbers, inputs[1]], target, "one operator call", 1e-9)
    fused, frozen = fastnn.fuse(copy.deepcopy(models[0])), fastnn.freeze(models[0], tuple(inputs))
    assert isinstance(frozen, fastnn.FrozenModel)
    with torch.no_grad():
        for batch in (6, 1, 4):
            given = [one[:batch] for one in inputs]
            expected = models[0](*given)
            assert_close(frozen(*given), expected)
            assert_close(fused(*given), expected)
    wrong = inputs[0].clone()
    wrong[3, 1] = 9
    for run in (models[0], fused, frozen):
        with pytest.raises((IndexError, RuntimeError), match="index out of range"):
            run(wrong, inputs[1])


def test_a_padding_that_is_counted_from_the_end() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return F.embedding(x, m.table, padding_idx=-2).mean(1)

    x = torch.tensor([[0, 3, 3], [4, 3, 1]])
    models = _pair(lambda: By(forward, table=nn.Parameter(torch.randn(5, 4))), torch.float64)
    _follow(models, F.mse_loss, [x], torch.randn(2, 4).double(), "one operator call", 1e-9)


def test_a_tagger() -> None:
    def make() -> nn.Module:
        return By(
            _tagger, embedding=nn.Embedding(20, 5), rnn=nn.LSTM(5, 4, batch_first=True, bidirectional=True),
            fc=nn.Linear(8, 6),
        )  # fmt: skip

    x, y = torch.randint(0, 20, (3, 7)), torch.randint(0, 6, (3, 7))
    _follow(_pair(make, torch.float64), F.cross_entropy, [x], y, "one operator call", 1e-9)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_one_sequence_without_a_batch(kind: str, batch_first: bool) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        output, state = m.rnn(x)
        h = state[0] if m.rnn.mode == "LSTM" else state
        return torch.cat([m.fc(output), m.fc(output[:1] * h[0])])

    def make() -> nn.Module:
        return By(forward, rnn=getattr(nn, kind)(3, 4, 2, batch_first=batch_first), fc=nn.Linear(4, 2))

    x = torch.randn(5, 3, dtype=torch.float64)
    _follow(_pair(make, torch.float64), F.mse_loss, [x], torch.randn(6, 2).double(), "one operator call", 1e-9)


def test_the_last_step_of_one_sequence() -> None:
    """Of a sequence without a batch, [:, -1] are the last features of all steps."""

    def last(m: Any, x: Tensor) -> Tensor:
        return m.fc(m.rnn(x)[0][:, -1])

    stock, mine = _pair(lambda: By(last, rnn=nn.GRU(3, 5, batch_first=True), fc=nn.Linear(5, 2)), torch.float64)
    x = torch.randn(5, 3, dtype=torch.float64)
    theirs, ours = (torch.optim.SGD(model.parameters(), 0.1) for model in (stock, mine))
    step = fastnn.training_step(mine, F.mse_loss, ours, strict=True)
    target = torch.randn(2, dtype=torch.float64)
    for _ in range(6):
        theirs.zero_grad()
        expected = F.mse_loss(stock(x), target)
        expected.backward()
        theirs.step()
        assert_close(step(x, target), expected.detach())
        assert "the last step went the ordinary way" in step.explain()
    assert_close(mine.state_dict(), stock.state_dict())


@pytest.mark.parametrize("forward", [_heads, _named_heads])
def test_several_results(forward: Callable[..., Any]) -> None:
    def loss(results: Any, target: tuple[Tensor, Tensor]) -> Tensor:
        policy, value = results.values() if isinstance(results, dict) else results
        return F.nll_loss(policy, target[0]) + F.smooth_l1_loss(value, target[1])

    def make() -> nn.Module:
        return By(forward, body=nn.Linear(4, 8), policy=nn.Linear(8, 3), value=nn.Linear(8, 1))

    x = torch.randn(6, 4, dtype=torch.float64)
    target = torch.randint(0, 3, (6,)), torch.randn(6, dtype=torch.float64)
    _follow(_pair(make, torch.float64), loss, [x], target, "one operator call", 1e-9)


def test_noise_between() -> None:
    def loss(results: Any, target: Tensor) -> Tensor:
        y, mean, log_variance = results
        return F.mse_loss(y, target) - 0.5 * (1 + log_variance - mean**2 - log_variance.exp()).mean()

    def make() -> nn.Module:
        return By(
            _vae, encoder=nn.Sequential(nn.Linear(7, 9), nn.ReLU()), mean=nn.Linear(9, 3), log_variance=nn.Linear(9, 3),
            decoder=_mlp(3, 9, 7),
        )  # fmt: skip

    x = torch.randn(6, 7, dtype=torch.float64)
    _follow(_pair(make, torch.float64), loss, [x], x, "one operator call", 1e-9)


def test_a_result_that_the_loss_leaves_alone() -> None:
    """Stock gives the parameters of that result no gradient, so that the optimizer leaves them alone."""

    def make() -> nn.Module:
        return By(_heads, body=nn.Linear(4, 8), policy=nn.Linear(8, 3), value=nn.Linear(8, 1))

    stock, mine = _pair(make, torch.float64)
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.randint(0, 3, (6,))
    theirs, ours = (torch.optim.AdamW(model.parameters(), 0.01) for model in (stock, mine))
    step = fastnn.training_step(mine, lambda results, target: F.nll_loss(results[0], target), ours)
    for _ in range(3):
        theirs.zero_grad()
        expected = F.nll_loss(stock(x)[0], y)
        expected.backward()
        theirs.step()
        assert_close(step(x, y), expected.detach())
    assert_close(mine.state_dict(), stock.state_dict())


def test_changes_in_place_that_others_see_take_the_ordinary_way() -> None:
    def seen_later(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        view = y[:, :2]
        y += 1.0
        return m.b(y) + view.sum()

    def of_the_input(m: Any, x: Tensor) -> Tensor:
        x.mul_(2.0)
        return m.b(m.a(x))

    for forward in (seen_later, of_the_input):
        model = By(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 4))
        with pytest.raises(ValueError, match="changes a tensor that others see"):
            fastnn.training_step(model, F.mse_loss, torch.optim.SGD(model.parameters(), 0.1), strict=True)


@pytest.mark.parametrize("function", [F.relu, F.relu6, F.silu, F.hardswish])
def test_inplace_given_by_position_is_a_change_in_place(function: Callable[..., Tensor]) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        function(y, True)
        return m.b(y)

    model = By(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    x = torch.randn(3, 4)
    expected = F.mse_loss(model(x), x)
    step = fastnn.training_step(model, F.mse_loss, torch.optim.SGD(model.parameters(), 0.1))
    assert_close(step(x, x), expected.detach())
    assert "changes a tensor that others see" in step.explain()


def test_changes_in_place_that_stock_refuses_are_refused() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = torch.tanh(m.a(x))
        y += 1.0  # tanh's backward needs what it gave
        return m.b(y)

    model = By(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    x = torch.randn(3, 4)
    with pytest.raises(ValueError, match="changes a tensor that backward may need"):
        fastnn.training_step(model, F.mse_loss, torch.optim.SGD(model.parameters(), 0.1), strict=True)
    step = fastnn.training_step(model, F.mse_loss, torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        step(x, x)


def test_a_tie_that_is_broken_is_seen() -> None:
    stock, mine = _pair(lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), torch.float64)
    for model in (stock, mine):
        model[2].weight = model[0].weight  # type: ignore[index]
    x = torch.randn(5, 4, dtype=torch.float64)
    theirs, ours = (torch.optim.SGD(model.parameters(), 0.1) for model in (stock, mine))
    step = fastnn.training_step(mine, F.mse_loss, ours, strict=True)

    def both() -> None:
        theirs.zero_grad()
        expected = F.mse_loss(stock(x), x)
        expected.backward()
        theirs.step()
        assert_close(step(x, x), expected.detach())
        assert_close(mine.state_dict(), stock.state_dict())

    both()
    for model, optimizer in ((stock, theirs), (mine, ours)):
        own = nn.Parameter(model[2].weight.detach().clone())  # type: ignore[index]
        model[2].weight = own  # type: ignore[index]
        optimizer.add_param_group({"params": [own], "lr": 0.2})
    for _ in range(3):
        both()


def _convolved(
    x: Tensor, parameters: Sequence[Tensor], attributes: str, gradient: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """A convolution that nothing follows, of x and a parameter of its size -> output, the parameters' gradients."""
    names = ["w0", "w1", "w2"][: len(parameters)]
    bias = " bias=w2" if len(parameters) > 2 else ""
    lines = ["fastnn.network 1", "input -> x", *(f"weight -> {name}" for name in names)]
    lines += ["binary input=x other=w0 -> v function=add", f"conv input=v weight=w1{bias} -> y {attributes}"]
    own = [parameter.clone() for parameter in parameters]
    outputs, kept = torch.ops.fastnn.network_with_pass([x], own, "\n".join([*lines, "output input=y"]))
    given = torch.ones(1).to(x).expand(outputs[0].shape) if gradient is None else gradient
    layout = [0, 0] * len(own)
    numbers = torch.tensor([0.0, 1, 0, 0, 0, -1, 0.0, *[0] * 5], dtype=torch.float64)  # SGD with a rate of 0
    return outputs[0], torch.ops.fastnn.training_step_backward([given], kept, own, [], layout, numbers, True)


def _stock_convolved(
    x: Tensor, parameters: Sequence[Tensor], gradient: Tensor | None, padding: Sequence[int], groups: int
) -> tuple[Tensor, list[Tensor]]:
    own = [parameter.clone().requires_grad_() for parameter in parameters]
    output = F.conv2d(x + own[0], *own[1:], padding=tuple(padding), groups=groups)
    given = torch.ones_like(output) if gradient is None else gradient
    return output.detach(), list(torch.autograd.grad(output, own, given))


CONVOLUTIONS = [
    # input, outputs, padding, groups
    ((1, 64, 15, 13), 64, (1, 1), 1),
    ((2, 64, 9, 23), 72, (0, 2), 1),
    ((2, 70, 14, 14), 64, (2, 1), 1),
    ((1, 128, 16, 11), 160, (1, 0), 2),
    ((2, 512, 4, 4), 64, (1, 1), 1),
    ((5, 320, 7, 7), 320, (1, 1), 1),
    ((2, 3, 17, 16), 5, (1, 1), 1),  # torch's
    ((1, 6, 7, 8), 6, (1, 1), 6),
]


class TestPlainConvolutions:
    """Convolutions with no activation, as before a batch norm, which run by our kernels where these multiply less."""

    @staticmethod
    def draw(size: tuple[int, ...], outputs: int, groups: int, dtype: torch.dtype, has_bias: bool) -> list[Tensor]:
        """x, and the parameters: as many numbers to be added to x, a weight, a bias."""
        torch.manual_seed(0)
        taps = torch.randn(outputs, size[1] // groups, 3, 3, dtype=dtype) / (3 * (size[1] // groups) ** 0.5)
        tensors = [torch.randn(size, dtype=dtype), torch.randn(size, dtype=dtype) / 8, taps]
        return [*tensors, torch.randn(outputs, dtype=dtype)] if has_bias else tensors

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
    def test_sizes(self, instruction_set: str, memory_format: torch.memory_format, dtype: torch.dtype) -> None:
        """Against float64; by one thread and by two; and of a gradient in either format, or of one number."""
        for number, (size, outputs, padding, groups) in enumerate(CONVOLUTIONS):
            x, *parameters = self.draw(size, outputs, groups, dtype, has_bias=number % 2 == (dtype is torch.float32))
            x = x.to(memory_format=memory_format)
            attributes = f"padding={padding[0]},{padding[1]} groups={groups}"
            shape = F.conv2d(x, parameters[1], padding=padding, groups=groups).shape
            gradient = torch.randn(shape, dtype=dtype)
            wide = (tensor.double() for tensor in (x, *parameters))
            for given in (gradient, gradient.to(memory_format=torch.channels_last), None):
                output, found = _convolved(x, parameters, attributes, given)
                stock, theirs = _stock_convolved(x, parameters, given, padding, groups)
                if given is gradient:
                    first, *others = wide
                    exact, right = _stock_convolved(first, others, given.double(), padding, groups)
                    assert_close_to_reference([output, *found], [stock, *theirs], [exact, *right], f"{size}")
                    alike = [output, *found]
                assert output.stride() == stock.stride()
                assert torch.equal(output, alike[0])
                if given is None:
                    for one, other in zip(found, theirs, strict=True):
                        assert_close(one, other, rtol=1e-4, atol=1e-3)
                else:
                    assert all(map(torch.equal, found, alike[1:]))
                with using_threads(2):
                    output, again = _convolved(x, parameters, attributes, given)
                if min(size[1], outputs) >= 64:  # the others may be torch's
                    assert torch.equal(output, alike[0])
                    assert all(map(torch.equal, again, found))

    @pytest.mark.parametrize("special", [torch.nan, torch.inf, -torch.inf, 1e30])
    @pytest.mark.parametrize("of", ["x", "weight", "gradient"])
    def test_special_values_stay_in_their_places(self, instruction_set: str, special: float, of: str) -> None:
        x, *parameters = self.draw((2, 64, 15, 13), 64, 1, torch.float32, True)
        gradient = torch.randn(2, 64, 15, 13)
        {"x": x, "weight": parameters[1], "gradient": gradient}[of][1, 3, 1, 1] = special
        output, found = _convolved(x, parameters, "padding=1", gradient)
        wide = [parameter.double() for parameter in parameters]
        exact, right = _stock_convolved(x.double(), wide, gradient.double(), (1, 1), 1)
        for one, reference in zip([output, *found], [exact, *right], strict=True):
            assert torch.equal(one.isfinite(), reference.isfinite())
            assert torch.equal(one.isnan(), reference.isnan())
            if special == 1e30:
                small = reference.abs() < 1e20
                assert_close(one[small].double(), reference[small], rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
    def test_a_residual_block(self, memory_format: torch.memory_format) -> None:
        def forward(m: Any, x: Tensor) -> Tensor:
            y = F.relu(m.norm1(m.conv1(x)))
            y = F.relu(m.norm2(m.conv2(y)) + x)
            return F.dropout(m.down_norm(m.down(y)), 0.1, m.training)

        def make() -> nn.Module:
            layers: dict[str, nn.Module] = {f"conv{i}": nn.Conv2d(64, 64, 3, padding=1, bias=False) for i in (1, 2)}
            layers |= {f"norm{i}": nn.BatchNorm2d(64) for i in (1, 2)}
            return By(forward, **layers, down=nn.Conv2d(64, 80, 1, 2), down_norm=nn.BatchNorm2d(80))

        for dtype, tolerance in ((torch.float32, 1e-3), (torch.float64, 1e-9)):
            x = torch.randn(2, 64, 15, 17, dtype=dtype).to(memory_format=memory_format)
            target = torch.randn(2, 80, 8, 9, dtype=dtype)
            _follow(_pair(make, dtype), F.mse_loss, [x], target, "one operator call", tolerance)


@pytest.mark.parametrize("seed", range(200))
def test_random_networks(seed: int) -> None:
    check_training(seed)


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 0.5


@pytest.mark.parametrize("change", ["another parametrization", "another dimension", "none any more"])
def test_a_weight_norm_that_changes_between_steps(change: str) -> None:
    models = []
    for _ in range(2):  # (Copies have one class in common, from which torch takes what computes the weight.)
        torch.manual_seed(0)
        layer = weight_norm(nn.Linear(6, 6))
        models.append(nn.Sequential(layer, nn.Tanh(), layer))
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    step, x, target = fastnn.training_step(models[1], nn.MSELoss(), optimizers[1]), torch.randn(5, 6), torch.randn(5, 6)
    for changes in range(3):
        for _ in range(2):
            optimizers[0].zero_grad()
            loss = F.mse_loss(models[0](x), target)
            loss.backward()
            optimizers[0].step()
            torch.testing.assert_close(step(x, target), loss.detach())
        assert changes or step.explain().startswith("one operator call")
        for model in models:
            parts = model[0].parametrizations.weight if hasattr(model[0], "parametrizations") else None
            if change == "another parametrization":
                parametrize.register_parametrization(model[0], "weight", Halved())
            elif change == "another dimension":
                parts[0].dim = -1 if parts[0].dim == 0 else 0
                parts.original0 = nn.Parameter(torch.ones(()) if parts[0].dim == -1 else torch.ones(6, 1))
            elif parts is not None:
                parametrize.remove_parametrizations(model[0], "weight")
        for optimizer, model in zip(optimizers, models, strict=True):
            optimizer.param_groups[0]["params"] = list(model.parameters())
