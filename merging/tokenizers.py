"""Tokenizers in the folders of base and experts: which one a merged model has, and where they contradict each other."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merging.errors import UserError
from merging.files import sha256

CONFIG = "tokenizer_config.json"
FILES = (
    "tokenizer.json", CONFIG, "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "spm.model",
)  # fmt: skip
OPAQUE = FILES[-4:]  # told from others as a whole
Vocabulary = Mapping[str, object]  # token -> id; of BPE also each of its merges -> their rank


@dataclass(frozen=True)
class Tokenizer:
    """The tokenizer of a merged model: the folder that it is copied from, its chat template, what is to be said."""

    folder: Path | None
    template: Any = None
    remarks: tuple[str, ...] = ()
    added: tuple[Mapping[str, Any], ...] = ()  # tokens beside those of the folder, as in tokenizer.json's added_tokens

    def write(self, folder: Path) -> None:
        """Copy its files, with this chat template and no other, and with the tokens that are added."""
        for name in FILES:
            if self.folder is None or not (source := self.folder / name).is_file():
                continue
            if name == CONFIG:
                config = _json(source)
                config.pop("chat_template", None)
                config |= {} if self.template is None else {"chat_template": self.template}
                if self.added:
                    known = {
                        str(token["id"]): {key: token[key] for key in token if key != "id"} for token in self.added
                    }
                    config["added_tokens_decoder"] = {**config.get("added_tokens_decoder", {}), **known}
                (folder / name).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
            elif self.added and name == "tokenizer.json":
                words = _json(source)
                words["added_tokens"] = [*(words.get("added_tokens") or ()), *self.added]
                (folder / name).write_text(json.dumps(words, ensure_ascii=False) + "\n", "utf-8")
            else:
                (folder / name).write_bytes(source.read_bytes())


def tokenizer_of(folders: Mapping[str, Path]) -> Tokenizer:
    """That of a merge of models in folders, named by who they are, the base first.

    It is the one that has all tokens of the others: the base's where they are alike. Raises UserError where two give
    one id to different tokens, or one token two ids: a row of the merged table would stand for both.
    """
    vocabularies, known = {}, dict[str, Vocabulary]()
    for who, folder in folders.items():
        if (content := _content(folder)) is not None:
            known[content] = known.get(content) or vocabulary(folder)
            vocabularies[who] = known[content]
    if not vocabularies:
        return Tokenizer(None)
    chosen = max(vocabularies, key=lambda who: len(vocabularies[who]))  # the first of equals
    for who, tokens in vocabularies.items():
        if tokens is not vocabularies[chosen]:
            _check_within(tokens, vocabularies[chosen], f"{who} ({folders[who]})", f"{chosen} ({folders[chosen]})")
    base = next(iter(folders))
    template, remarks = chat_template({who: folders[who] for who in dict.fromkeys((base, *vocabularies))})
    if chosen != base:
        remarks = (f"the tokenizer is that of {chosen}, which has tokens beside the base's", *remarks)
    return Tokenizer(folders[chosen], template, remarks)


def _check_within(tokens: Vocabulary, all_tokens: Vocabulary, one: str, other: str) -> None:
    if tokens.items() <= all_tokens.items():
        return
    token = min(token for token, index in tokens.items() if all_tokens.get(token) != index)
    raise UserError(
        f"The tokenizers of {one} and of {other} differ: {token!r} has the id {tokens[token]} in the first and "
        f"{all_tokens.get(token, 'none')} in the second. A row of the merged embedding would stand for two tokens: "
        f"merge models that share their tokenizer."
    )


def vocabulary(folder: Path) -> Vocabulary:
    """What the tokenizer files of a folder say, in one form."""
    if (file := folder / "tokenizer.json").is_file():
        stored = _json(file)
        merges = (stored.get("model") or {}).get("merges") or ()
        return _stored_ids(stored) | _ranked([rule if isinstance(rule, str) else " ".join(rule) for rule in merges])
    whole = {f"({name})": sha256(folder / name) for name in OPAQUE if (folder / name).is_file()}
    lines = _lines(file) if (file := folder / "merges.txt").is_file() else []
    return whole | token_ids(folder) | _ranked([line for line in lines if not line.startswith("#version")])


def added_tokens(folder: Path) -> dict[str, Any]:
    """What tokenizer.json says of the tokens that were added to its vocabulary."""
    file = folder / "tokenizer.json"
    return {token["content"]: token for token in _json(file).get("added_tokens") or ()} if file.is_file() else {}


def token_ids(folder: Path) -> dict[str, int]:
    """Token -> id, without the rules that join tokens; empty where no readable file says it."""
    if (file := folder / "tokenizer.json").is_file():
        return _stored_ids(_json(file))
    ids = {}
    if (file := folder / "vocab.txt").is_file():
        ids |= {token: index for index, token in enumerate(_lines(file))}
    for name in ("vocab.json", "added_tokens.json"):
        ids |= _json(folder / name) if (folder / name).is_file() else {}
    return ids


def _stored_ids(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Of tokenizer.json's content."""
    words = (stored.get("model") or {}).get("vocab") or {}
    ids = dict(words) if isinstance(words, Mapping) else {word: index for index, (word, _) in enumerate(words)}
    return ids | {token["content"]: token["id"] for token in stored.get("added_tokens") or ()}


def _ranked(rules: Sequence[str]) -> dict[str, Any]:
    return {f"(merge {rule})": rank for rank, rule in enumerate(rules)}


def _lines(file: Path) -> list[str]:
    """The lines of a file; a token may be another character that ends a line, such as U+2028."""
    return file.read_text("utf-8").removesuffix("\n").split("\n")


def _content(folder: Path) -> str | None:
    """What tells a folder's tokenizer from others without reading it, None where it has none."""
    decisive = [name for name in FILES if name not in (CONFIG, "special_tokens_map.json")]
    present = [name for name in decisive if (folder / name).is_file()]
    return " ".join(f"{name} {sha256(folder / name)}" for name in present) or None


def chat_template(folders: Mapping[str, Path]) -> tuple[Any, tuple[str, ...]]:
    """The base's, or where it has none the one that all experts have, and what is to be said of it."""
    templates = {who: _template(folder) for who, folder in folders.items()}
    own, *others = templates.values()
    names = [who for who, template in templates.items() if template is not None]
    if own is not None:
        other = [who for who in names if templates[who] != own]
        return own, (f"the chat template is the base's; {', '.join(other)} has another",) if other else ()
    if not names:
        return None, ()
    if all(template == others[0] for template in others):
        return others[0], ("the chat template is that of the experts; the base has none",)
    said = "have different ones" if len(names) > 1 else "has one"
    return None, (
        f"there is no chat template: the base has none, of the experts {', '.join(names)} {said}. To prompt the merged "
        f"model by one, copy it from {folders[names[0]]}",
    )


def _template(folder: Path) -> Any:
    if (file := folder / "chat_template.jinja").is_file():
        return file.read_text("utf-8")
    if (file := folder / "chat_template.json").is_file():
        return _json(file).get("chat_template")
    return _json(folder / CONFIG).get("chat_template") if (folder / CONFIG).is_file() else None


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}). Copy or download it again.") from error
