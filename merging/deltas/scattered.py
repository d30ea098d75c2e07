"""Changes few of whose entries are not zero: where these lie, by groups, and a code of a few bits for each."""

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from merging.deltas.base import Whole
from merging.deltas.masked import packed, unpacked


class Form(NamedTuple):
    """How `kept` of `entries` are stored: in groups of 2^places, with `bits` each.

    A group says how many of its entries are kept, in places + 1 bits; each of these where it lies, in places bits. Of
    groups of one a bit for every entry is left, of a single group the coordinates (COO).
    """

    entries: int
    kept: int
    bits: int
    places: int

    @classmethod
    def cheapest(cls, entries: int, kept: int, bits: int) -> "Form":
        """That of the fewest bits in all, of equals the smallest groups."""
        every = (cls(entries, kept, bits, places) for places in range(max(entries - 1, 0).bit_length() + 1))
        return min(every, key=lambda form: form.total)

    @property
    def groups(self) -> int:
        return -(-self.entries // 2**self.places)

    @property
    def fields(self) -> tuple[tuple[int, int], ...]:
        """How many numbers of how many bits there are: counts, places and codes."""
        return (self.groups, self.places + 1), (self.kept, self.places), (self.kept, self.bits)

    @property
    def total(self) -> int:
        """Bits."""
        return sum(map(math.prod, self.fields))


class Scattered(Whole):
    """delta_g = (low_g + step_g code) in the entries that g keeps, minus that where their sign bit says so, else 0.

    stream: of one change after the other the bits of its `Form`, in whole bytes. levels [G, 2]: low and step. form
    [G, 3]: how many entries are kept, the bits of each, sign included, and the exponent of the groups' size.
    """

    def __init__(self, stream: Tensor, levels: Tensor, form: Tensor, shape: torch.Size):
        super().__init__()
        for name, tensor in (("stream", stream), ("levels", levels), ("form", form)):
            self.register_buffer(name, tensor)
        self.stream: Tensor
        self.levels: Tensor
        self.form: Tensor
        self.parts, self.shape = len(levels), torch.Size(shape)
        self.forms = [Form(self.shape.numel(), *numbers) for numbers in form.tolist()]
        self._spans = [*pairwise(accumulate((-(-form.total // 8) for form in self.forms), initial=0))]

    @classmethod
    def of(
        cls, places: Sequence[Tensor], codes: Sequence[Tensor], bits: Sequence[int], levels: Tensor, shape: torch.Size
    ) -> "Scattered":
        """From places [k_g] of the entries that are kept, ascending, their codes times two plus one if negative [k_g],
        and the bits of these."""
        forms = [Form.cheapest(shape.numel(), len(kept), width) for kept, width in zip(places, bits, strict=True)]
        streams = [written(*part) for part in zip(forms, places, codes, strict=True)]
        stored = torch.tensor([form[1:] for form in forms], dtype=torch.int32)
        return cls(torch.cat(streams), levels, stored, shape)

    def entries(self, index: int) -> tuple[Tensor, Tensor]:
        """Of delta_index the places [k] of the entries that are kept, and their codes [k] as `of` takes them."""
        form, (start, stop) = self.forms[index], self._spans[index]
        counts, places, codes = form.fields
        own = self.stream[start:stop]
        firsts = torch.arange(form.groups, device=own.device) << form.places
        firsts = firsts.repeat_interleave(read(own, 0, *counts), output_size=form.kept)
        inside, first = read(own, math.prod(counts), *places), math.prod(counts) + math.prod(places)
        return firsts + inside, read(own, first, *codes)

    def part(self, index: int) -> Tensor:
        places, codes = self.entries(index)
        low, step = self.levels[index]
        size = low + step * (codes >> 1)
        change = self.levels.new_zeros(self.shape.numel())
        change[places] = torch.where(codes & 1 > 0, -size, size)
        return change.view(self.shape)

    def transposed(self) -> "Scattered":
        m, n = self.shape
        places, codes = zip(*map(self.entries, range(self.parts)), strict=True)
        turned = [(known % n * m + known // n).sort() for known in places]
        codes = [known[order] for known, (_, order) in zip(codes, turned, strict=True)]
        bits = [form.bits for form in self.forms]
        return Scattered.of([known for known, _ in turned], codes, bits, self.levels, self.shape[::-1])

    @property
    def params(self) -> int:
        """Stored numbers, 32 bits counted as one."""
        return super().params - self.stream.numel() + -(-self.stream.numel() // 4)


def written(form: Form, places: Tensor, codes: Tensor) -> Tensor:
    """The bits of a change, uint8 [ceil(form.total / 8)]: of each field the lowest bits of all numbers, and so on."""
    counts = torch.bincount(places >> form.places, minlength=form.groups)
    fields = zip((counts, places & (1 << form.places) - 1, codes), form.fields, strict=True)
    planes = [(numbers >> bit) & 1 > 0 for numbers, (_, width) in fields for bit in range(width)]
    return packed(torch.cat(planes)[None])[0]


def read(stream: Tensor, first: int, count: int, width: int) -> Tensor:
    """The `count` numbers, int64, of a field of `width` bits that starts at bit `first`."""
    numbers = torch.zeros(count, dtype=torch.int64, device=stream.device)
    for bit in range(width):  # one after the other: no table of all bits
        byte, skipped = divmod(first + bit * count, 8)
        flags = unpacked(stream[byte : byte + -(-(skipped + count) // 8)], skipped + count)
        numbers += flags[skipped:].long() << bit
    return numbers
