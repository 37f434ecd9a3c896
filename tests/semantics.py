"""Random Python forwards, each run as it is and by fastnn, with changes between the calls.

``generate(seed)`` writes a model's source from the tables below: backbones of layers that fastnn fuses, reads and
writes of every kind, control flow on what was read, and places (methods, helpers, children) in which that stands.
``compare(case, kind)`` runs it in two namespaces and holds everything that a user could look at against each other.

In the tables ``||`` and line ends part alternatives, and a backslash with n is a line end in one of them. ``$`` is a
number of one's own, ``self`` the module, ``&`` its class; in changes ``@`` is the path of that module from the model
``m``, and ``#`` the path of a layer. As a program this file runs many cases:

    .venv/bin/python tests/semantics.py --first 0 --count 5000 --kind fuse
"""

from __future__ import annotations

import argparse
import builtins
import copy
import functools
import itertools
import linecache
import random
import sys
import textwrap
import time
import traceback
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
import torch
import torch._inductor.config
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

import fastnn
from fastnn.graph.forward import FusedForward
from fastnn.graph.guard import TOKEN
from fastnn.graph.stand_ins import StandIn
from fastnn.graph.tracing import Fused

KINDS = ("fuse", "alike", "fuse example", "training_step", "freeze", "backend")


@dataclass(frozen=True)
class Entry:
    """`code` is an expression for a number, or a tensor of one element, in the tables of reads (where `is_tensor`, for
    one of the size of h), and statements that may make another h in the others. Of the other texts, `top` is of the
    file, `cell` of the function around the model's class, `body` of the class, `init` of its __init__, `helper` of the
    helper module; `changes` change what is read, and `layers` are paths and kinds of layers that may be changed."""

    code: str
    init: str
    changes: tuple[str, ...]
    layers: tuple[tuple[str, str], ...]
    top: str = ""
    body: str = ""
    helper: str = ""
    cell: str = ""
    is_tensor: bool = False
    asks_x: bool = False


def _texts(table: str) -> tuple[str, ...]:
    rows = [text.strip() for line in table.split("\n") for text in line.split(" || ")]
    return tuple(row.replace("\\n", "\n") for row in rows if row)


def _entries(codes: str, init: str = "", changes: str = "", layers: str = "", **others: Any) -> list[Entry]:
    """One for each of the codes."""
    pairs = tuple((f"@.{name}", kind) for name, _, kind in (row.partition(":") for row in layers.split()))
    return [Entry(code, init, _texts(changes), pairs, **others) for code in _texts(codes)]


_DEFAULTS = "def f$(v=1.5, *, w=1.0): return v * w"
_OBJECT = """class Thing$:
    kind = 1.0
    def __init__(self): self.v = 1.5; self.parts = [0.5, 1.0]
    def __call__(self, k): return self.v * k
    def __getitem__(self, i): return self.parts[i]
    def __len__(self): return len(self.parts)
    def __iter__(self): return iter(self.parts)
    def __contains__(self, k): return k in self.parts
    def __bool__(self): return self.v > 1
    def __eq__(self, other): return self.v == other
    @property
    def half(self): return self.v / 2
    @classmethod
    def made(cls): return cls.kind"""
_ENUM = """ES$ = 1.5
class E$(enum.Enum):
    A = 1.0
    B = 2.0
    def scale(self): return ES$ * self.value
    @property
    def own(self): return getattr(self, "extra", 0.5)"""
_FACTORY = """def factory$(box):
    def get(): return box
    def put(v):
        nonlocal box
        box = v
    return get, put
get$, put$ = factory$(1.5)"""
_CLOCK = """class Clock$:
    t = 0.0
    def now(self):
        self.t += 0.4
        return self.t
clock$ = Clock$()"""
_DYNAMIC = """class Dyn$:
    def __init__(self): self.v = {'anything': 1.5}
    def __getattr__(self, name):
        if name == 'v' or name.startswith('__'): raise AttributeError(name)
        return self.v[name]"""
_PUT = "@staticmethod\ndef put$(v):\n    nonlocal cell$\n    cell$ = v"
_CONFIG = "@dataclasses.dataclass\nclass Config$:\n    lr: float = 1.0\n    on: bool = False\n    deep: object = None"

_NUMBER = """@.k$ = 2.5 || @.k$ = 2 || @.k$ = 0.25 || @.k$ = True || @.k$ = torch.tensor(0.5).double() || del @.k$
    @.k$ = np.float64(1.5)"""
_DICT = """@.d$["a"] = 0.4 || @.d$.update(a=3.0, z=2.0) || @.d$ = {"n": {"b": 2.0}, "a": 2.2} || @.d$["n"]["b"] = 2.5
    @.d$["n"] = {"b": 0.7} || @.d$.pop("a") || @.d$["n"].clear() || @.d$.clear() || @.d$["a"] = @.d$.pop("a")"""
_LIST = """@.l$.append(2.5) || @.l$.pop() || @.l$[0] = 0.3 || @.l$[:] = [2.0, 2.0, 1.5] || @.l$ = [0.5]
    @.l$.clear() || @.l$ = (0.5, 2.0) || @.l$.reverse()"""
_BUFFER = """@.buf$.fill_(0.5) || @.buf$ = torch.tensor(2.5).double() || @.buf$.data = torch.tensor(1.8).double()
    del @.buf$"""
_OPTIONAL = "@.opt$ = torch.tensor(1.5).double() || @.opt$ = None || del @.opt$"
_CLASS = "own(@).C$ = 2.5 || @.C$ = 0.2 || own(@).C$ = -1.0 || del own(@).C$ || Base.C$ = 0.1"
_GLOBAL = "G$ = 2.5 || G$ = 0.3 || G$ = 2 || del G$ || G$ = torch.tensor(0.7).double()"
_THING = """@.o$.v = 0.4 || @.o$.v = 2.5 || @.o$.parts.append(2.0) || @.o$.parts[0] = 2.2 || Thing$.kind = 2.5
    Thing$.__call__ = lambda self, k: 0.5 || @.o$ = Thing$(); @.o$.v = 0.9 || Thing$.half = 0.1
    Thing$.__len__ = lambda self: 1 || Thing$.__getitem__ = lambda self, i: 0.7 || @.o$.parts = [2.4]"""
_DEEP = """@.c$.lr = 2.5 || @.c$.deep.k = 2.0 || @.c$.on = False || @.c$.deep = types.SimpleNamespace(k=1.2)
    @.c$ = types.SimpleNamespace(lr=0.3, on=True, deep=@.c$.deep)"""

# fmt: off
READS = [
    *_entries("self.k$ || self.k$ || (self.k$ and 1.5) || getattr(self, 'k$')", "self.k$ = 1.5", _NUMBER),
    *_entries("self._k$", "self._k$ = 1.5", "@._k$ = 2.5 || @._k$ = False || @._k$ = -0.5"),
    *_entries("abs(self.k$) + len(self.s$)", "self.k$ = 1.5; self.s$ = 'on'", "@.k$ = -2.5 || @.s$ = '' || @.k$ = 3"),
    *_entries("(1.5 if self.s$ == 'fast' else 0.5) || (1.5 if self.s$.startswith('f') else 0.5) || "
              "len(f'{self.s$:>5}') / 4",
              "self.s$ = 'fast'", "@.s$ = 'slow' || @.s$ = 'fresher' || @.s$ = 'fast'"),
    *_entries("self.p$", "self._p$ = 1.5", "@._p$ = 0.7 || own(@).p$ = property(lambda self: 2.3) || @._p$ = 1",
              body="@property\ndef p$(self): return self._p$ + self._p$ ** 2"),
    *_entries("""self.d$["a"] || self.d$["n"]["b"] || self.d$.get("z", 0.5) || len(self.d$) + ("z" in self.d$)
              sum(v if isinstance(v, float) else 0.5 for v in self.d$.values()) || {**self.d$, "q": 1.5}["q"]
              sum(len(key) for key, v in self.d$.items() if v) || len(list(self.d$)[0])""",
              'self.d$ = {"a": 1.5, "n": {"b": 0.5}}', _DICT),
    *_entries('self.d$[f"k{self.i$}"]', 'self.i$ = 0; self.d$ = {"k0": 1.5, "k1": 0.5}',
              '@.i$ = 1 || @.d$["k0"] = 2.5'),
    *_entries("""self.l$[-1] || sum(self.l$) || len(self.l$) || max(self.l$) - min(self.l$) || self.l$[:2][0]
              sorted(self.l$)[0] || (2.0 if 0.5 in self.l$ else 0.8) || sum(v for v in reversed(self.l$))
              sum(a * b for a, b in zip(self.l$, self.l$[1:])) || (0.5 if self.l$ == [1.0, 0.5] else 1.5)""",
              "self.l$ = [1.0, 0.5]", _LIST),
    *_entries("self.t$[1][0] + self.t$[0]", "self.t$ = (1.0, [0.5])", "@.t$[1][0] = 2.0 || @.t$ = (0.1, [0.2])"),
    *_entries('(2.0 if "on" in self.s$ else 0.5) || len(self.s$)', 'self.s$ = {"on"}',
              '@.s$.discard("on") || @.s$ = {"on", "x"} || @.s$.add("off") || @.s$.clear()'),
    *(entry for kind in ("types.SimpleNamespace", "argparse.Namespace", "Config$")
      for entry in _entries("self.c$.lr || self.c$.deep.k || self.c$.on * 1.5 + 0.1",
                            f"self.c$ = {kind}(lr=1.5, on=True, deep=types.SimpleNamespace(k=0.5))", _DEEP,
                            top=_CONFIG if kind == "Config$" else "")),
    *_entries("self.sub$.k", "self.sub$ = nn.Module(); self.sub$.k = 1.5", "@.sub$.k = 2.5 || @.sub$ = @.sub$.eval()"),
    *_entries("(2.0 if self.drop$.training else 0.5) || self.drop$.p", "self.drop$ = nn.Dropout(0.5)",
              "@.drop$.eval() || @.drop$.train() || @.drop$.p = 0.9 || @.drop$ = nn.Dropout(0.1)"),
    *_entries("(2.0 if self.training else 0.5)", "", "@.eval() || @.train() || @.training = False"),
    *_entries("self.C$ || type(self).C$ || self.__class__.C$ || &.C$", "", _CLASS, body="C$ = 1.5"),
    *_entries("type(self).L$[0]", "", "own(@).L$[0] = 2.5 || own(@).L$ = [0.5]", body="L$ = [1.5]"),
    *_entries("G$ || G$ * G$ || (lambda: G$)()", "", _GLOBAL, top="G$ = 1.5"),
    *_entries('GD$["a"] + GL$[0]', "", 'GD$["a"] = 2.0 || GL$[0] = 0.1 || GL$ = [1.0]',
              top='GD$ = {"a": 1.0}; GL$ = [0.5]'),
    *_entries("get$()", "", "put$(2.5) || put$(0.3) || put$(torch.tensor(0.5).double())", top=_FACTORY),
    *_entries("cell$", "", "Model.put$(2.5) || Model.put$(0.3)", cell="cell$ = 1.5", body=_PUT),
    *_entries("cell$[0]", "", "Model.put$([2.5]) || Model.put$([0.3])", cell="cell$ = [1.5]", body=_PUT),
    *_entries("f$() || f$(w=2.0) || f$(0.5) || f$(*[2.0]) || f$(**{'v': 0.7})", "",
              """f$.__defaults__ = (0.5,) || f$.__kwdefaults__ = {"w": 0.3} || f$.__kwdefaults__["w"] = 2.0
              f$.__code__ = (lambda v=1, *, w=1: v + w).__code__ || f$ = lambda *a, **k: 0.4""", top=_DEFAULTS),
    *_entries("f$()", "", "f$.__defaults__[0].append(1.0) || f$.__defaults__[0][0] = 0.3",
              top="def f$(v=[1.5]): return sum(v)"),
    *_entries("helper.scale$(1.5)", "", "helper.SCALE$ = 2.0 || helper.scale$ = lambda k: 0.4 || helper.SCALE$ = 0.4",
              helper="SCALE$ = 1.0\ndef scale$(k): return k * SCALE$"),
    *_entries("helper.SCALE$", "", "helper.SCALE$ = 2.5 || del helper.SCALE$", helper="SCALE$ = 1.5"),
    *_entries('helper.TABLE$["a"][0]', "", 'helper.TABLE$["a"][0] = 2.5 || helper.TABLE$ = {"a": (0.4,)}',
              helper="TABLE$ = {'a': [1.5]}"),
    *_entries("g$()", "", "g$ = lambda: 2.5 || g$ = (lambda old: lambda: old() + 1)(g$)", top="def g$(): return 1.5"),
    *_entries("(2.0 if torch.is_grad_enabled() else 0.5) || (2.0 if torch.is_inference_mode_enabled() else 0.7)"),
    *_entries("self.nps$", "self.nps$ = np.float64(1.5)", "@.nps$ = np.float64(0.5) || @.nps$ = np.float32(2.5)"),
    *_entries("""self.buf$ || (self.buf$ * 2) || self._buffers['buf$'] || getattr(self, "buf$")""",
              'self.register_buffer("buf$", torch.tensor(1.5))', _BUFFER),
    *(entry for init in ('self.register_buffer("opt$", None)', "self.opt$ = None",
    'self.register_parameter("opt$", None)')
      for entry in _entries("(self.opt$ if self.opt$ is not None else 0.5) || "
                            "(0.5 if self.opt$ is None else self.opt$)", init,
                            _OPTIONAL.replace("torch.tensor(1.5).double()",
                            "nn.Parameter(torch.tensor(1.5).double())"))),
    *_entries('getattr(self, "maybe$", 0.5) || (2.0 if hasattr(self, "maybe$") else 0.5)', "",
              '@.maybe$ = 2.0 || own(@).maybe$ = 1.5 || @.register_buffer("maybe$", torch.tensor(0.7).double()) || '
              'Base.maybe$ = 0.8'),
    *_entries("""(2.0 if isinstance(self.act$, nn.ReLU) else 0.5) || (1.5 if type(self.act$) is nn.ReLU else 0.7)
              (1.5 if type(self.act$) == nn.ReLU else 0.7) || len(type(self.act$).__name__) / 4
              (1.5 if isinstance(self.act$, (nn.Tanh, nn.Module)) else 0.3) || (0.8 if callable(self.act$) else 1.4)""",
              "self.act$ = nn.ReLU()", "@.act$ = nn.Tanh() || @.act$.__class__ = nn.Tanh || @.act$ = None"),
    *_entries("""(1.5 if self.e$ is E$.A else 0.5) || self.e$.value || (1.5 if self.e$ == E$.B else 0.8)
              self.e$.scale() || self.e$.own || len(self.e$.name) || sum(e.value for e in E$) / 2""", "self.e$ = E$.A",
              "@.e$ = E$.B || ES$ = 0.4 || E$.A.extra = 2.5 || E$.scale = lambda self: 0.3", top=_ENUM),
    *_entries("self.part$() || self.part$(w=2.0)", "self.part$ = functools.partial(f$, 1.5, w=1.0)",
              """@.part$.keywords["w"] = 0.4 || @.part$ = functools.partial(f$, 2.5) || f$ = None
              f$.__code__ = (lambda v, *, w: v - w).__code__""", top=_DEFAULTS),
    *(entry for value in _texts("""torch.tanh || lambda v: v * 1.5 || F.relu || nn.ReLU() || nn.functional.silu
    Tensor.sigmoid
                                functools.partial(F.leaky_relu, negative_slope=0.2)
                                (lambda k: lambda v: v * k)(0.7)""")
      for entry in _entries("self.fn$(h)", f"self.fn$ = {value}",
                            "@.fn$ = torch.sigmoid || @.fn$ = lambda v: v * 0.5 || @.fn$ = F.relu"
                            " || @.fn$ = nn.Tanh() || @.fn$ = None", is_tensor=True)),
    *_entries("self.bound$(1.0)", "self.q$ = 1.5; self.bound$ = self.other$", "@.q$ = 2.5 || @.bound$ = lambda k: 0.4",
              body="def other$(self, k): return self.q$ * k"),
    *_entries("self.stat$(1.5)", "", "own(@).stat$ = staticmethod(lambda k: k + 1) || @.stat$ = lambda k: 0.4",
              body="@staticmethod\ndef stat$(k): return k * 1.1"),
    *_entries("self.made$()", "", "own(@).CM$ = 2.5 || @.CM$ = 0.1",
              body="CM$ = 1.5\n@classmethod\ndef made$(cls): return cls.CM$"),
    *_entries("""self.o$.v || self.o$(1.0) || self.o$[-1] || len(self.o$) || sum(v for v in self.o$) || self.o$.half
              (1.5 if 0.5 in self.o$ else 0.7) || (2.0 if self.o$ else 0.5) || self.o$.made() || type(self.o$).kind
              (2.0 if self.o$ == 1.5 else 0.5)""", "self.o$ = Thing$()", _THING, top=_OBJECT),
    *_entries("T$", "", "T$ = torch.tensor(0.5).double() || T$.fill_(2.5) || T$ = 2.0",
              top="T$ = torch.tensor(1.5).double()"),
    *_entries("self.plain$", "self.plain$ = torch.tensor(1.5).double()",
              "@.plain$ = torch.tensor(0.4).double() || @.plain$.mul_(2) || "
              "@.plain$ = nn.Parameter(torch.tensor(0.4).double())"),
    *_entries("self.tl$[0] + self.td$['a']", "self.tl$ = [torch.tensor(1.0)]; self.td$ = {'a': torch.tensor(0.5)}",
              "@.tl$[0] = torch.tensor(2.0) || @.td$['a'].fill_(2.0) || @.td$['a'] = 0.1 || @.tl$.insert(0, 0.4)"),
    *_entries("self.par$", "self.par$ = nn.Parameter(torch.tensor(1.5))",
              "@.par$.data.fill_(0.5) || @.par$ = nn.Parameter(torch.tensor(2.5).double()) || "
              "@.par$.requires_grad_(False) || @.par$ = None"),
    *_entries("len(self.ml$)", "self.ml$ = nn.ModuleList([nn.Tanh()])", "@.ml$.append(nn.ReLU()) || del @.ml$[0]"),
    *_entries("('a' in self.md$) + 0.5", "self.md$ = nn.ModuleDict({'a': nn.Tanh()})",
              "del @.md$['a'] || @.md$['b'] = nn.Tanh()"),
    *_entries("math.sqrt(self.k$) * math.pi / 2", "self.k$ = 1.0", "@.k$ = 0.25 || @.k$ = 2"),
    *_entries("self.nt$.a + self.nt$[1][0]", "self.nt$ = NT$(1.0, [0.5])",
              "@.nt$ = NT$(0.2, [0.2]) || @.nt$.b[0] = 2.0",
              top="NT$ = collections.namedtuple('NT$', 'a b')"),
    *_entries("self.od$['a']", "self.od$ = collections.OrderedDict(a=1.5)", "@.od$['a'] = 2.5 || @.od$ = {'a': 0.5}"),
    *_entries("self.num$ + self.num$.more", "self.num$ = Num$(1.0)",
              "@.num$.more = 1.2 || @.num$ = Num$(0.3) || Num$.more = 0.9",
              top="class Num$(float):\n    more = 0.5"),
    *_entries("self.lin$.out_features / 5 + (self.lin$.bias is None)", "self.lin$ = nn.Linear(8, 8)",
              "@.lin$.bias = None || @.lin$.out_features = 2 || @.lin$ = nn.Linear(8, 4)", "lin$:linear"),
    *_entries("(1.5 if self.lin$.weight.requires_grad else 0.5)", "self.lin$ = nn.Linear(8, 8)",
              "@.lin$.requires_grad_(False)"),
    *_entries("self.leaky$.negative_slope + 1", "self.leaky$ = nn.LeakyReLU(0.2)", "@.leaky$.negative_slope = 1.5"),
    *_entries("""h.masked_fill(h > self.k$, 0.5) || torch.where(h < self.k$, h, 0.5 * h) || h * ~(h > self.k$)
              (h > 0.1 * self.k$).double() || (h + (h >= self.k$))
              h.masked_fill(torch.logical_and(h > 0, h < self.k$), -0.5)""",
              "self.k$ = 1.5", _NUMBER, is_tensor=True),
    *_entries("h.masked_fill(self.mask$, 0.3) || torch.where(self.mask$, h, -h) || h * self.mask$ || h * ~self.mask$",
              'self.register_buffer("mask$", torch.tensor(True))',
              "@.mask$.fill_(False) || @.mask$ = torch.tensor(False) || @.mask$ = torch.tensor(1.5).double() || "
              "@.mask$ = torch.tensor(2) || del @.mask$", is_tensor=True),
]

# What one trace cannot answer for, or only by giving up.
WILD_READS = [
    *_entries("float(self.np$[0]) || self.np$.sum() / 2", "self.np$ = np.array([1.5, 2.0])",
              "@.np$[0] = 0.3 || @.np$ = np.array([2.5]) || @.np$ += 1"),
    *_entries("""self.buf$.item() || float(self.buf$) || self.buf$.tolist() || int(self.buf$ * 2)
              (2.0 if self.buf$ > 1 else 0.5)
              self.state_dict()['buf$'] || dict(self.named_buffers())['buf$'] || self.get_buffer('buf$')""",
              'self.register_buffer("buf$", torch.tensor(1.5))', _BUFFER),
    *_entries("""float(h.mean()) || h.abs().max().item() || (2.0 if h.sum() > 0 else 0.5) || h.shape[0] / 2
              len(h) / 3
              h.size(0) || h.dim() || (2.0 if h.requires_grad else 0.5) || (1.5 if h.dtype == torch.float64 else 2)
              (1.5 if h.is_contiguous() else 0.7) || h.numel() / 20 || float(h.detach()[0, 0] > 0) + 0.5"""),
    *_entries("""(random.random() + 0.5) || np.random.rand() + 0.5 || float(torch.rand(())) + 0.5
              np.random.randint(1, 3)
              random.choice([0.5, 1.5]) || torch.rand((), dtype=torch.float64) + 0.5"""),
    *_entries("self.rng$.random() + 0.5", "self.rng$ = random.Random(0)",
              "@.rng$.seed(3) || @.rng$ = random.Random(2)"),
    *_entries("self.rng$.random() + 0.5", "self.rng$ = np.random.default_rng(0)"),
    *_entries("torch.rand((), generator=self.rng$, dtype=torch.float64)",
              "self.rng$ = torch.Generator().manual_seed(0)"),
    *_entries("clock$.now()", "", "clock$.t = 0.1", top=_CLOCK),
    *_entries("self.cp$", "self.src$ = 1.5", '@.src$ = 2.5 || @.__dict__.pop("cp$", None) || @.cp$ = 0.4',
              body="@functools.cached_property\ndef cp$(self): return self.src$ * 1.1"),
    *_entries("cached$(1.0)", "", "CG$ = 2.5 || cached$.cache_clear(); CG$ = 0.4",
              top="CG$ = 1.5\n@functools.lru_cache\ndef cached$(k): return k * CG$"),
    *_entries("self.o$.anything", "self.o$ = Dyn$()", "@.o$.v['anything'] = 2.5 || @.o$.anything = 0.3", top=_DYNAMIC),
    *_entries("self.o$.k", "self.o$ = Slots$()", "@.o$.k = 2.5",
              top="class Slots$:\n    __slots__ = ('k',)\n    def __init__(self): self.k = 1.5"),
    *_entries("next(self.it$)", "self.it$ = itertools.cycle([1.0, 0.5, 2.0])", "@.it$ = iter([2.0, 1.0, 1.5])"),
    *_entries("next(IT$)", "", "next(IT$)", top="IT$ = itertools.count(1)"),
    *_entries("sum(1 for p in self.parameters()) / 4 || len(list(self.children())) / 3 || len(self._modules)", "",
              "@.extra$ = nn.Linear(2, 2) || @.extra$ = None"),
    *_entries('self.__dict__["k$"] || vars(self)["k$"]', "self.k$ = 1.5", _NUMBER),
    *_entries('globals()["G$"]', "", _GLOBAL, top="G$ = 1.5"),
    *_entries("self.dd$['q'] + 0.5", "self.dd$ = collections.defaultdict(int)", "@.dd$['q'] = 2"),
    *_entries("self.dq$[0]", "self.dq$ = collections.deque([1.5, 0.5])", "@.dq$.rotate(1) || @.dq$.appendleft(2.5)"),
    *_entries("self.ls$[0] + self.ls$.k", "self.ls$ = LS$([1.0])", "@.ls$[0] = 2.0 || @.ls$.k = 0.1",
              top="class LS$(list):\n    k = 0.5"),
    *_entries("self.desc$", "self.dv$ = 1.5", "@.dv$ = 2.5 || own(@).desc$ = 0.4", body="desc$ = Desc$()",
              top="class Desc$:\n    def __get__(self, obj, kind=None): return obj.dv$ if obj is not None else self"),
    *_entries("f$.k", "", "f$.k = 2.5 || del f$.k", top="def f$(): pass\nf$.k = 1.5"),
    *_entries("var$.get()", "", "var$.set(2.5)", top="var$ = contextvars.ContextVar('var$', default=1.5)"),
    *_entries("(1.5 if self.a$ is self.b$ else 0.5)", "self.a$ = []; self.b$ = self.a$", "@.b$ = []"),
    *_entries("(1.5 if Sub$.kind else 0.5) + Sub$.twice", "", "Meta$.twice = 1.0 || Sub$.kind = 0",
              top="class Meta$(type):\n    twice = 0.5\nclass Sub$(metaclass=Meta$):\n    kind = 1"),
]

_FRESH = """v += 1.0 || v -= 0.5 || v *= 2.0 || v /= 2.0 || v **= 2 || v[0] = 0.0 || v[:, 1:3] += 1 || v[v > 0] = 0.5
    v[..., 0] *= 2 || v.add_(1.0) || v.clamp_(min=0) || torch.relu_(v) || F.relu(v, inplace=True)
    w = v[:, :4]; w += 1.0
    w = v.view(-1); w *= 2 || w = v.t(); w.mul_(3.0) || a, b = v.chunk(2, 1); a += b || w = v[1]; w[2:] = 1.0
    v.sub_(0.5)
    w = v.detach(); w += 1.0 || v.data.mul_(2) || w = v.reshape(-1, 2, 4); w.transpose(1, 2)[:, 0] -= 1
    v.requires_grad_()
    F.dropout(v, 0.5, self.training, inplace=True) || w = v; w += h || v.copy_(h * 2) || v = v.add_(1) || v += keep
    v.masked_fill_(v > 0, 0.1) || torch.add(h, 1.0, out=v.detach()) || w = v.flatten(); w += 1
    w = v.expand_as(v); w *= 0.5"""
_ALIASED = """v = <a>(v) || v += 1.0; v = <a>(v) || v = <a>(v); v *= 2 || v = F.leaky_relu(v, 0.1, True)
    v = <a>(v); v[:, 0] = 0.0"""

WRITES = [
    *(entry for init in ("self.n$ = 0", 'self.register_buffer("n$", torch.zeros(()))')
      for code in _texts('self.n$ += 1 || self.n$ = self.n$ + 1 || setattr(self, "n$", self.n$ + 1)')
      for entry in _entries(f"{code}; h = h * (1 + 0.1 * self.n$)", init, "@.n$ = @.n$ + 1")),
    *(entry for code in _texts("""self.n$.add_(1) || self.n$[...] = self.n$ + 1 || torch.add(self.n$, 1, out=self.n$)
                               self._buffers['n$'] = self.n$ * 0.5 + 1
                               self.register_buffer('n$', h.detach().mean())""")
      for entry in _entries(f"{code}; h = h + self.n$", 'self.register_buffer("n$", torch.zeros(()))')),
    *(entry for code in _texts(r"""self.ema$ = 0.9 * self.ema$ + 0.1 * h.detach().mean(0)
    self.ema$.copy_(h.detach().mean(0))
                               self.ema$.mul_(0.9).add_(h.detach().mean(0), alpha=0.1) || self.ema$ *= 0.9
                               if self.training: self.ema$ = h.detach().mean(0)
                               with torch.no_grad():\n    self.ema$.lerp_(h.mean(0), 0.1)""")
      for entry in _entries((code + "\nh = h - self.ema$").replace("\n", "\\n"),
                            'self.register_buffer("ema$", torch.zeros(8))', "@.ema$.zero_()")),
    *_entries(r"""h = h + self.st$\nself.st$ = h.detach() || h = h + self.st$\nself.st$ = h
              h = h + self.st$\nself.st$ = h.detach().mean()""",
              "self.st$ = 0.0", "@.st$ = 0.0"),
    *_entries(r"if self.st$ is not None: h = h + self.st$\nself.st$ = h.detach() * 0.5", "self.st$ = None",
              "@.st$ = None"),
    *(entry for code in _texts("""self.log$.append(h.detach().mean()) || self.log$.append(1)
    self.log$ += [h.detach()]
                               self.log$ = [*self.log$, 0.5] || self.log$.extend(v for v in (1, 2))
                               self.log$.insert(0, h)""")
      for entry in _entries(f"{code}; h = h * len(self.log$)", "self.log$ = []", "@.log$.clear()")),
    *_entries(r"""self.acts$["h"] = h; h = h + self.acts$["h"] || self.acts$.update(k=h.detach())
              self.acts$.setdefault("w", h.detach()); h = h + self.acts$["w"].mean()
              if "w" not in self.acts$: self.acts$["w"] = h.detach().mean()\nh = h + self.acts$["w"]
              self.acts$["n"] = self.acts$.get("n", 0) + 1; h = h * self.acts$["n"]""", "self.acts$ = {}",
              "@.acts$.clear()"),
    *_entries(r"global N$\nN$ += 1\nh = h * (1 + 0.1 * N$)", "", "N$ = 5", top="N$ = 0"),
    *_entries("LOG$.append(1); STATE$['n'] += 1; h = h * len(LOG$)", "", "LOG$.clear()",
              top="LOG$ = []; STATE$ = {'n': 0}"),
    *_entries("h = h * tick$()", top="def counter$():\n    n = 0\n    def tick():\n        nonlocal n\n        n += 1\n"
              "        return n\n    return tick\ntick$ = counter$()"),
    *(entry for kind in ("type(self)", "self.__class__", "&", "self")
      for entry in _entries(f"{kind}.count$ += 1; h = h * (1 + self.count$)", "", "own(@).count$ = 7",
                            body="count$ = 0")),
    *_entries("helper.note$(1.0); h = h * len(helper.LOG$)", helper="LOG$ = []\ndef note$(k): LOG$.append(k)"),
    *_entries("helper.N$ += 1; h = h * helper.N$", "", "helper.N$ = 3", helper="N$ = 0"),
    *(entry for code in _texts(_FRESH)
      for entry in _entries(rf"v = h * 1.0; keep = v\n{code}\nh = v * 0.5 + keep.tanh()")),
    *(entry for first in ("v = self.in$(h); keep = v", "keep = v = self.in$(h)", "v = self.in$(h); keep = v[:, :8]")
      for code in _texts(_ALIASED) for act in ("ReLU()", "ReLU(inplace=True)", "Dropout(0.5, inplace=True)", "Tanh()")
      for entry in _entries(rf"{first}\n{code}\nh = v + keep".replace("<a>", "self.re$"),
                            f"self.in$ = nn.Linear(8, 8); self.re$ = nn.{act}", "", "in$:linear re$:act")),
    *_entries("v = self.in$(h); v += h; h = torch.relu(v)", "self.in$ = nn.Linear(8, 8)", "", "in$:linear"),
    *_entries("""x += 1.0; h = h + x || x.mul_(1.5); h = h - x || x[0] = 0.0; h = h * 0.5 + x
              x.data += 1.0; h = h + x
              v = x.detach(); v *= 0.5; h = h + x || x = x * 2; x += 1; h = h + x""", asks_x=True),
    *(entry for code in _texts(r"""with torch.no_grad(): self.w$.weight.mul_(0.9) || self.w$.weight.data.mul_(0.9)
    self.w$.bias = None
                               self.w$.weight.data = self.w$.weight.data * 0.9 || self.w$.bias.data[0] = 0.5
                               self.w$.eval()
                               h = torch.relu(self.w$(h)); self.w$.bias.data += 0.1
                               self.w$.weight.requires_grad_(False)
                               self.w$.weight.detach().mul_(0.9) || self.w$ = nn.Linear(8, 8).double()
                               self.w$.weight.data[0] = 0.0
                               self.w$.weight = nn.Parameter(self.w$.weight * 0.5)""")
      for entry in _entries(rf"{code}\nh = self.w$(h)", "self.w$ = nn.Linear(8, 8)", "", "w$:linear")),
    *(entry for code in _texts("self.drop$.p = 0.3 || self.drop$.eval() || "
    "self.drop$.train(not self.drop$.training) || self.drop$.p *= 0.9")
      for entry in _entries(rf"{code}\nh = self.drop$(h)", "self.drop$ = nn.Dropout(0.5)", "", "drop$:dropout")),
    *_entries("self.sub$.k += 1; h = h * self.sub$.k", "self.sub$ = nn.Module(); self.sub$.k = 0"),
    *_entries(r"self.z$ = 1\ndel self.z$ || self.__dict__['z$'] = 1 || object.__setattr__(self, 'z$', 2)"),
    *_entries("""h = h + torch.randn_like(h) || h = F.dropout(h, 0.5, self.training) || h = h * random.random()
              h = h * np.random.rand()
              torch.manual_seed(3); h = h + torch.rand(8) || h = h[torch.randperm(h.shape[0])]
              h = h + torch.zeros(8).uniform_()
              h = h + torch.normal(0.0, 1.0, (8,)) || torch.set_grad_enabled(False)
              h = torch.bernoulli(torch.full_like(h, 0.5)) * h"""),
    *_entries("""if h.requires_grad: h.register_hook(lambda g: self.grads$.append(g.sum().item()))
              if h.requires_grad: h.register_hook(lambda g: g * 2)""", "self.grads$ = []"),
    *_entries("random.shuffle(self.perm$); h = h[:, self.perm$]", "self.perm$ = list(range(8))"),
    *_entries("self.seq$.append(nn.Tanh()); h = self.seq$(h)", "self.seq$ = nn.Sequential(nn.Linear(8, 8), nn.ReLU())"),
    *_entries("h = h * next(self.it$)", "self.it$ = iter([0.5, 1.0, 1.5, 2.0])"),
]

# What is done with what was read: <e> is the expression, <b> and <c> bodies. The second table ends a trace.
CONTROLS = _texts(r"""
h = h * <e> || h = h + <e> || h = <e> - h || h = torch.where(h > <e>, h, h * 0.1) || h = h * <e> if <e> < 2 else h - <e>
if <e> > 1.2:\n    <b>\nelse:\n    <c> || if not <e> > 1.2:\n    <b>
if (k := <e>) > 1.2:\n    h = h * k\nelse:\n    <b>
for _ in range(int(<e>) + 1):\n    <b> || k = <e>\nwhile k > 0.8:\n    <b>\n    k = k - 0.7
for i in range(3):\n    if i > <e>: break\n    <b> || h = sum([h * v for v in (<e>, 0.5)])
f = lambda v: v * <e>\nh = f(h)
h = sum(h * v for v in (<e>, 0.5) if v) || if <e> > 2.2:\n    return h * 0.5\n<b> || assert <e> > -9, 'small'\n<b>
match int(<e>):\n    case 0:\n        <b>\n    case 1 | 2:\n        <c>\n    case _:\n        h = h * 0.5
h = {"0": h, "1": h * 2}.get(f'''{int(<e>)}''', h - 1) || def scaled(v, k=<e>):\n    return v * k\nh = scaled(h)
h = h * (<e> and 2.0 or 0.5) || if 0.5 < <e> < 2:\n    <b>\nelif <e> >= 2:\n    <c> || h = h.clamp(max=float(<e>) + 1)
a, *rest = [h, h * <e>, h + 1]\nh = a + rest[0] - rest[-1] || k = int(<e>)\nh = torch.cat([h[:, k:], h[:, :k]], 1)
h = getattr(torch, "relu" if <e> > 1.2 else "tanh")(h)
acc = []\nfor i in range(2):\n    acc.append(h * (<e> + i))\nh = acc[-1] + acc[0]
found = {'a': h, 'k': <e>}\nfound['h'] = found['a'] * found['k']\nh = found['h']
k = [<e>]\nk += [2.0]\nh = h * k[0] + k[-1]
h = functools.reduce(lambda a, b: a + b, [h, h * <e>]) || h = F.leaky_relu(h, <e>) if isinstance(<e>, float) else h
h = h * max(<e>, 0.7) + min(1, <e>) || <b>\nh = h * <e>\n<c> || if <e> > 1.2 and self.training:\n    <b>
h = h * {True: 1.5, False: 0.5}[bool(<e> > 1)] || a, b = (h, h * <e>)\nb, a = a, b\nh = a - b
h = h * (<e> ** 2 // 0.01 * 0.01)
h = [layer(h) for layer in (torch.tanh, torch.relu)][int(<e> > 1.2)] || h = next(iter([h * v for v in [<e>]]))
""")
WILD_CONTROLS = _texts(r"""
with torch.no_grad():\n    k = h.mean() * <e>\nh = h + k || with contextlib.nullcontext():\n    <b>\nh = h * <e>
with torch.enable_grad():\n    <b>\nh = h - <e> || with torch.set_grad_enabled(bool(<e> > 1)):\n    <b>
try:\n    h = h * <e>\nexcept (KeyError, AttributeError, NameError, IndexError, TypeError):\n    h = h - 1.0\n    <b>
try:\n    if <e> > 1.2: raise ValueError('large')\n    <b>\nexcept ValueError as e:\n    h = h * len(str(e))
if <e> > 2.2: raise ValueError('too large')\n<b> || with warnings.catch_warnings():\n    <b>\nh = h * <e>
with torch.inference_mode():\n    k = float((h * 1.0).mean()) * <e>\nh = h + k
h = h * <e>\nh = h if bool((h > 0).any()) else -h
""")
BODIES = [
    *_entries("h = torch.relu(h) || h = h.tanh() || h = h - h.mean(0) || h = h * 0.5"),
    *_entries("h = self.fa$(h) || h = self.fa$(F.relu(self.fb$(h))) || h = self.fa$(h).relu() || "
              "h = F.gelu(self.fa$(h), approximate='tanh')",
              "self.fa$ = nn.Linear(8, 8); self.fb$ = nn.Linear(8, 8)", "", "fa$:linear fb$:linear"),
]

_TWO = "self.a$ = nn.Linear(8, 8); self.b$ = nn.Linear(8, 8)"
_CONVS = tuple(f"self.conv$ = nn.Conv{d}d(2, {out}, 3, padding=1); self.bn$ = nn.BatchNorm{d}d({out}); self.act$ = "
               f"nn.ReLU(); self.pool$ = nn.MaxPool{d}d(2)" for d, out in ((1, 4), (2, 8)))
_STACK = """class Stack$(nn.ModuleList):
    def forward(self, h):
        for layer in self: h = layer(h)
        return h"""
_SCALED = "class Scaled$(nn.Linear):\n    scale = 1.0\n    def forward(self, h): return super().forward(h) * self.scale"
_OUTER = "self.outer$ = nn.Module(); self.outer$.inner = nn.Module(); self.outer$.inner.fc = nn.Linear(8, 8)"

# Each takes h of (batch, 8) and gives one.
BACKBONES = [
    *_entries(r"""h = self.b$(torch.relu(self.a$(h))) || h = self.b$(F.relu(self.a$(h))).tanh()
              h = h + self.b$(self.a$(h).sigmoid())
              h = F.linear(F.relu(F.linear(h, self.a$.weight, self.a$.bias)), self.b$.weight)
              for layer in (self.a$, self.b$): h = layer(h).relu()
              h = self.a$(torch.tanh(self.a$(h))); h = F.silu(self.b$(h)) || z = self.a$(h); h = self.b$(F.relu(z)) + z
              h = F.linear(torch.relu(self.a$(h)), self.b$.weight * 0.5)
              h = F.gelu(self.b$(F.relu(self.a$(input=h))))""", _TWO, "", "a$:linear b$:linear"),
    *_entries("h = self.b$(torch.relu(self.a$(h)))", f"{_TWO}; self.b$.weight = self.a$.weight", "",
              "a$:linear b$:linear"),
    *_entries("h = self.use$(torch.relu(self.a$(h)))", f"{_TWO}; self.use$ = lambda v, layer=self.b$: layer(v)",
              "@.use$ = @.a$", "a$:linear b$:linear"),
    *(entry for middle in _texts("nn.Identity() || nn.Dropout(0.5) || nn.Identity(), nn.ReLU() || "
    "nn.BatchNorm1d(8), nn.ReLU() || nn.LayerNorm(8)")
      for entry in _entries("h = self.seq$(h)",
                            f"self.seq$ = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), {middle}, nn.Linear(8, 8))",
                            "", "seq$:seq")),
    *_entries(r"""for layer in self.ml$: h = layer(h)
              for i, layer in enumerate(self.ml$): h = layer(h) * (1 + 0.1 * i)
              for layer in reversed(self.ml$): h = layer(h) || for i in range(len(self.ml$)): h = self.ml$[i](h)
              for layer in self.ml$[1:]: h = layer(h) || h = functools.reduce(lambda v, layer: layer(v), self.ml$, h)
              h = sum(layer(h) for layer in self.ml$) || h = torch.stack([layer(h) for layer in self.ml$]).mean(0)
              for layer in self.ml$.children(): h = layer(h)
              for layer, k in zip(self.ml$, (1.0, 0.5, 2.0)): h = layer(h) * k
              for layer in self.ml$:\n    if isinstance(layer, nn.Linear): h = F.relu(layer(h))
              h = self.ml$[-1](self.ml$[1](self.ml$[0](h)))""",
              "self.ml$ = nn.ModuleList([nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)])", "", "ml$:list"),
    *_entries("h = self.ml$(h)", "self.ml$ = Stack$([nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)])",
              "Stack$.__iter__ = lambda self: iter([self[0]]) || Stack$.forward = lambda self, h: self[0](h)",
              "ml$:list", top=_STACK),
    *_entries("h = self.b$(torch.relu(self.a$(h)))", "self.a$ = Scaled$(8, 8); self.b$ = Scaled$(8, 8)",
              "@.a$.scale = 0.3 || Scaled$.scale = 2.0 || Scaled$.forward = nn.Linear.forward", "a$:linear b$:linear",
              top=_SCALED),
    *_entries("h = self.outer$.inner.fc(h).relu(); h = self.outer$.inner.fc(h)", _OUTER,
              "@.outer$.inner.fc = nn.Tanh() || @.outer$.inner = OwnAct()"),
    *_entries("""for layer in self.md$.values(): h = layer(h)
              for name, layer in self.md$.items(): h = layer(h) if name != 'b' else h.relu()
              for name in self.md$: h = self.md$[name](h) || h = self.md$['c'](self.md$['b'](self.md$['a'](h)))
              h = self.md$['a'](h) if 'a' in self.md$ else h || h = self.md$[f'{"a"}'](h).relu(); h = self.md$.c(h)""",
              "self.md$ = nn.ModuleDict({'a': nn.Linear(8, 8), 'b': nn.ReLU(), 'c': nn.Linear(8, 8)})", "", "md$:dict"),
    *_entries(r"for layer in self.pl$: h = layer(h) || "
              r"first, *others = self.pl$\nfor layer in (first, *others): h = layer(h)",
              "self.pl$ = [nn.Linear(8, 8).double(), nn.ReLU(), nn.Linear(8, 8).double()]; "
              "self.keep$ = nn.ModuleList(self.pl$)",
              "", "pl$:plain keep$:list"),
    *_entries("for w in self.pw$: h = F.relu(F.linear(h, w)) || h = F.linear(torch.relu(h @ self.pw$[0]), self.pw$[1])",
              "self.pw$ = nn.ParameterList([torch.randn(8, 8) / 3 for _ in range(2)])", "", "pw$:parameters"),
    *_entries("h = F.linear(F.relu(F.linear(h, self.w$, self.c$)), self.w$)",
              "self.w$ = nn.Parameter(torch.randn(8, 8) / 3); self.c$ = nn.Parameter(torch.zeros(8))",
              "@.c$ = None || @.w$ = nn.Parameter(torch.eye(8).double()) || @.w$.data = @.w$.data * 0.5 || "
              "@.w$.requires_grad_(False)"),
    *(entry for size, init in zip(("2, 4", "2, 2, 2"), _CONVS, strict=True)
      for entry in _entries("""h = self.pool$(F.relu(self.bn$(self.conv$(h.reshape(-1, SIZE))))).flatten(1)
                            h = self.pool$(self.act$(self.conv$(h.view(-1, SIZE)))).flatten(1)
                            h = torch.flatten(self.act$(self.pool$(self.bn$(self.conv$(h.reshape(-1, SIZE))))), 1)
                            z = self.act$(self.bn$(self.conv$(h.reshape(-1, SIZE)))); h = h + self.pool$(z).flatten(1)
                            z = self.pool$(self.act$(self.conv$(h.view(-1, SIZE)))); z *= 2; h = z.flatten(1)
                            """.replace("SIZE", size), init, "", "conv$:conv bn$:bn act$:act pool$:pool")),
    *(entry for kind, code in (("GRU", "out, _ = self.rnn$(h.reshape(-1, 2, 4)); h = self.head$(out[:, -1])"),
                               ("LSTM", "out, (n, c) = self.rnn$(h.view(-1, 2, 4)); h = self.head$(n[-1]) + c[0]"),
                               ("GRU", "h = self.rnn$(h.reshape(-1, 2, 4))[0].mean(1)"),
                               ("RNN", "out, state = self.rnn$(h.view(-1, 2, 4)); h = out[:, -1] + state[0]"))
      for entry in _entries(code, f"self.rnn$ = nn.{kind}(4, 8, batch_first=True); self.head$ = nn.Linear(8, 8)", "",
                            "rnn$:rnn head$:linear")),
    *_entries(r"state = h * 0.1\nfor _ in range(2): state = self.cell$(h, state)\nh = self.head$(state)",
              "self.cell$ = nn.GRUCell(8, 8); self.head$ = nn.Linear(8, 8)", "", "cell$:rnn head$:linear"),
    # What a forward does with sizes, of which some change.
    *_entries(r"""s = h[:, :3]\nfor t in range(h.size(1) // 2): s = self.cell$(h[:, 2 * t : 2 * t + 2], s)\nh += s.sum()
              s = None\nfor v in h.split(2, dim=1): s = self.cell$(v, s)\nh = self.head$(s)
              out = []\nfor v in h.view(-1, 4, 2).unbind(1): out.append(self.cell$(v))\nh = self.head$(out[2])
              out = []\nfor v in h.view(-1, 4, 2).transpose(0, 1): out.append(self.cell$(v))\nh = h + sum(out).sum()""",
              "self.cell$ = nn.GRUCell(2, 3); self.head$ = nn.Linear(3, 8)",
              "@.cell$ = nn.GRUCell(2, 3).double() || @.cell$.hidden_size = 3", "cell$:rnn head$:linear"),
    *_entries(r"""h = torch.stack([self.a$(v) for v in h]) || h = h + len(h)
              h = h * (2.0 if len(h) > 3 else 0.5)
              z = self.a$(h)\nh = h + z if z.shape == h.shape else h - z.sum(1, keepdim=True)
              z = self.a$(h)\nif z.size(1) < h.size(1): z = F.pad(z, [0, h.size(1) - z.size(1)])\nh = h + z[:, :8]
              z = self.a$(h)\nfor i in range(z.dim()): h = h * z.shape[i] / 8
              z = self.a$(h)\nz.unsqueeze_(0)\nh = h * z.dim() || z = self.a$(h).numel()\nh = h * (z / 8)""",
              "self.a$ = nn.Linear(8, 8)",
              """@.a$ = nn.Linear(8, 3).double() || @.a$.bias = nn.Parameter(torch.zeros(1).double())
              @.a$.weight = nn.Parameter(torch.ones(4, 8).double()); @.a$.bias = None""", "a$:linear"),
    *_entries(r"z = self.p$(self.a$(h).unsqueeze(1))\nh = h + z.mean() if z.shape[-1] > 3 else h - z.mean()",
              "self.a$ = nn.Linear(8, 8); self.p$ = nn.MaxPool1d(2)",
              "@.p$.kernel_size = 4 || @.p$.stride = 3 || @.p$.padding = 1", "p$:pool"),
]

_PLAIN = ("x", "h = x", ("x",))
SIGNATURES = (
    *((_PLAIN,) * 14),
    ("x, y", "h = x * 0.5 + y", ("x, y", "x, y=y", "y=y, x=x")),
    ("x, y=None", "h = x if y is None else x + y", ("x", "x, y", "x, y=y", "x, None")),
    ("x, scale=1.5", "h = x * scale", ("x", "x, 2.0", "x, scale=0.5", "x, y")),
    ("x, *, flag=False", "h = x * 2 if flag else x", ("x", "x, flag=True")),
    ("x, *rest", "h = x + sum(rest)", ("x", "x, y", "x, y, 1.0")),
    ("x, **options", "h = x * options.get('scale', 1.0)", ("x", "x, scale=2.0")),
    ("x, pair", "h = x + pair[0] * pair[1]", ("x, (y, y)", "x, [y, 2.0]")),
)
RETURNS = ("return h",) * 8 + _texts("""
return h, 3 || return [h, h * 2] || return {"out": h, "n": None, "k": 2} || return h, None || return h.detach(), h
return h, h
return h, (h.sum(), 'text') || return Out(h, 2) || return h.mean() || return (h > 0), h || return h, [1.5, True]
""")

# Where some statements stand: of what part of the file a definition is, its decorators, its ending, its call, changes.
PLACES = (
    *((("inline", "", "", "<s>", ""),) * 6),
    *(("body", "", "return h", call, "m.step$ = lambda h: h * 0.5 || "
    "Model.step$ = lambda self, h: h * 0.3") for call in
       ("h = self.step$(h)", "h = self.step$(h)", "h = Model.step$(self, h)", 'h = getattr(self, "step$")(h=h)')),
    *(("base", "", "return h", call, "Base.step$ = lambda self, h: h * 0.3 || Model.step$ = lambda self, h: h * 0.7")
       for call in ("h = super().step$(h)", "h = self.step$(h)", "h = super(Model, self).step$(h)")),
    *(("top", "", "return h", call, "step$ = lambda self, h: h * 0.5 || "
    "step$.__code__ = (lambda self, h: h * 0.4).__code__")
       for call in ("h = step$(self, h)", "h = step$(self, h=h)", "h = step$(*(self, h))",
       'h = step$(**{"self": self, "h": h})')),
    ("top", "@logged", "return h", "h = step$(self, h)", "step$ = logged(step$)"),
    ("body", "@logged", "return h", "h = self.step$(h)", "Model.step$ = logged(Model.step$)"),
    ("top", "@counted", "return h", "h = step$(self, h)", ""),
    ("body", "@torch.no_grad()", "return h", "h = h + self.step$(h)", ""),
    *((("helper", "", "return h", "h = helper.step$(self, h)", "helper.step$ = lambda self, h: h * 0.5"),) * 2),
    ("top", "", "yield h", "for h in step$(self, h): pass", ""),
    ("recursive", "", "return step$(self, h, depth - 1) if depth else h", "h = step$(self, h)",
    "step$.__defaults__ = (0,)"),
    ("inline", "", "", "def step(h):\n    <s>\n    return h\nh = step(h)", ""),
    ("base forward", "", "", "<s>", ""),
    *(("child", "", "", call, "") for call in
       ("h = self.block$(h)", "h = self.block$(h)", "h = self.block$(h)", "h = self.block$(h=h)",
       "h = self.block$.forward(h)")),
)

_ACT = """# = nn.Tanh() || #.inplace = True || # = nn.LeakyReLU(0.1) || # = nn.Identity() || # = OwnAct() || #.p = 0.9
    # = nn.ReLU6() || # = F.relu"""
# What may be done to a layer, by its kind, to any module, and to the model.
CHANGES = {kind: _texts(table) for kind, table in {
    "any": """#.eval() || #.train() || handles.append(#.register_forward_hook(lambda mod, args, out: HOOK(out)))
    handles.pop().remove()
        handles.append(#.register_forward_pre_hook(lambda mod, args: (args[0] * 1.1, *args[1:])))
        LOG.append(#.training)
        handles.append(#.register_full_backward_hook(lambda mod, gi, go: LOG.append(1))) || #.requires_grad_(False)
        #.own_attribute = 3
        handles.append(#.register_forward_hook(lambda mod, args, out: LOG.append(len(args)))) || #.requires_grad_(True)
        #.forward = types.MethodType(lambda self, h, *a: type(self).forward(self, h * 0.5, *a), #)
        #.forward = (lambda old: lambda *a: HOOK(old(*a)))(#.forward)""",
    "linear": """#.bias = None || #.bias = nn.Parameter(torch.ones(8).double())
    #.weight = nn.Parameter(torch.eye(8).double()) || del #.bias
        #.weight.data = #.weight.data * 0.5 || #.weight.data.mul_(0.5) || #.weight.requires_grad_(False)
        #.bias.data[0] = 3.0
        # = nn.Linear(8, 8).double() || # = nn.Identity() || # = nn.Sequential(#, nn.Tanh()) || # = Lora(#)
        #.__class__ = OwnLinear
        parametrize.register_parametrization(#, 'weight', Halved()) || nn.utils.parametrizations.weight_norm(#)
        # = copy.deepcopy(#)
        parametrize.remove_parametrizations(#, 'weight') || nn.utils.parametrizations.spectral_norm(#)
        #.reset_parameters()
        prune.l1_unstructured(#, 'weight', 0.3) || #.weight = torch.nn.Parameter(#.weight.t()) || # = torch.tanh
        #.register_buffer('own', torch.zeros(1)) || #.weight = nn.Parameter(torch.ones(8, 8))""",
    "conv": """#.bias = None || #.bias = nn.Parameter(torch.ones_like(#.bias)) || #.weight.data.mul_(0.5)
    #.padding = 2
        #.weight = nn.Parameter(#.weight.detach() * 0.5) || #.padding_mode = 'circular' || # = copy.deepcopy(#)
        #.padding = 'same'
        nn.utils.parametrizations.weight_norm(#) || #.dilation = tuple(2 for _ in #.dilation) || #.groups = 2
        del #.bias""",
    "bn": """#.running_mean = None; #.running_var = None || #.momentum = 0.5 || #.momentum = None || #.eps = 0.1
    #.track_running_stats = False
        #.weight = None || #.bias = None || #.weight = None; #.bias = None || #.reset_running_stats()
        #.running_mean.add_(1)
        # = nn.Identity() || #.running_var = #.running_var * 2 || #.weight.data.fill_(0.5)
        #.num_batches_tracked = None || #.eval()""",
    "act": _ACT,
    "dropout": _ACT,
    "pool": "#.kernel_size = 1 || #.ceil_mode = True || #.return_indices = True || # = type(#)(2, padding=1) || "
    "#.stride = 1 || # = OwnAct()",
    "seq": """#[1] = nn.Tanh() || #.append(nn.Tanh()) || del #[0] || #.insert(1, nn.Linear(8, 8).double())
    #[0] = nn.Linear(8, 8).double()
        #[0].bias = None || setattr(#, '0', nn.Linear(8, 8).double()) || #[0], #[-1] = #[-1], #[0] || #[0] = Lora(#[0])
        #.extra = nn.Tanh()
        # = nn.Sequential(*#, nn.Tanh()) || #[1].inplace = True || #.__class__ = OwnSequential""",
    "list": """#[1] = nn.Tanh() || #.append(nn.Tanh()) || del #[0] || #.insert(0, nn.Linear(8, 8).double())
    #[0] = nn.Linear(8, 8).double()
        #[0].bias = None || #.pop(-1) || #[0] = Lora(#[0]) || # = nn.ModuleList([*#, nn.Tanh()])
        #.extend([nn.ReLU(), nn.Tanh()])
        #[0] = #[-1] || #._modules['1'] = nn.Tanh() || # = [nn.Tanh()]""",
    "dict": """#['b'] = nn.Tanh() || #.pop('b') || #['z'] = nn.Linear(8, 8).double() || #['a'].bias = None
    #['a'] = #['c']
        #.update({'c': nn.Tanh()}) || del #['a'] || #._modules.move_to_end('a') || #['b'] = #.pop('b')""",
    "plain": "#[1] = nn.Tanh() || #.append(nn.Tanh()) || del #[-1] || #[0].bias = None || #.reverse() || "
    "# = tuple(#) || #.append(torch.tanh)",
    "parameters": "#[0] = nn.Parameter(torch.eye(8).double()) || #.append(torch.eye(8).double()) || "
    "#[0].data.mul_(0.5) || #[0].requires_grad_(False)",
    "rnn": """[p.data.mul_(0.5) for p in #.parameters()] || # = copy.deepcopy(#) || #.batch_first = False
    #.requires_grad_(False)
        # = OwnAct() || #.nonlinearity = 'relu' || #.dropout = 0.5 || #.flatten_parameters()""",
    "block": """own(#).forward = (lambda old: lambda self, h: HOOK(old(self, h)))(own(#).forward)
    # = copy.deepcopy(#) || # = Wrapped(#)
        own(#).__call__ = lambda self, h: h * 0.5 || # = torch.tanh || #.forward = lambda h: h * 0.5
        # = nn.Linear(8, 8).double()
        own(#).forward = lambda self, h: h * G0 || #.__class__ = OwnAct""",
    "root": """m.train() || m.eval() || m.load_state_dict({k: v * 0.9 for k, v in m.state_dict().items()})
    m.requires_grad_(False) || G0 = 0.3
        m.load_state_dict({k: v * 0.9 for k, v in m.state_dict().items()}, assign=True)
        for p in m.parameters(): p.data = p.data * 0.9
        m = copy.deepcopy(m) || m = copy.copy(m) || m.requires_grad_(True) || m.double() || m.apply(lambda c: c.train())
        m.zero_grad()
        Model.forward = (lambda old: lambda self, *a, **k: HOOK(old(self, *a, **k)))(Model.forward)
        m.register_buffer('late', torch.ones(1))
        for p in m.parameters(): p.requires_grad = not p.requires_grad || Base.forward = lambda self, h: h * 0.5
        m.float(); m.double()
        for c in m.modules(): c.training = not c.training || m = Wrapped(m) || m.__class__ = type('Other', (Model,), {})
        m.late = nn.Linear(8, 8)
        m.forward = (lambda old: lambda *a, **k: HOOK(old(*a, **k)))(m.forward) || m.half(); m.double()""",
}.items()}
# fmt: on

_HEAD = """import argparse, collections, contextlib, contextvars, copy, dataclasses, enum, functools, itertools
import math, random, types, warnings
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

handles, LOG, G0 = [], [], 1.5
Out = collections.namedtuple("Out", "h n")

def HOOK(out):
    return out * 1.1 if isinstance(out, Tensor) else out

class Halved(nn.Module):
    def forward(self, w): return w * 0.5

class OwnLinear(nn.Linear):
    def forward(self, h): return super().forward(h) + 1

class OwnSequential(nn.Sequential):
    def forward(self, h): return super().forward(h) * G0

class OwnAct(nn.Module):
    def forward(self, h): return h.sin() * G0

class Lora(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(8, 2).double(), nn.Linear(2, 8).double()
    def forward(self, h): return self.base(h) + self.up(self.down(h))

class Wrapped(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner
    def forward(self, *args, **kwargs): return HOOK(self.inner(*args, **kwargs))

def own(value):  # never a class of torch, which other cases use
    return type(value) if type(value).__module__ == "case" else types.SimpleNamespace()

def logged(f):
    @functools.wraps(f)
    def wrapper(*args, **kwargs):
        return f(*args, **kwargs) * G0
    return wrapper

def counted(f):
    def wrapper(*args, **kwargs):
        LOG.append(len(args))
        return f(*args, **kwargs)
    return wrapper
"""
_HELPER_HEAD = """import contextlib, functools, math, random, types, warnings
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn"""


@dataclass
class Step:
    """The changes before a call, the call's arguments, the mode of gradients, whether the input asks for one, rows."""

    changes: list[str]
    arguments: str
    mode: str
    asks_gradient: bool
    rows: int


@dataclass
class Case:
    seed: int
    source: str
    steps: list[Step]
    is_pure: bool  # no writes, and no reads of what is another at each call

    @property
    def text(self) -> str:
        lines = [
            f"# {i}: m({step.arguments}), {step.rows} rows, {step.mode}, after {step.changes}"
            for i, step in enumerate(self.steps)
        ]
        return "\n".join([self.source, *lines])


@dataclass
class _Class:
    """A class that is being written, and where an instance of it is to be found from the model."""

    name: str
    path: str
    init: list[str] = field(default_factory=list)
    body: list[str] = field(default_factory=list)
    forward: list[str] = field(default_factory=list)

    def text(self, base: str, signature: str, first: str, last: str) -> str:
        lines = [f"class {self.name}({base}):", "    def __init__(self):", "        super().__init__()"]
        lines += [_indented(line, 8) for line in self.init] + [_indented(block, 4) for block in self.body]
        lines += [f"    def forward(self, {signature}):", _indented(first, 8)]
        return "\n".join([*lines, *(_indented(block, 8) for block in self.forward), _indented(last, 8)])


def _indented(text: str, spaces: int) -> str:
    return textwrap.indent(text, " " * spaces)


def _within(outer: str, mark: str, inner: str) -> str:
    """`outer` with `inner` in place of the mark; where that stands alone on a line, indented as the line is."""
    lines = []
    for line in outer.split("\n"):
        if line.strip() == mark:
            lines.append(_indented(inner, len(line) - len(line.lstrip())))
        else:
            lines.append(line.replace(mark, inner))
    return "\n".join(lines)


_CLASS_FORWARDS = ("Model.forward", "Base.forward", "own(", "__class__")


class _Generator:
    def __init__(self, seed: int, is_chain: bool) -> None:
        self.random = random.Random(seed)
        self.seed, self.is_chain, self.count = seed, is_chain, 0
        self.top: list[str] = []
        self.helper: list[str] = []
        self.cells: list[str] = []
        self.blocks: list[str] = []
        self.changes: list[str] = []
        self.layers: list[tuple[str, str]] = []
        self.base, self.model = _Class("Base", "m"), _Class("Model", "m")
        self.is_pure = True

    def maybe(self, chance: float) -> bool:
        return self.random.random() < chance

    def number(self) -> str:
        self.count += 1
        return str(self.count)

    def use(self, entry: Entry, owner: _Class) -> str:
        """Puts what an entry needs where it belongs, and gives its code."""
        number = self.number()

        def filled(text: str, path: str = "") -> str:
            text = text.replace("$", number).replace("&", owner.name)
            return text.replace("@", path) if path else text

        places = ((entry.top, self.top), (entry.helper, self.helper), (entry.cell, self.cells))
        for text, place in (*places, (entry.init, owner.init), (entry.body, owner.body)):
            if text:
                place.append(filled(text))
        self.changes += [filled(change, owner.path) for change in entry.changes]
        self.layers += [(filled(path, owner.path), kind) for path, kind in entry.layers]
        return filled(entry.code)

    def body(self, owner: _Class) -> str:
        return self.use(self.random.choice(BODIES), owner)

    def statements(self, kind: str, owner: _Class, is_inside: bool) -> str:
        if kind == "backbone":
            return self.use(self.random.choice(BACKBONES), owner)
        if kind == "write":
            self.is_pure = False
            return self.use(self.random.choice([write for write in WRITES if not (write.asks_x and is_inside)]), owner)
        read = self.random.choice(WILD_READS if kind == "wild read" else READS)
        self.is_pure &= kind != "wild read"
        if read.cell and owner is not self.model:
            read = READS[0]
        expr = self.use(read, owner)
        if read.is_tensor:
            return self.random.choice((f"h = {expr}", f"h = h + {expr}", f"if self.training: h = {expr}"))
        control = self.random.choice(WILD_CONTROLS if self.maybe(0.06) else CONTROLS)
        for mark, text in (("<e>", f"({expr})"), ("<b>", self.body(owner)), ("<c>", self.body(owner))):
            control = _within(control, mark, text)
        return control

    def piece(self, kind: str) -> None:
        """Some statements, in some place."""
        place, decorator, ending, call, changes = self.random.choice(PLACES)
        if self.is_chain and place not in ("body", "child", "helper", "base"):
            place, decorator, ending, call, changes = PLACES[0]
        number = self.number()
        owner = self.model
        if place.startswith("base"):
            owner = self.base
        elif place == "child":
            owner = _Class(f"Block{number}", f"m.block{number}")
        before = len(self.top), len(self.helper), len(self.cells)
        code = self.statements(kind, owner, is_inside=place != "inline" or call != "<s>")
        if len(self.cells) > before[2] and place in ("top", "helper", "recursive"):
            place, decorator, ending, call, changes = PLACES[0]  # where the names are that it uses
        elif place == "helper" and (len(self.top), len(self.helper)) != before[:2]:
            place, call, changes = "top", call.replace("helper.", ""), ""
        self.is_pure &= decorator != "@counted"
        call = call.replace("$", number)
        self.changes += [change.replace("$", number) for change in _texts(changes)]
        if place == "child":
            owner.forward.append(code)
            self.blocks.append(owner.text("nn.Module", "h", "pass", "return h"))
            self.model.init.append(f"self.block{number} = Block{number}()")
            self.layers.append((owner.path, "block"))
        elif ending:
            places = {"body": self.model.body, "base": self.base.body, "helper": self.helper}
            arguments = "self, h, depth=1" if place == "recursive" else "self, h"
            lines = [f"def step{number}({arguments}):", _indented(code, 4), f"    {ending.replace('$', number)}"]
            places.get(place, self.top).append("\n".join([decorator, *lines] if decorator else lines))
        (self.base if place == "base forward" else self.model).forward.append(_within(call, "<s>", code))

    def run(self) -> Case:
        few = self.is_chain
        kinds = ["backbone"] * self.random.choice((1, 1, 2)) + ["read"] * self.random.choice((0, 1, 1, 2, 3)[: 3 - few])
        writes = self.random.choice((0, 0, 0, 0, 1, 1, 2))
        kinds += ["write"] * (writes % 2 if few else writes) + ["wild read"] * self.maybe(0.05 if few else 0.15)
        self.random.shuffle(kinds)
        for kind in kinds:
            self.piece(kind)
        signature, first, calls = _PLAIN if few else self.random.choice(SIGNATURES)
        last = RETURNS[0] if few else self.random.choice(RETURNS)
        if self.base.forward or self.maybe(0.05):
            first = f"{first}\nh = super().forward(h)"
        model = self.model.text("Base", signature, first, last)
        if self.cells:
            made = "\n".join([*self.cells, model, "return Model"])
            model = f"def build():\n{_indented(made, 4)}\nModel = build()"
        helper = "\n".join([_HELPER_HEAD, *self.helper]).replace("\\", "\\\\")
        helper = f'helper = types.ModuleType("helper")\nexec("""{helper}\n""", helper.__dict__)'
        base = self.base.text("nn.Module", "h", "pass", "return h")
        source = "\n\n".join([_HEAD, helper, *self.top, *self.blocks, base, model])
        return Case(self.seed, source + "\n", self.steps(calls), self.is_pure)

    def steps(self, calls: tuple[str, ...]) -> list[Step]:
        steps, is_wrapped = [], False
        for i in range(self.random.randint(4, 6)):
            changes = []
            for change in [self.change() for _ in range(self.random.choice((0, 1, 1, 1, 2)))] if i else []:
                # A bound method that a wrapper keeps is of the class as it was; what fuse has put there is not.
                if not (is_wrapped and any(name in change for name in _CLASS_FORWARDS)):
                    changes.append(change)
                is_wrapped |= "forward = (lambda old: lambda *a" in change
            mode = self.random.choice(("grad", "grad", "no_grad", "inference_mode" if self.maybe(0.2) else "grad"))
            rows = 3 if self.maybe(0.8) else 4
            steps.append(Step(changes, self.random.choice(calls), mode, self.maybe(0.5), rows))
        if self.maybe(0.4):
            steps[0].changes.append("m.eval()")
        return steps

    def change(self) -> str:
        if self.changes and self.maybe(0.55):
            return self.random.choice(self.changes)
        if not self.layers or self.maybe(0.25):
            return self.random.choice(CHANGES["root"])
        path, kind = self.random.choice(self.layers)
        table = CHANGES["any"] if self.maybe(0.25) and kind not in ("plain", "parameters") else CHANGES[kind]
        return self.random.choice(table).replace("#", path)


def generate(seed: int, is_chain: bool = False) -> Case:
    """The case of that number: the same each time. is_chain: of one input, and seldom more than one chain of layers."""
    return _Generator(seed, is_chain).run()


# ---- how a case is run ----------------------------------------------------------------------------------------------


class DifferenceError(AssertionError):
    """What fastnn did is not what Python did."""


def _seed(number: int) -> None:
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)


def _random_state() -> tuple[Any, ...]:
    return torch.get_rng_state(), random.getstate(), np.random.get_state(), torch.is_grad_enabled()


def _inputs(rows: int) -> dict[str, Any]:
    return {name: torch.randn(rows, 8, dtype=torch.float64) for name in ("x", "y")}


@dataclass
class _Outcome:
    """What a call gave, and what it left behind besides the side's own state."""

    changes: list[str]  # the exceptions that the changes raised
    result: Any = None
    inputs: Any = None
    raised: str | None = None
    error: Exception | None = None
    others: Any = None
    random: Any = None


class _Side:
    """A namespace of its own for a case, and the model in it."""

    def __init__(self, case: Case) -> None:
        name = f"<case {case.seed}>"
        linecache.cache[name] = (len(case.source), None, case.source.splitlines(keepends=True), name)
        sys.modules.setdefault("case", types.ModuleType("case"))  # dataclasses look there
        self.names: dict[str, Any] = {"__name__": "case", "__builtins__": builtins}
        _seed(case.seed)
        exec(compile(case.source, name, "exec"), self.names)
        self.names["m"] = self.names["Model"]().double()
        self.optimizer: Any = None

    @property
    def model(self) -> Any:
        return self.names["m"]

    def change(self, changes: list[str]) -> _Outcome:
        outcome = _Outcome([])
        for change in changes:
            _seed(5)
            try:
                exec(change, self.names)
            except Exception as error:
                outcome.changes.append(_kind_of_error(error))
        return outcome

    def run(self, step: Step, number: int, wrap: Callable[[Any], Any] | None = None) -> _Outcome:
        """Applies the changes and calls the model, or what `wrap` makes of it."""
        outcome = self.change(step.changes)
        _seed(number)
        given = outcome.inputs = _inputs(step.rows)
        given["x"].requires_grad_(step.asks_gradient and step.mode == "grad")
        for parameter in self.model.parameters():
            parameter.grad = None
        modes = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
        _seed(number + 100)
        try:
            call = wrap(self.model) if wrap is not None else self.model
            with modes[step.mode]():
                outcome.result = eval(f"call({step.arguments})", {"call": call, **given})
            wanted = [t for t in pytree.tree_leaves(outcome.result) if isinstance(t, Tensor) and t.requires_grad]
            if wanted:
                weights = [torch.linspace(-1, 1, t.numel(), dtype=t.dtype).reshape(t.shape) for t in wanted]
                torch.autograd.backward(wanted, weights)
        except Exception as error:
            outcome.raised, outcome.error = _kind_of_error(error), error
        outcome.random = _random_state()
        torch.set_grad_enabled(True)
        return outcome

    def train(self, step: Step, number: int, function: Callable[[Tensor, Tensor], Tensor]) -> _Outcome:
        """Applies the changes, but for those that make another model, and takes a training step."""
        outcome = self.change([change for change in step.changes if not change.startswith("m = ")])
        _seed(number)
        outcome.inputs = _inputs(step.rows)
        _seed(number + 100)
        try:
            outcome.result = function(*outcome.inputs.values())
        except Exception as error:
            outcome.raised, outcome.error = _kind_of_error(error), error
        outcome.others = dict(sorted(self.optimizer.state_dict()["state"].items()))
        outcome.random = _random_state()
        torch.set_grad_enabled(True)
        return outcome


def _kind_of_error(error: Exception) -> str:
    return "RuntimeError" if isinstance(error, RuntimeError) else type(error).__name__


_STATES: dict[type, Callable[[Any], Any]] = {
    random.Random: lambda value: value.getstate(),
    torch.Generator: lambda value: value.get_state(),
    np.random.Generator: lambda value: value.bit_generator.state,
    types.CellType: lambda value: value.cell_contents,
    types.MethodType: lambda value: (value.__func__, value.__self__),
    functools.partial: lambda value: (value.func, value.args, value.keywords),
    staticmethod: lambda value: value.__func__,
    classmethod: lambda value: value.__func__,
    property: lambda value: value.fget,
    types.FunctionType: lambda value: [
        getattr(value, name) for name in ("__name__", "__defaults__", "__kwdefaults__", "__closure__", "__dict__")
    ],
}
_PYTHONS = ("__builtins__", "__weakref__", "__dict__", "__annotations__", "__doc__", "__slotnames__")
_NOT_COMPARED = (*_PYTHONS, "__warningregistry__", "_abc_impl", TOKEN)


def _attributes(value: Any) -> Any:
    """All attributes of an object, a class or a module, without what fuse adds and what Python keeps to itself."""
    if type(value).__module__ == "case" and hasattr(type(value), "__slots__"):
        return [getattr(value, name, None) for name in type(value).__slots__]
    own = getattr(value, "__dict__", None)
    if own is None:
        return None
    found = {k: v for k, v in own.items() if k not in _NOT_COMPARED and not (k == "forward" and isinstance(v, Fused))}
    found = {k: v for k, v in found.items() if not k.startswith("__builtins_dict__")}  # which Dynamo leaves in modules
    if "forward" in found:  # which in a fused model has been there before
        found["forward"] = found.pop("forward")
    return found


class _Comparison:
    """Two objects of two namespaces, and all that is in them."""

    def __init__(self, with_gradients: bool = True) -> None:
        self.with_gradients = with_gradients
        self.seen: dict[tuple[int, int], Any] = {}  # holds what was seen, so that no other object gets its address

    def differ(self, path: str, a: Any, b: Any) -> NoReturn:
        raise DifferenceError(f"{path}: stock {a}, fastnn {b}")

    def same(self, a: Any, b: Any, path: str) -> None:
        if isinstance(b, (fx.Proxy, fx.Node, StandIn)):
            self.differ(path, type(a), type(b))
        if isinstance(a, Tensor) or isinstance(b, Tensor):
            return self.tensors(a, b, path)
        if a is b or isinstance(b, (Fused, RemovableHandle)) or (id(a), id(b)) in self.seen:
            return None
        if (type(a).__module__, type(a).__qualname__) != (type(b).__module__, type(b).__qualname__):
            self.differ(path, type(a), type(b))
        self.seen[id(a), id(b)] = a, b
        if isinstance(a, (int, float, complex, str, bytes, np.generic, torch.dtype)):
            is_close = isinstance(a, (float, np.floating)) and abs(a - b) <= 1e-9 * (1.0 + abs(float(a)))
            if not is_close and repr(a) != repr(b):
                self.differ(path, repr(a), repr(b))
        elif isinstance(a, np.ndarray):
            if not np.allclose(a, b, equal_nan=True):
                self.differ(path, a, b)
        elif isinstance(a, (list, tuple, dict, set)):
            self.containers(a, b, path)
        for kind, ask in _STATES.items():
            if isinstance(a, kind):
                return self.same(ask(a), ask(b), path)
        is_own = not isinstance(a, (type, types.ModuleType)) or a.__dict__.get("__module__", a.__name__) in _OURS
        if is_own and not isinstance(a, weakref.ref):
            self.same(_attributes(a), _attributes(b), path)
        return None

    def containers(self, a: Any, b: Any, path: str) -> None:
        if len(a) != len(b):
            self.differ(path, a, b)
        if isinstance(a, dict):
            if not path.endswith("_hooks']") and [repr(k) for k in a] != [repr(k) for k in b]:  # hooks have numbers
                self.differ(path, list(a), list(b))
            for (key, one), other in zip(a.items(), b.values(), strict=True):
                self.same(one, other, f"{path}[{key!r}]")
        elif isinstance(a, set):
            if sorted(map(repr, a)) != sorted(map(repr, b)):
                self.differ(path, a, b)
        else:
            for i, (one, other) in enumerate(zip(a, b, strict=True)):
                self.same(one, other, f"{path}[{i}]")

    def tensors(self, a: Any, b: Any, path: str) -> None:
        if type(a) is not type(b):
            self.differ(path, type(a), type(b))
        if (a.shape, a.dtype, a.requires_grad) != (b.shape, b.dtype, b.requires_grad):
            self.differ(path, (tuple(a.shape), a.dtype, a.requires_grad), (tuple(b.shape), b.dtype, b.requires_grad))
        one, other, scale = a.detach(), b.detach(), 0.0
        if one.is_floating_point() and one.numel():
            scale = float(one.nan_to_num(0.0, 0.0, 0.0).abs().max())
        if not torch.allclose(one, other, rtol=1e-7, atol=1e-9 * (1 + scale), equal_nan=True):
            self.differ(path, one, other)
        if self.with_gradients and a.is_leaf:
            if (a.grad is None) != (b.grad is None):
                self.differ(f"{path}.grad", a.grad, b.grad)
            if a.grad is not None:
                self.tensors(a.grad, b.grad, f"{path}.grad")


_OURS = ("case", "helper")


def _check_state(one: _Side, other: _Side, with_gradients: bool = True) -> None:
    names = [{k: v for k, v in side.names.items() if not k.startswith("__")} for side in (one, other)]
    _Comparison(with_gradients).same(names[0], names[1], "globals")


def _check_outcomes(one: _Outcome, other: _Outcome, with_gradients: bool = True) -> None:
    if one.changes != other.changes:
        raise DifferenceError(f"the changes raise {one.changes} and {other.changes}")
    if one.raised != other.raised:
        words = "".join(traceback.format_exception(one.error or other.error))
        raise DifferenceError(f"stock raises {one.raised}, fastnn {other.raised}: {words}")
    if one.raised is None:
        comparison = _Comparison(with_gradients)
        comparison.same(one.result, other.result, "result")
        if (one.result is one.inputs["x"]) != (other.result is other.inputs["x"]):
            raise DifferenceError("only one returns its input")
        comparison.same(one.inputs, other.inputs, "inputs")
        comparison.same(one.others, other.others, "the optimizer's state")
        comparison.same(one.random, other.random, "random state")


def compare(case: Case, kind: str) -> bool:
    """Runs a case as it is and by fastnn; DifferenceError where one could tell them apart. Whether the model's forward
    was traced and a part of it fused."""
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        stock, ours = _Side(case), _Side(case)
        if kind == "freeze":
            return _compare_frozen(case, stock, ours)
        if kind == "training_step":
            return _compare_training(case, stock, ours)
        if kind == "backend":
            return _compare_compiled(case, stock, ours)
        return _compare_fused(case, kind, stock, ours)


def _compare_fused(case: Case, kind: str, stock: _Side, ours: _Side) -> bool:
    is_fused = False
    if kind in ("fuse", "alike"):
        fastnn.fuse(ours.model)
    else:
        is_taken = _try_example(case, stock, ours)
        if not (is_taken and case.is_pure):  # what is no part of the model may have seen a call
            return False
    for number, step in enumerate(case.steps):
        if kind == "alike":
            _trace_a_copy(ours.model)
        one, other = stock.run(step, number), ours.run(step, number)
        try:
            _check_outcomes(one, other)
            if one.raised is None:
                _check_state(stock, ours)
        except DifferenceError as error:
            raise DifferenceError(f"step {number} of {kind}: {error}") from None
        fused = ours.model.__dict__.get("forward")
        if isinstance(fused, FusedForward):
            is_fused |= any(trace.matches.found for some in fused.traces.values() for trace in some)
        if one.raised is not None and not step.changes:
            break
    return is_fused


def _trace_a_copy(model: nn.Module) -> None:
    """Traces a copy of a fused model, and drops the model's own traces: the step's changes decide whether the model
    gets the copy's."""
    with suppress(Exception):  # not every model can be copied
        copy.deepcopy(model).__dict__["forward"].trace(now=True)
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), FusedForward):
            module.__dict__["forward"].forget()


def _arguments(case: Case, given: dict[str, Any]) -> Any:
    """Those of the first call, without names."""
    text = case.steps[0].arguments
    return eval(f"({text},)" if "=" not in text else "(x, y)" if "y" in text else "(x,)", dict(given))


def _try_example(case: Case, stock: _Side, ours: _Side) -> bool:
    """Fuses with an example, and looks at what that changes. Whether the model takes the example."""
    _seed(0)
    arguments = _arguments(case, _inputs(case.steps[0].rows))
    before = _random_state()
    try:
        fastnn.fuse(ours.model, arguments)
    except Exception as error:
        raised = stock.run(case.steps[0], 0).raised
        if not isinstance(error, ValueError) and raised != _kind_of_error(error):
            raise
        return False
    try:
        _Comparison().same(before, _random_state(), "random state")
        _Comparison().same(stock.model, ours.model, "model")
        if case.is_pure:
            _check_state(stock, ours)
    except DifferenceError as error:
        raise DifferenceError(f"fuse with an example changes {error}") from None
    return True


def _compare_compiled(case: Case, stock: _Side, ours: _Side) -> bool:
    for number, step in enumerate(case.steps[:3]):
        outcomes = []
        for side, backend in ((stock, "eager"), (ours, "fastnn")):
            torch._dynamo.reset()
            with torch._inductor.config.patch(fallback_random=True):
                outcomes.append(side.run(step, number, functools.partial(torch.compile, backend=backend)))
        _seed(number + 100)
        if not torch.equal(outcomes[0].random[0], torch.get_rng_state()):
            return True  # it draws random numbers, and Inductor draws others
        try:
            _check_outcomes(outcomes[0], outcomes[1])
            if outcomes[0].raised is not None:  # perhaps while it was compiled, before it has written what eager has
                return True
            _check_state(stock, ours)
        except DifferenceError as error:
            raise DifferenceError(f"step {number} of backend: {error}") from None
    return True


def _mean_square(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).pow(2).mean()


# Adam divides by a gradient's size: with its usual eps a gradient that is nothing but rounding makes a whole step.
_OPTIMIZERS = (
    torch.optim.SGD,
    functools.partial(torch.optim.SGD, momentum=0.9),
    functools.partial(torch.optim.Adam, eps=1e-3),
)
_LOSSES = (nn.functional.mse_loss, nn.functional.smooth_l1_loss, nn.MSELoss(reduction="sum"), _mean_square)


def _compare_training(case: Case, stock: _Side, ours: _Side) -> bool:
    chooser = random.Random(case.seed)
    loss = chooser.choice(_LOSSES)
    make: Any = chooser.choice(_OPTIMIZERS)
    for side in (stock, ours):
        side.optimizer = make(side.model.parameters(), lr=0.02)
    step_of = fastnn.training_step(ours.model, loss, ours.optimizer)

    def ordinary(x: Tensor, target: Tensor) -> Tensor:
        value: Any = loss(stock.model(x), target)
        stock.optimizer.zero_grad()
        value.backward()
        stock.optimizer.step()
        stock.optimizer.zero_grad()
        return value.detach()

    is_one_call = False
    for number, step in enumerate(case.steps):
        one, other = stock.train(step, number, ordinary), ours.train(step, number, step_of)
        try:
            _check_outcomes(one, other, False)
            if one.raised is not None:
                break
            _check_state(stock, ours, False)
        except DifferenceError as error:
            raise DifferenceError(f"step {number} of training_step: {error}\n{step_of.explain()}") from None
        is_one_call |= "operator call" in step_of.explain()
    return is_one_call


def _compare_frozen(case: Case, stock: _Side, ours: _Side) -> bool:
    _seed(0)
    given = _inputs(case.steps[0].rows)
    kept, arguments = {name: value.clone() for name, value in given.items()}, _arguments(case, given)
    for side in (stock, ours):
        side.model.eval()
    frozen = None
    try:
        frozen = fastnn.freeze(ours.model, arguments)
    except ValueError:
        pass
    except Exception as error:
        try:
            copy.deepcopy(stock.model)(*arguments)
        except Exception:
            return False  # nobody can copy it, or it takes no such arguments
        raise DifferenceError(f"freeze raises {''.join(traceback.format_exception(error))}") from None
    try:
        _Comparison().same(stock.model, ours.model, "model")
        _Comparison().same(kept, given, "inputs")
        if case.is_pure:
            _check_state(stock, ours)
    except DifferenceError as error:
        raise DifferenceError(f"freeze changes {error}") from None
    if frozen is None:
        return False
    with torch.no_grad():
        _seed(2)
        expected = stock.model(*arguments)
        _seed(2)
        _Comparison().same(expected, frozen(*arguments), "the frozen model's result")
    return True


def cases(first: int, kind: str) -> Iterator[Case]:
    """Those for one of KINDS, from a seed on."""
    return (generate(seed, is_chain=kind == "training_step") for seed in itertools.count(first))


def main() -> int:
    parser = argparse.ArgumentParser(description="Random Python forwards, each run as it is and by fastnn.")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--kind", choices=KINDS, default="fuse")
    parser.add_argument("--brief", action="store_true", help="without the sources of cases that fail")
    options = parser.parse_args()
    torch.set_num_threads(1)
    start, failed, fused = time.monotonic(), [], 0
    for done, case in enumerate(itertools.islice(cases(options.first, options.kind), options.count), start=1):
        try:
            fused += compare(case, options.kind)
        except Exception as error:
            failed.append(case.seed)
            words = str(error) if isinstance(error, DifferenceError) else "".join(traceback.format_exception(error))
            print(f"---- seed {case.seed}\n{'' if options.brief else case.text}\n{words}", flush=True)
        if done % 250 == 0 or done == options.count:
            seconds = time.monotonic() - start
            print(f"{done} cases of {options.kind}, {len(failed)} failed, {fused} fused, {seconds:.0f} s", flush=True)
    print("failed:", failed)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
