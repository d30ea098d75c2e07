"""Builds smol4 from WordNet 3.0 and speeches: `python -m tasks.generation.smol_build --help`."""

from collections.abc import Sequence
from pathlib import Path

from tasks.generation.smol4 import DATA
from tasks.generation.smol_questions import SIZES, decade, order, topic, word
from tasks.text.build import sources, summary
from tasks.text.drawing import Example, draw
from tasks.text.questions import Glosses
from tasks.text.speeches import Speech


def build(glosses: Glosses, speeches: Sequence[Speech]) -> dict[str, dict[str, list[Example]]]:
    """Task -> split -> examples."""
    placed = {"word": word(glosses), "order": order(speeches), "topic": topic(glosses), "decade": decade(speeches)}
    return {name: draw(f"smol4/{name}", examples, sizes=SIZES) for name, examples in placed.items()}


def write(splits: dict[str, list[Example]], path: Path) -> Path:
    """One small Parquet file: columns split, text, pair, label."""
    import pyarrow as pa
    from pyarrow import parquet

    rows = [(split, *example) for split, examples in splits.items() for example in examples]
    split, text, pair, label = (list(column) for column in zip(*rows, strict=True))
    columns = {"split": pa.array(split), "text": pa.array(text), "pair": pa.array(pair, pa.string()),
               "label": pa.array(label, pa.int8())}  # fmt: skip
    tight = {"text": "DELTA_BYTE_ARRAY", "pair": "DELTA_LENGTH_BYTE_ARRAY"}
    parquet.write_table(
        pa.table(columns), path, compression="brotli", compression_level=11, use_dictionary=["split"],  # type: ignore[arg-type]
        column_encoding=tight, data_page_size=1 << 24, write_statistics=False, store_schema=False,
    )  # fmt: skip
    return path


def main() -> None:
    glosses, speeches, folder = sources("tasks.generation.smol_build", __doc__, DATA)
    for task, splits in build(glosses, speeches).items():
        print(summary(write(splits, folder / f"{task}.parquet"), splits))


if __name__ == "__main__":
    main()
