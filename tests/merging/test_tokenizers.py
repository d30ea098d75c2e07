"""The tokenizer of a merged folder: the one that has all tokens; where two contradict each other it is refused."""

import json

import pytest
from hf_folders import WORDS, tokenizer

from merging import UserError
from merging.tokenizers import tokenizer_of, vocabulary

transformers = pytest.importorskip("transformers")
BASE = "the base"


def folders(tmp_path, **made):
    for name, whole in made.items():
        (tmp_path / name).mkdir()
        if whole is not None:
            whole.save_pretrained(tmp_path / name)
    return {BASE if name == "base" else name: tmp_path / name for name in made}


def out(chosen, tmp_path):
    (tmp_path / "out").mkdir()
    chosen.write(tmp_path / "out")
    return transformers.AutoTokenizer.from_pretrained(tmp_path / "out")


def test_alike(tmp_path):
    chosen = tokenizer_of(folders(tmp_path, base=tokenizer(), a=tokenizer(), adapter=None))
    assert chosen.folder == tmp_path / "base" and not chosen.remarks
    assert out(chosen, tmp_path).get_vocab() == tokenizer().get_vocab()


@pytest.mark.parametrize("other", [["<pad>", "<s>", "</s>", *"abcdegf"], [*WORDS[:-1], "h"]])
def test_one_id_for_two_tokens(tmp_path, other):
    with pytest.raises(
        UserError, match=r"The tokenizers of .* and of .* differ: '[fgh]' has the id .*share their token"
    ):
        tokenizer_of(folders(tmp_path, base=tokenizer(), a=tokenizer(), b=tokenizer(other)))


def test_more_tokens_at_the_end(tmp_path):
    chosen = tokenizer_of(folders(tmp_path, base=tokenizer(), a=tokenizer([*WORDS, "<chat>"])))
    assert chosen.remarks == ("the tokenizer is that of a, which has tokens beside the base's",)
    assert out(chosen, tmp_path).get_vocab()["<chat>"] == len(WORDS)


def test_forms_of_files_say_the_same(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "tokenizer.json").write_text(json.dumps({"model": {"vocab": [[word, -1.0] for word in WORDS]}}))
    assert vocabulary(tmp_path) == vocabulary(tmp_path / "new")
    (tmp_path / "new" / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer\.json cannot be read as JSON"):
        vocabulary(tmp_path / "new")


class TestChatTemplates:
    @pytest.mark.parametrize(
        ("base", "first", "second", "kept", "said"),
        [
            (None, None, None, None, ""),
            ("B", None, None, "B", ""),
            ("B", "B", "C", "B", "the chat template is the base's; b has another"),
            (None, "C", "C", "C", "that of the experts; the base has none"),
            (None, "C", None, None, "of the experts a has one. To prompt the merged model by one, copy it from "),
            (None, "C", "D", None, "of the experts a, b have different ones"),
        ],
    )
    def test_which_is_kept(self, tmp_path, base, first, second, kept, said):
        templates = {"base": base, "a": first, "b": second}
        made = {name: tokenizer(template=template) for name, template in templates.items()}
        chosen = tokenizer_of(folders(tmp_path, **made))
        assert said in " ".join(chosen.remarks) and bool(said) == bool(chosen.remarks)
        assert out(chosen, tmp_path).chat_template == kept


def test_a_version_line_is_no_rule_and_a_token_may_end_a_line(tmp_path):
    """What older files of BPE begin with, and a token that str.splitlines would break."""
    rules, words = ["a b", "ab c"], {"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4, "\u2028": 5}
    (tmp_path / "vocab.json").write_text(json.dumps(words))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *rules]) + "\n")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "tokenizer.json").write_text(json.dumps({"model": {"vocab": words, "merges": rules}}))
    assert vocabulary(tmp_path) == vocabulary(tmp_path / "new")
    (tmp_path / "wordpiece").mkdir()
    (tmp_path / "wordpiece" / "vocab.txt").write_text("\n".join(words) + "\n", "utf-8")
    assert vocabulary(tmp_path / "wordpiece") == words
