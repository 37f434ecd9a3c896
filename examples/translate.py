"""Translates dates as people write them ("3 March 1987", "Mar 3, 87") into ISO dates, by an encoder and a decoder.

python examples/translate.py [--short] [--threads 1] [--output translate.png]
"""

import argparse
import datetime

import torch
from common import arguments, draw_losses, figure, predict_both, save, train_both
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

FORMATS = (
    *("{0.day} {0:%B} {0.year}", "{0:%b} {0.day}, {0:%y}", "{0:%d/%m/%Y}", "{0.day}.{0.month}.{0:%y}"),
    *("{0:%B} {0.day} {0.year}", "{0:%A}, {0.day} {0:%b} {0.year}"),
)
FIRST, DAYS = datetime.date(1970, 1, 1), 36524  # A hundred years, so that two digits of a year say which it is.
READ, WRITTEN = len("Wednesday, 30 Sep 2026"), len("2026-09-30")  # letters of the longest date, of each ISO date
LETTERS = "-0123456789"  # of an ISO date


def dates(days: Tensor) -> tuple[list[str], Tensor, Tensor]:
    """Dates so many days after the first, in random formats: as text, as codes of letters with zeros behind them
    (dates, READ), and the letters of their ISO dates as places in LETTERS (dates, WRITTEN)."""
    each = [FIRST + datetime.timedelta(day) for day in days.tolist()]
    formats = torch.randint(len(FORMATS), (len(days),)).tolist()
    texts = [FORMATS[number].format(date) for number, date in zip(formats, each, strict=True)]
    read = torch.tensor([list(text.ljust(READ, "\0").encode()) for text in texts])
    return texts, read, torch.tensor([[LETTERS.index(letter) for letter in date.isoformat()] for date in each])


class Translator(nn.Module):
    """Encoder and decoder with teacher forcing: reads a date and, behind it, what the decoder is to read before each
    letter of the ISO date (batch, READ + WRITTEN), and scores what each letter could be: (batch * WRITTEN, letters)."""

    def __init__(self, hidden: int = 64, width: int = 16) -> None:
        super().__init__()
        self.read = nn.Embedding(128, width)
        self.encoder = nn.LSTM(width, hidden, batch_first=True)
        self.written = nn.Embedding(len(LETTERS), width)
        self.decoder = nn.LSTM(width, hidden, batch_first=True)
        self.scores = nn.Linear(hidden, len(LETTERS))

    def encode(self, read: Tensor) -> tuple[Tensor, Tensor]:
        """The encoder's state after each date's last letter."""
        lengths = read.count_nonzero(1)
        packed = pack_padded_sequence(self.read(read), lengths, batch_first=True, enforce_sorted=False)
        return self.encoder(packed)[1]

    def forward(self, letters: Tensor) -> Tensor:
        state = self.encode(letters[:, :READ])
        output, _ = self.decoder(self.written(letters[:, READ:]), state)
        return self.scores(output).flatten(0, 1)


class Greedy(nn.Module):
    """Translates dates (batch, READ) into ISO dates (batch, WRITTEN): the decoder reads the letter that it found most
    likely before."""

    def __init__(self, translator: Translator) -> None:
        super().__init__()
        self.translator = translator

    def forward(self, read: Tensor) -> Tensor:
        own = self.translator
        state = own.encode(read)
        letter, written = torch.zeros_like(read[:, :1]), []
        for _ in range(WRITTEN):
            output, state = own.decoder(own.written(letter), state)
            letter = own.scores(output).argmax(2)
            written.append(letter)
        return torch.cat(written, 1)


def shifted(written: Tensor) -> Tensor:
    """What the decoder is to read before each letter: the letter before it, and at first what Greedy begins with."""
    return torch.cat([torch.zeros_like(written[:, :1]), written[:, :-1]], 1)


def influence(translator: Translator, letters: Tensor) -> Tensor:
    """How much each letter of one date that was read moves the score of each one written: (WRITTEN, READ)."""
    embedded = []
    with translator.read.register_forward_hook(lambda module, inputs, output: embedded.append(output)):
        scores = translator(letters).amax(1)
    return torch.cat([torch.autograd.grad(score, embedded, retain_graph=True)[0].norm(dim=2) for score in scores])


def main() -> None:
    given = arguments(argparse.ArgumentParser(description=__doc__.splitlines()[0]), "translate.png")
    days = torch.randperm(DAYS)
    _, read, written = dates(days[: 64 * (40 if given.short else 200)])
    letters = torch.cat([read, shifted(written)], 1)
    orders = [torch.randperm(len(letters)).split(64) for _ in range(1 if given.short else 6)]
    epochs = [[(letters[some], written[some].flatten()) for some in order] for order in orders]
    stock, ours = train_both(Translator(), nn.CrossEntropyLoss(), epochs, lr=5e-3)

    texts, read, written = dates(days[-1000:])
    translated = predict_both(Greedy(ours.model), read)
    accuracy = float((translated == written).all(1).double().mean())
    print(f"{accuracy:.1%} of {len(texts)} dates that were not trained on are right, such as:")
    answers = ["".join(LETTERS[letter] for letter in letters) for letters in translated.tolist()]
    for text, answer in list(zip(texts, answers, strict=True))[:6]:
        print(f"    {text:>{READ}} -> {answer}")
    assert given.short or accuracy > 0.9

    drawing, (left, right) = figure(2)
    draw_losses(left, stock, ours)
    longest = max(range(len(texts)), key=lambda place: len(texts[place]))
    text, one = texts[longest], slice(longest, longest + 1)
    moved = influence(ours.model, torch.cat([read[one], shifted(translated[one])], 1))[:, : len(text)]
    right.imshow((moved / moved.amax(1, keepdim=True)).numpy(), cmap="Oranges", aspect="auto")
    right.set_xticks(range(len(text)), text)
    right.set_yticks(range(WRITTEN), answers[longest])
    right.set(xlabel="read", ylabel="written", title=f"{accuracy:.1%} right: what moved each letter")
    save(drawing, given.output)


if __name__ == "__main__":
    main()
