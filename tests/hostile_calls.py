"""Calls of the raw operators with sizes and numbers near the ends of 21, 31, 32 and 63 bits, made by a seed:

    python tests/hostile_calls.py SEED COUNT

Each must answer or raise a Python exception, soon. What ends the process is found by whoever started it
(test_hostile_calls.py): the call to be made is the last line on standard error.
"""

import faulthandler
import random
import resource
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import fastnn.ops.conv_relu_max_pool
import fastnn.ops.rnn
from fastnn import _C
from fastnn.activations import KINDS

OPS = torch.ops.fastnn
MEMORY = 512 << 20  # that calls may take beyond what the process has: more is an exception
SOON = 10  # seconds
ALGORITHMS = ("winograd", "phases", "pixels", "depthwise", "direct", "stock")

Call = tuple[str, list[Any]]


class Hostile:
    """Draws arguments: most of them small and fitting, some of them near the end of what numbers hold."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def huge(self, least_bits: int = 21) -> int:
        bits = self.random.choice([b for b in (21, 31, 32, 62, 63) if b >= least_bits])
        value = (1 << bits) // self.random.choice([1, 1, 1, 2, 3]) + self.random.choice([-2, -1, -1, 0, 0, 1, 2])
        return min(value, (1 << 63) - 1)

    def maybe(self, share: float) -> bool:
        return self.random.random() < share

    def small(self, most: int) -> int:
        return self.random.randint(1, most)

    def tensor(self, sizes: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Of memory as far as there is any: beyond, its elements are all the same one. Some have lost theirs."""
        empty = 0 in sizes
        own = [size if empty or size < 1 << 12 else 1 for size in sizes]
        try:
            tensor = torch.zeros(own, dtype=dtype).expand(list(sizes))
        except RuntimeError:  # libtorch has none of these sizes
            tensor = torch.zeros([0] * len(sizes), dtype=dtype)
        if self.maybe(0.02):
            tensor.untyped_storage().resize_(self.random.choice([0, 0, 1, 7]))
        return tensor

    def sizes(self, *sizes: int, share: float = 0.05, empty: float = 0.03) -> list[int]:
        """Each in some calls huge, or none. (Sizes from 2^21 on would be worked on, which takes time.)"""
        return [self.huge(31) if self.maybe(share) else 0 if self.maybe(empty) else size for size in sizes]

    def conv(self) -> Call:
        dims = self.random.randint(1, 3)
        dtype = self.random.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16])
        hostile = self.random.choice([0.02, 0.1, 0.3])

        def each(least: int, most: int, share: float = hostile) -> list[int]:
            return [self.huge() if self.maybe(share) else self.random.randint(least, most) for _ in range(dims)]

        kernel, stride, padding, dilation = each(1, 3, 0.01), each(1, 2), each(0, 1), each(1, 2)
        pool, pool_stride, pool_padding, pool_dilation = each(1, 3), each(1, 3), each(0, 0), each(1, 2)
        for d in range(dims):
            if self.maybe(0.7):
                pool_padding[d] = self.random.choice([0, min(1, pool[d] // 2), pool[d] // 2])
            if max(padding[d], dilation[d]) > 99 and self.maybe(0.7):  # so that the kernel's ends meet the input's
                padding[d] = dilation[d] = self.random.choice([padding[d], dilation[d]])
                kernel[d] = self.random.choice([1, 3])
                stride[d] = self.random.choice([1, max(padding[d], 1), 2 * padding[d] + 1])
            if pool[d] > 99 and self.maybe(0.7):
                pool_stride[d] = self.random.choice([1, pool[d], pool[d] - 1])
        groups = self.random.choice([1, 1, 2, 4, self.huge()]) if self.maybe(0.3) else 1
        batch, channels, out = self.sizes(self.small(3), self.small(20), self.small(20), share=0.02)
        image = [self.huge(31) if self.maybe(0.01) else self.random.randint(1, 12) for _ in range(dims)]
        groups_used = groups if groups < 99 else 1
        input = self.tensor([batch, channels * groups_used if channels < 99 else channels, *image], dtype)
        weight = self.tensor([out * groups_used if out < 99 else out, channels, *kernel], dtype)
        whole = input.untyped_storage().nbytes() == input.numel() * input.element_size()
        if dims > 1 and whole and self.maybe(0.3):
            input = input.contiguous(memory_format=torch.channels_last if dims == 2 else torch.channels_last_3d)
        bias = self.tensor([weight.shape[0]], dtype) if self.maybe(0.5) else None
        numbers = [stride, padding, dilation, pool, pool_stride, pool_padding, pool_dilation]
        geometry = [
            *(number for values in numbers for number in values),
            groups,
            self.huge() if self.maybe(0.05) else self.random.randint(0, 1),
        ]
        name = self.random.choice(["", "", "_with_winners", "_algorithm", "_backward"])
        if name != "_backward":
            algorithm = self.random.choice([None, None, None, *ALGORITHMS, "x" * self.small(999)])
            return f"conv_relu_max_pool{name}", [input, weight, bias, geometry, algorithm]
        try:
            sizes = fastnn.ops.conv_relu_max_pool.output_sizes(input.shape, weight.shape, geometry)
        except ZeroDivisionError:
            sizes = [1] * (dims + 2)
        sizes = [size if 0 <= size < 1 << 63 else 1 for size in sizes]
        wanted = [self.maybe(0.8) for _ in range(3)]
        gradient, winners = self.tensor(sizes, dtype), self.tensor(sizes, torch.uint8)
        return "conv_relu_max_pool_backward", [gradient, winners, input, weight, geometry, *wanted]

    def mlp(self) -> Call:
        dtype = self.random.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16])
        share, empty = self.random.choice([(0.03, 0.03), (0.3, 0.5), (0.1, 0.8)])
        layers = self.random.choice([1, 2, 3, 20])
        fitting = [self.small(9), *(self.small(20) for _ in range(layers + 1))]
        rows, *widths = self.sizes(*fitting, share=share, empty=empty)
        text = "|".join(self.activation() for _ in range(layers))
        if self.maybe(0.05):
            text = text[: self.random.randrange(len(text))]
        input = self.tensor([rows, widths[0]], dtype)
        weights = [self.tensor([widths[i + 1], widths[i]], dtype) for i in range(layers)]
        biases = [self.tensor([width], dtype) for width in widths[1:]] if self.maybe(0.5) else []
        name = self.random.choice(["mlp", "mlp_with_hidden", "mlp_backward"])
        if name != "mlp_backward":
            return name, [input, weights + biases, text]
        saves_input = not text.endswith(("identity", "relu", "tanh", "sigmoid"))
        hidden = [self.tensor([rows, width], dtype) for width in (widths[1:] if saves_input else widths[1:-1])]
        output = self.tensor([rows, widths[-1]], dtype)
        gradient, wanted = self.tensor([rows, widths[-1]], dtype), [self.maybe(0.8) for _ in range(3)]
        return name, [gradient, input, weights, text, output, hidden, *wanted]

    def activation(self) -> str:
        kind = self.random.choice(list(KINDS.values()))
        values = ",".join(repr(self.random.uniform(-3, 3)) for _ in kind.parameters)
        return f"{kind.name}({values})" if values and self.maybe(0.7) else kind.name

    def rnn(self) -> Call:
        dtype = self.random.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16])
        mode = self.random.randrange(4)
        gates, states = (1, 1, 3, 4)[mode], 2 if mode == 3 else 1
        share, empty = self.random.choice([(0.02, 0.02), (0.1, 0.1), (0.3, 0.5)])
        length, batch, features, hidden = self.sizes(
            self.small(4), self.small(4), self.small(9), self.small(9), share=share, empty=empty
        )
        layers, directions = self.small(3), self.small(2)
        bidirectional, batch_first, biased = directions == 2, self.maybe(0.5), self.maybe(0.5)
        name = self.random.choice(["rnn", "rnn_cell", "rnn_with_reserve", "rnn_backward"])
        packed = name != "rnn_cell" and self.maybe(0.3)
        if name == "rnn_cell":
            layers = directions = 1
        projects = mode == 3 and 1 < hidden < 99 and self.maybe(0.3) and name != "rnn_cell"
        projected = self.small(hidden - 1) if projects else 0
        units = gates * hidden if hidden < 99 else hidden
        outputs = projected or hidden
        weights = []
        for i in range(layers * directions):
            columns = features if i < directions else directions * outputs if outputs < 99 else outputs
            weights += [self.tensor([units, columns], dtype), self.tensor([units, outputs], dtype)]
            weights += [self.tensor([units], dtype), self.tensor([units], dtype)] if biased else []
            weights += [self.tensor([projected, hidden], dtype)] if projected else []
        if name == "rnn_cell":
            state = [self.tensor([batch, hidden], dtype) for _ in range(states)]
            if self.maybe(0.1):
                mode = self.huge()
            h, c = [state[0] if self.maybe(0.7) else None, state[1] if states == 2 else None]
            if h is None:
                c = None
            return name, [self.tensor([batch, features], dtype), mode, h, c, *weights]
        number = layers * directions
        state = [self.tensor([number, batch, size], dtype) for size in (outputs, hidden)[:states]]
        if self.maybe(0.5):
            state = []
        batch_sizes = None
        rows = length * batch if max(length, batch) < 99 else max(length, batch)
        if packed:
            lengths = [batch] * min(length, 9) if length < 99 else [batch]
            if self.maybe(0.2):
                lengths = [self.huge() for _ in range(self.small(3))]
            batch_sizes = torch.tensor(lengths, dtype=torch.int64)
            input = self.tensor([rows, features], dtype)
            batch_first = False
        else:
            input = self.tensor([batch, length, features] if batch_first else [length, batch, features], dtype)
        width = directions * outputs if outputs < 99 else outputs
        masks = self.tensor([layers - 1, rows, width], dtype) if self.maybe(0.2) else None
        given_layers = self.huge() if self.maybe(0.05) else layers
        given_mode = self.huge() if self.maybe(0.03) else mode
        config = [given_mode, given_layers, bidirectional, batch_first]
        if name != "rnn_backward":
            return name, [input, batch_sizes, state, weights, masks, *config]
        output = self.tensor([rows, width] if packed else [*input.shape[:2], width], dtype)
        kept = (0, 0, 4, 5)[mode]
        reserve = self.tensor([min((layers - 1) * rows * width + number * kept * rows * hidden, (1 << 63) - 1)], dtype)
        gradient = self.tensor(output.shape, dtype) if self.maybe(0.7) else None
        grad_state = [
            self.tensor([number, batch, size], dtype) if self.maybe(0.7) else None
            for size in (outputs, hidden)[:states]
        ]
        wanted = [self.maybe(0.8) for _ in range(3)]
        return name, [gradient, grad_state, input, batch_sizes, state, weights, masks, output, reserve,
                      *config, *wanted]  # fmt: skip

    def step(self) -> Call:
        dtype = self.random.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16])
        rows, features, classes = self.sizes(self.small(4), self.small(9), self.small(9))
        parameters = [self.tensor([classes, features], dtype), self.tensor([classes], dtype)]
        linear = "linear input=x weight=w bias=b -> y"
        lines = [linear]
        if self.maybe(0.4):
            n = [self.huge() if self.maybe(0.1) else self.random.randint(0, 2) for _ in range(6)]
            more = self.random.choice(
                [
                    f"conv input=x weight=w bias=b -> y stride={n[0]},{n[1]} padding={n[2]}"
                    f" activation=relu pool={n[3]}",
                    f"linear input=x weight=w bias=b -> y activation=hardtanh({n[0]},{n[1]})",
                    f"rnn input=x weights=w,b -> y mode=GRU bias={n[0]} batch_first={n[1]} dropout={n[2]}",
                    f"slice input=x -> z dim={n[0]} start={n[1]} stop={n[2]} step={n[3]}",
                    f"select input=x -> z dim={n[0]} index={n[1]}",
                    f"split input=x -> z u dim={n[0]} chunks={n[1]} size={n[2]}",
                    f"pad input=x -> z padding={n[0]},{n[1]}",
                    f"reshape input=x like=x,w -> z sizes={n[0]},{n[1]}.{n[2]}",
                    f"flatten input=x -> z start_dim={n[0]} end_dim={n[1]}",
                    f"mean input=x -> z dims={n[0]} keepdim={n[1] % 2}",
                    f"binary input=x other=w -> z function={self.random.choice(['add', 'mul', 'div', 'maximum'])}",
                    "matmul input=x other=w -> z",
                    f"upsample input=x -> z factors={n[0]},{n[1]}",
                    f"max_pool input=x -> z kernel={n[0]},{n[1]} padding={n[2]} dilation={n[3]}",
                    f"layer_norm input=x -> z features={n[0]}",
                    f"dropout input=x -> z p={n[0]}",
                ]
            )
            lines = [more] if "-> y" in more else [more, linear.replace("input=x", "input=z")]
        weights = ["weight -> w sizes=", "weight -> b sizes="]
        program = "\n".join(["fastnn.network 1", "input -> x", *weights, *lines, "output input=y"])
        kind, optimizer = self.random.randrange(6), self.random.randrange(len(_C.optimizers()))
        _, settings, numbers_kept, states = _C.optimizers()[optimizer]
        by_class = kind == 5
        target = self.tensor([rows] if by_class else [rows, classes], torch.int64 if by_class else dtype)
        numbers_of_step = [kind, 1, 0.5, -100, optimizer, self.random.choice([-1, 1])]
        kept = [self.maybe(0.5) or (not setting and self.maybe(0.9)) for _, setting in states]
        usual = {"lr": 0.1, "beta1": 0.9, "beta2": 0.9, "alpha": 0.9, "eps": 1e-8}
        of_group = [usual.get(name, 0.0) for name in settings]
        all_numbers = torch.tensor([*numbers_of_step, *of_group], dtype=torch.float64)
        layout = [0, sum(one << i for i, one in enumerate(kept))] * 2
        if self.maybe(0.1):
            layout[self.random.randrange(4)] = self.random.choice([self.huge(), -1, 1, 16])
        if self.maybe(0.1):
            all_numbers[self.random.randrange(len(all_numbers))] = float(self.huge())
        state = []
        for parameter in parameters:
            state += [torch.tensor(value) for _, value in numbers_kept]
            state += [self.tensor(parameter.shape, dtype) for one in kept if one]
        weight = self.tensor([classes], dtype) if self.maybe(0.2) else None
        input = self.tensor([rows, features], dtype)
        if self.maybe(0.3):
            bound = OPS.bind_training_step(parameters, state, program, weight, layout)
            if self.maybe(0.1):
                bound += self.huge()
            if self.maybe(0.5):
                return "bound_training_step", [input, target, bound, all_numbers]
            gradients = [self.tensor(parameter.shape, dtype) for parameter in parameters]
            if self.maybe(0.3):
                gradients = gradients[self.random.choice([1, -1]) :] + gradients[:1] * self.small(3)
            if self.maybe(0.5):
                return "bound_training_update", [gradients, bound, all_numbers]
            return "bound_training_gradients", [[input], target, bound, all_numbers, gradients]
        return "training_step", [
            *([input], target, parameters, state, program, weight, layout, all_numbers),
            self.maybe(0.5),
        ]

    def step_in_two(self) -> Call:
        """A layer that fits, of which a number or a tensor may be another, and backward of what forward has left."""
        n, c, k, m = (self.small(4) for _ in range(4))
        image, weight = [n, c, m + k, m + k], [4, c, k, k]
        norm = "mean=w0 variance=w1 weight=w2 bias=w3"
        lines, sizes, shapes = self.random.choice(
            [
                (["linear input=x weight=w0 bias=w1 -> y activation=relu"], [n, c], [[k, c], [k]]),
                (["conv input=x weight=w0 bias=w1 -> y activation=relu pool=2,2"], image, [weight, [4]]),
                (["conv input=x weight=w0 bias=w1 -> y stride=1,1 padding=0"], image, [weight, [4]]),
                (["conv_transpose input=x weight=w0 -> y stride=1,2 padding=0"], image, [[c, 2, k, k]]),
                ([f"batch_norm input=x {norm} -> y dims=2 activation=relu pool=1,1"], image, [[c]] * 4),
                ([f"batch_norm input=x {norm} -> y dims=2 trains=0"], image, [[c]] * 4),
                (["rnn input=x weights=w0,w1,w2,w3 -> y h mode=RNN_TANH"], [n, m, c], [[k, c], [k, k], [k], [k]]),
                (
                    [
                        "rnn input=x weights=w0,w1,w2,w3,w4,w5,w6,w7 -> z h mode=RNN_RELU batch_first=1 dropout=0.5",
                        "select input=z -> y dim=1 index=0",
                    ],
                    [n, m, c],
                    [[c, c], [c, c], [c], [c]] * 2,
                ),
                (["adaptive_avg_pool input=x -> z sizes=2,1", "flatten input=z -> y start_dim=1"], image, []),
                (["avg_pool input=x -> y kernel=1,1 stride=1,1"], image, []),
                (["max_pool input=x -> y kernel=1,1 padding=0"], image, []),
                (["upsample input=x -> y factors=2,1 linear=1"], image, []),
                (["dropout input=x -> z p=0.5", "activation input=z -> y activation=exp"], [n, m, c], []),
                (["split input=x -> z u dim=1 size=1", "cat inputs=u,x,z -> y dim=1"], [n, 2, c], []),
                (["layer_norm input=x weight=w0 -> z features=1", "mean input=z -> y dims=0"], [n, 1], [[1]]),
                (["transpose input=x -> z first=1 second=2", "matmul input=x other=z -> y"], [n, m, c], []),
                (["unsqueeze input=x -> z dim=0", "contiguous input=z -> y"], [n, m], []),
                (["group_norm input=x weight=w0 bias=w1 -> z groups=1", "amax input=z -> y dims=1"], image, [[c], [c]]),
                (["clamp input=x -> z min=-1.0", "unary input=z -> y function=abs"], [n, c], []),
                (["expand input=x -> z sizes=3,-1,-1", "repeat input=z like=x -> y sizes=1,0.0,2"], [n, c], []),
                (["full like=x -> z value=2.0 sizes=0.0,1", "binary input=x other=z -> y function=mul"], [n, c], []),
                (["noise like=x -> z", "squeeze input=z -> y dim=0"], [1, n], []),
                (["noise like=x -> z keeps=1 p=0.5", "lerp input=x other=z amount=x -> y"], [n, c], []),
                (["windows input=x -> z dim=1 size=1 step=2", "cumsum input=z -> y dim=0"], [n, c], []),
                (["size like=x -> z sizes=0.1 power=2.0", "binary input=x other=z -> y function=mul"], [n, c], []),
            ]
        )
        input, parameters = torch.zeros(sizes), [torch.zeros(shape) for shape in shapes]

        def text() -> str:
            weights = [f"weight -> w{i} sizes=" for i in range(len(shapes))]
            output = "y,h" if "-> y h" in lines[0] else "y"
            return "\n".join(["fastnn.network 1", "input -> x", *weights, *lines, f"output input={output}"])

        outputs, kept = OPS.network_with_pass([input], parameters, text())
        if self.maybe(0.4):
            words = lines[0].split(" ")
            place = self.random.choice([i for i, word in enumerate(words) if "=" in word])
            name, _, old = words[place].partition("=")
            numbers = [str(self.huge() if self.maybe(0.5) else self.random.randint(0, 9)) for _ in old.split(",")]
            words[place] = f"{name}={','.join(numbers)}"
            lines[0] = " ".join(words)
        tensors = [*outputs, input, *parameters]
        if self.maybe(0.6):
            place = self.random.randrange(len(tensors))
            other = list(tensors[place].shape)
            for i in range(len(other)):
                other[i] = self.huge() if self.maybe(0.2) else self.random.randint(0, 9)
            tensors[place] = self.tensor(other, tensors[place].dtype)
        gradients, (input, *parameters) = tensors[: len(outputs)], tensors[len(outputs) :]
        if self.maybe(0.4):
            return "network_with_pass", [[input], parameters, text()]
        if self.maybe(0.1):
            kept = kept + self.random.choice([-1, 1, self.huge()])
        running = 2 if lines[0].startswith("batch_norm") else 0
        layout = [-1, 0] * running + [0, 0] * (len(parameters) - running)
        numbers_of_step = torch.tensor([0.0, 0, 0, 0, 0, -1, 0.1, *[0] * 5]).double()
        given = [None if self.maybe(0.2) else gradient for gradient in gradients]
        if self.maybe(0.3):
            wanted = sorted(self.random.sample(range(1 + len(parameters)), self.random.randint(0, len(parameters))))
            if self.maybe(0.2):
                wanted.append(self.random.choice([-1, 0, len(parameters) + 1, self.huge()]))
            return "network_backward", [given, kept, [input], parameters, wanted, self.maybe(0.5)]
        if self.maybe(0.1):
            return "network_draws", [kept]
        return "training_step_backward", [given, kept, parameters, [], layout, numbers_of_step, self.maybe(0.5)]


def described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype)[6:]}{list(value.shape)}"
    return f"[{', '.join(map(described, value))}]" if isinstance(value, list) else repr(value)


def main(seed: int, count: int) -> None:
    torch.set_num_threads(2)
    torch.ops.fastnn.mlp(torch.zeros(999, 99), [torch.zeros(99, 99)], "identity")  # starts the threads
    hostile = Hostile(seed)
    kinds: list[Callable[[], Call]] = [hostile.conv, hostile.conv, hostile.mlp, hostile.rnn, hostile.step]
    kinds.append(hostile.step_in_two)
    with open("/proc/self/statm") as memory:
        limit = int(memory.read().split()[0]) * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    answered = refused = 0
    for i in range(count):
        name, arguments = hostile.random.choice(kinds)()
        print(f"{i} {name}({', '.join(map(described, arguments))})", file=sys.stderr, flush=True)
        faulthandler.dump_traceback_later(SOON, exit=True)
        try:
            getattr(OPS, name)(*arguments)
            answered += 1
        except (RuntimeError, TypeError, ValueError, OverflowError, MemoryError):
            refused += 1
    print(answered, refused)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
