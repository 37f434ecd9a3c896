"""The drawings of the pages about kernels, as SVG that is put into the page itself: lines and letters have the page's
own colour, and the three other colours are seen on white and on black."""

from __future__ import annotations

from collections.abc import Callable
from xml.sax.saxutils import escape

ORANGE, BLUE, GREEN = "#e07b39", "#3d8fd1", "#3f9f6b"


class Drawing:
    """Shapes of one drawing, in pixels from its upper left corner."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" width="100%"'
            f' style="max-width: {width}px" font-family="sans-serif" fill="none" stroke-linejoin="round">',
            f"<title>{escape(title)}</title>",
        ]

    def __str__(self) -> str:
        return "\n".join([*self.parts, "</svg>\n"])

    def box(self, x: float, y: float, width: float, height: float, color: str = "", *words: str) -> None:
        """A rectangle, filled where it has a colour, with lines of words in its middle."""
        look = f'fill="{color}" fill-opacity="0.3" stroke="{color}"' if color else 'stroke="currentColor" opacity="0.5"'
        self.parts.append(f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="2" {look}/>')
        self.words(x + width / 2, y + height / 2 + 5 - 9 * (len(words) - 1), *words)

    def words(self, x: float, y: float, *lines: str, anchor: str = "middle", size: int = 14, color: str = "") -> None:
        """Lines of words below each other, the first on the line y."""
        for i, line in enumerate(lines):
            self.parts.append(
                f'<text x="{x:g}" y="{y + 18 * i:g}" font-size="{size}" text-anchor="{anchor}"'
                f' fill="{color or "currentColor"}">{escape(line)}</text>'
            )

    def cells(
        self, x: float, y: float, columns: int, rows: int, size: float, color: Callable[[int, int], str] = lambda *_: ""
    ) -> None:
        """A grid of squares; color: that of the one in a column and row."""
        for row in range(rows):
            for column in range(columns):
                self.box(x + size * column, y + size * row, size, size, color(column, row))

    def arrow(self, x: float, y: float, to_x: float, to_y: float, color: str = "currentColor") -> None:
        """A straight arrow, level or upright."""
        dx, dy = (to_x > x) - (to_x < x), (to_y > y) - (to_y < y)
        end_x, end_y = to_x - 9 * dx, to_y - 9 * dy
        head = f"{to_x:g},{to_y:g} {end_x - 5 * dy:g},{end_y - 5 * dx:g} {end_x + 5 * dy:g},{end_y + 5 * dx:g}"
        self.parts.append(f'<path d="M{x:g} {y:g}L{end_x:g} {end_y:g}" stroke="{color}" stroke-width="1.5"/>')
        self.parts.append(f'<polygon points="{head}" fill="{color}"/>')


def tile() -> str:
    drawing = Drawing(860, 330, "The way of the bytes through a fused convolution, and the tile of sums in registers")
    for x, words in ((75, "memory"), (245, "L2"), (435, "registers"), (630, "L1"), (790, "memory")):
        drawing.words(x, 20, words, size=13, color=ORANGE)
    # The input, with the band of one thread.
    drawing.cells(20, 60, 9, 12, 12, lambda column, row: BLUE if 3 <= row < 8 else "")
    drawing.words(75, 235, "the input, and in", "blue what one band", "of the output needs")
    drawing.arrow(134, 120, 176, 120)
    # Its copy, with padding at the sides.
    drawing.cells(183, 84, 11, 6, 11, lambda column, row: "" if column in (0, 10) else BLUE)
    drawing.words(243, 235, "this part is copied", "with its padding", "once a band")
    drawing.arrow(310, 120, 352, 120)
    # The tile: pixels down, vectors of output channels across.
    for pixel in range(7):
        drawing.box(362, 60 + 18 * pixel, 14, 14, BLUE)
        for vector in range(2):
            drawing.box(392 + 60 * vector, 60 + 18 * pixel, 54, 14, GREEN)
    for vector in range(2):
        drawing.box(392 + 60 * vector, 38, 54, 14, ORANGE)
    drawing.words(515, 50, "weights", anchor="start", size=12)
    drawing.words(369, 205, "pixels", size=12)
    drawing.words(449, 205, "sums", size=12)
    drawing.words(435, 235, "a tile: each pixel times", "two vectors of weights", "is added to its sums")
    drawing.arrow(516, 120, 562, 120)
    # The ring, and the windows that are pooled from it.
    drawing.cells(570, 84, 10, 4, 12, lambda column, row: GREEN if row < 2 else "")
    drawing.words(630, 235, "a ring of the rows that", "the pool's windows", "still need")
    drawing.arrow(696, 120, 738, 120)
    drawing.cells(745, 84, 6, 6, 14, lambda column, row: ORANGE if 1 <= row < 3 else "")
    drawing.words(790, 235, "pooled output,", "written once,", "by band")
    drawing.words(430, 310, "The output of the convolution itself is never in memory.")
    return str(drawing)


def winograd() -> str:
    drawing = Drawing(860, 260, "Winograd's F(2x2, 3x3): 16 multiplications for four pixels in place of 36")
    for x, color, words in (
        (20, BLUE, ("4 x 4 pixels", "of one channel")),
        (190, BLUE, ("16 sums and", "differences")),
        (360, ORANGE, ("the 3 x 3 weights", "as 16 sums")),
        (560, GREEN, ("16 sums of", "products")),
    ):
        drawing.cells(x, 60, 4, 4, 24, lambda column, row, color=color: color)
        drawing.words(x + 48, 185, *words)
    drawing.cells(750, 84, 2, 2, 24, lambda column, row: GREEN)
    drawing.words(774, 185, "2 x 2 pixels of", "the convolution")
    drawing.arrow(124, 108, 182, 108)
    drawing.words(150, 96, "add", size=12)
    drawing.words(323, 116, "\N{MULTIPLICATION SIGN}", size=26)
    drawing.arrow(464, 108, 552, 108)
    drawing.words(506, 78, "add up", "the channels", size=12)
    drawing.arrow(664, 108, 742, 108)
    drawing.words(700, 96, "add", size=12)
    drawing.words(430, 245, "16 multiplications a channel. Directly, each of the four pixels takes 9, which is 36.")
    return str(drawing)


def mlp() -> str:
    drawing = Drawing(860, 300, "A block of rows goes through all layers of a chain while it stays in cache")
    drawing.cells(55, 60, 5, 12, 12, lambda column, row: BLUE if 3 <= row < 7 else "")
    drawing.words(85, 228, "input, in memory:", "a row an example")
    left = 125.0
    places = (("between the layers,", "in L1", 4), ("between the layers,", "in L1", 3), ("output,", "in memory", 5))
    for i, (name, place, width) in enumerate(places):
        drawing.arrow(left, 120, left + 34, 120)
        drawing.box(left + 40, 64, 88, 112, ORANGE, f"weights {i + 1},", "bias,", "activation")
        drawing.arrow(left + 134, 120, left + 168, 120)
        is_last = place == "in memory"
        drawing.cells(
            left + 174, 60 if is_last else 96, width, 12 if is_last else 4, 12,
            lambda column, row, is_last=is_last: GREEN if 3 <= row < 7 or not is_last else "",
        )  # fmt: skip
        drawing.words(left + 174 + 6 * width, 228, name, place)
        left += 174 + 12 * width + 8
    drawing.words(430, 285, "A block of rows (blue) goes through all layers before the next block begins.")
    return str(drawing)


def rnn_block() -> str:
    drawing = Drawing(860, 300, "Steps of a recurrent layer, in blocks")
    drawing.words(20, 30, "a block of steps", anchor="start")
    for step in range(6):
        drawing.box(20 + 70 * step, 45, 62, 40, BLUE, f"x{step + 1}")
    drawing.arrow(225, 92, 225, 122)
    drawing.words(240, 112, "one product for all steps of the block: x W_ih + biases", anchor="start", size=12)
    for step in range(6):
        drawing.box(20 + 70 * step, 130, 62, 30, GREEN)
        drawing.arrow(51 + 70 * step, 163, 51 + 70 * step, 196)
        drawing.box(20 + 70 * step, 200, 62, 40, ORANGE, f"h{step + 1}")
        if step:
            drawing.arrow(20 + 70 * step - 8, 220, 20 + 70 * step, 220)
    drawing.words(450, 150, "gates without what the state adds:", "they stay in cache until their step", anchor="start")
    drawing.words(
        450, 212, "then step by step: h W_hh is added,", "and the gates' functions are applied", anchor="start"
    )
    drawing.words(430, 282, "Only the recurrent weights are read at every step; all other weights once a block.")
    return str(drawing)


def wavefront() -> str:
    drawing = Drawing(860, 300, "A wavefront of layers: what has one number runs at the same time")
    layers, chunks, width, height = 4, 8, 80, 44
    colors = (BLUE, GREEN, ORANGE)
    for layer in range(layers):
        y = 30 + height * (layers - 1 - layer)
        drawing.words(95, y + 26, f"layer {layer + 1}", anchor="end")
        for chunk in range(chunks):
            when = layer + chunk
            drawing.box(110 + width * chunk, y, width - 6, height - 6, colors[when % 3], str(when + 1))
    drawing.arrow(110, 222, 744, 222)
    drawing.words(427, 245, "chunks of steps, in the order of time")
    drawing.words(
        430,
        282,
        "A layer begins a chunk as soon as the layer below has finished it. Squares with one number run at once.",
    )
    return str(drawing)


def training_step() -> str:
    drawing = Drawing(860, 330, "A training step in one call, beside the same step in many")
    drawing.words(
        20,
        30,
        "the ordinary way: a call of an operator for each layer, forward and backward, and Python between",
        anchor="start",
    )
    names = ["forward", "forward", "loss", "backward", "backward", "clip", "update"]
    for i, name in enumerate(names):
        drawing.box(20 + 118 * i, 45, 84, 40, BLUE, name)
        if i:
            drawing.arrow(20 + 118 * i - 32, 65, 20 + 118 * i - 2, 65)
            drawing.words(20 + 118 * i - 17, 58, "Python", size=9)
    drawing.words(20, 130, "training_step: the same work as one call", anchor="start")
    drawing.box(20, 145, 792, 92)
    for i, name in enumerate(("forward", "loss", "backward", "checks", "clip", "update")):
        drawing.box(36 + 128 * i, 165, 110, 52, GREEN if i < 3 else ORANGE, name)
        if i:
            drawing.arrow(36 + 128 * i - 17, 191, 36 + 128 * i - 1, 191)
    drawing.words(210, 262, "writes to scratch memory alone", size=13, color=GREEN)
    drawing.words(630, 262, "writes parameters and states, once all checks have passed", size=13, color=ORANGE)
    drawing.words(
        430, 310, "Parameters and states are bound to the call before the first step, and compared before each."
    )
    return str(drawing)


DRAWINGS = {draw.__name__: draw for draw in (tile, winograd, mlp, rnn_block, wavefront, training_step)}
