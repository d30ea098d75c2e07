"""Models whose tables of tokens have other rows: refused, or aligned by the strings of the tokens."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merging.checkpoints.base import Checkpoint, Flat, Spec
from merging.checkpoints.views import Piece, View, pieces_of
from merging.errors import UserError
from merging.tokenizers import Tokenizer, added_tokens, token_ids, tokenizer_of

CHOICES = ("same", "base", "union")
TABLES = {  # modules with a row per token, by their last name
    "embed_tokens", "lm_head", "wte", "word_embeddings", "shared", "embed_in", "embed_out", "tok_embeddings",
}  # fmt: skip
PLAIN = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)  # of a token that is added
HINT = (
    "Experts of one vocabulary are merged as they are; vocabulary=base keeps the base's tokens, and vocabulary=union "
    "those of all, aligned by their strings in the tokenizers of the folders."
)


def is_table(key: str) -> bool:
    """Whether a parameter has a row per token."""
    return key.rpartition(".")[0].rpartition(".")[2] in TABLES


class Aligned(View):
    """A checkpoint whose tables have the rows of a common vocabulary.

    tokenizer: the one of the aligned models. rows: of their tables.
    """

    def __init__(self, pieces: Mapping[str, Piece], below: Sequence[Checkpoint], tokenizer: Tokenizer, rows: int):
        super().__init__(pieces, *below)
        self.name, self.files, self.adapts = below[0].name, below[0].files, None
        self.tokenizer, self.rows = tokenizer, rows

    @property
    def id(self) -> str:
        added = sorted(token["content"] for token in self.tokenizer.added)
        return hashlib.sha256(f"{super().id} {self.rows} {added}".encode()).hexdigest()


def aligned(checkpoints: Sequence[Checkpoint], names: Sequence[str], choice: str) -> list[Checkpoint]:
    """Base and experts, called by their names, with one vocabulary; themselves where they have one already.

    same: refused where tables differ in size, or an id is of two tokens. base: rows that the base lacks are left out.
    union: tokens that the base lacks get ids behind its own, and rows there: the base's is then the mean of the rows
    of the experts that have it. A row that an expert lacks is the base's: its task vector is zero. Raises UserError,
    from headers and tokenizers alone, for vocabularies that differ where `choice` is "same", and for folders whose
    tokenizers cannot be read.
    """
    if choice not in CHOICES:
        raise UserError(f"vocabulary={choice} is unknown. Choose one of {', '.join(CHOICES)}.")
    sizes = [_rows(checkpoint) for checkpoint in checkpoints]
    folders = [checkpoint.files[0].parent if checkpoint.files else None for checkpoint in checkpoints]
    ids = [token_ids(folder) if folder is not None else {} for folder in folders]
    alike = len({*sizes}) == 1 and all(not known or not ids[0] or known == ids[0] for known in ids)
    if alike or None in sizes:
        return [*checkpoints]
    if choice == "same":
        _refuse(checkpoints, names, sizes, ids)
        return [*checkpoints]
    if unread := [name for name, known in zip(names, ids, strict=True) if not known]:
        raise UserError(
            f"vocabulary={choice} aligns tables by tokens, and {', '.join(unread)} has no tokenizer.json or vocab.json "
            f"beside its weights. Put its tokenizer there."
        )
    return _aligned(checkpoints, [folder for folder in folders if folder is not None], sizes, ids, choice)


def _rows(checkpoint: Checkpoint) -> int | None:
    """Of its largest table of tokens, None for a model that has none."""
    shapes = (spec.shape for key, spec in checkpoint.specs().items() if is_table(key))
    return max((shape[0] for shape in shapes if shape), default=None)


def _refuse(checkpoints: Sequence[Checkpoint], names: Sequence[str], sizes: Sequence[Any], ids: Sequence[Any]) -> None:
    for checkpoint, name, size, known in zip(checkpoints, names, sizes, ids, strict=True):
        what = f"{name} ({checkpoint.name})"
        if size != sizes[0]:
            raise UserError(
                f"The vocabularies differ: {what} has tables of {size} tokens and the base ({checkpoints[0].name}) of "
                f"{sizes[0]}. {HINT}"
            )
        if differing := [token for token in known if known[token] != ids[0].get(token, known[token])]:
            token = min(differing)
            raise UserError(
                f"The tokenizers differ: {token!r} has the id {known[token]} in {what} and {ids[0][token]} in the base "
                f"({checkpoints[0].name}), so that a row stands for two tokens. {HINT}"
            )
        taken = {index: token for token, index in ids[0].items()}
        if others := [token for token in known if token not in ids[0] and known[token] in taken]:
            raise UserError(
                f"The tokenizers differ: the id {known[others[0]]} is {others[0]!r} in {what} and "
                f"{taken[known[others[0]]]!r} in the base ({checkpoints[0].name}). {HINT}"
            )


def _aligned(
    checkpoints: Sequence[Checkpoint], folders: Sequence[Path], sizes: Sequence[Any], ids: Sequence[Any], choice: str
) -> list[Checkpoint]:
    base = ids[0]
    new = {token: None for known in ids for token in sorted(known, key=known.__getitem__) if token not in base}
    first = max(base.values(), default=-1) + 1
    common = base | {token: first + index for index, token in enumerate(new if choice == "union" else ())}
    rows = max(sizes[0], first + len(new)) if choice == "union" else sizes[0]
    origin = tokenizer_of({"the base": folders[0]})
    known = {content: entry for folder in folders[::-1] for content, entry in added_tokens(folder).items()}
    added = [PLAIN | known.get(token, {}) | {"id": common[token], "content": token} for token in new if token in common]
    words = Tokenizer(origin.folder, origin.template, origin.remarks, tuple(added))
    maps = [_map(known, common, size, rows) for known, size in zip(ids, sizes, strict=True)]
    maps[0][: sizes[0]] = torch.arange(sizes[0]).where(maps[0][: sizes[0]] >= 0, maps[0][: sizes[0]])
    padding = torch.arange(first, max(first, sizes[0]))
    maps[0][padding] = padding.where(padding >= first + len(added), -1)  # of rows without a token the base's stay
    tables = [key for key in checkpoints[0].specs() if is_table(key)]
    pieces = [dict(pieces_of(checkpoint)) for checkpoint in checkpoints]
    whole = {key: _base_table(key, pieces, maps, rows) for key in tables}
    views = [Aligned({**pieces[0], **whole}, checkpoints, words, rows)]
    for stored, index, checkpoint in zip(pieces[1:], maps[1:], checkpoints[1:], strict=True):
        moved = {key: _expert_table(stored[key], whole[key], index) for key in tables if key in stored}
        views.append(Aligned({**stored, **moved}, (checkpoint, *checkpoints), words, rows))
    return [*views]


def _map(known: Mapping[str, int], common: Mapping[str, int], size: int, rows: int) -> Tensor:
    """For every row of the common table the row of a model's own, -1 for none."""
    index = torch.full((rows,), -1)
    pairs = [(common[token], own) for token, own in known.items() if token in common and own < size]
    if pairs:
        to, own = torch.tensor(pairs).T
        index[to] = own
    return index


def _base_table(key: str, pieces: Sequence[Mapping[str, Piece]], maps: Sequence[Tensor], rows: int) -> Piece:
    piece = pieces[0][key]
    spec = Spec(torch.Size((rows, *piece.spec.shape[1:])), piece.spec.dtype)

    def part(first: int, last: int) -> Tensor:
        own = maps[0][first:last]
        table, has, counts = torch.zeros(last - first, *spec.shape[1:]), own >= 0, torch.zeros(last - first)
        table[has] = piece.read("tensor")[own[has]].float()
        for stored, index in zip(pieces[1:], (index[first:last] for index in maps[1:]), strict=True):
            if key in stored and len(where := ((index >= 0) & ~has).nonzero()[:, 0]):
                table[where] += stored[key].read("tensor")[index[where]].float()
                counts[where] += 1
        table[counts > 0] /= counts[counts > 0].view(-1, *[1] * (table.ndim - 1))
        return table.to(spec.dtype)

    return _by_rows(piece, spec, part)


def _expert_table(piece: Piece, base: Piece, index: Tensor) -> Piece:
    spec = Spec(base.spec.shape, torch.promote_types(piece.spec.dtype, base.spec.dtype))
    assert base.flat is not None
    flat, width = base.flat, spec.shape[1:].numel()

    def part(first: int, last: int) -> Tensor:
        table = flat[first * width : last * width].view(last - first, *spec.shape[1:]).to(spec.dtype)
        own = index[first:last]
        table[own >= 0] = piece.read("tensor")[own[own >= 0]].to(spec.dtype)
        return table

    return _by_rows(piece, spec, part)


def _by_rows(piece: Piece, spec: Spec, part: Callable[[int, int], Tensor]) -> Piece:
    """A table in the place of a piece. part: its rows from one on, up to another, as a new tensor."""
    width = spec.shape[1:].numel()

    def entries(first: int, last: int) -> Tensor:
        top = first // width
        return part(top, -(-last // width)).reshape(-1)[first - top * width : last - top * width]

    whole = Flat(spec.shape.numel(), entries)
    return Piece(piece.source, piece.key, spec, lambda _: part(0, spec.shape[0]), flat=whole)
