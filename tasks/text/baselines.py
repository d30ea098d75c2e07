"""What words alone say about the tasks of gloss8, without any model: `python -m tasks.text.baselines --split val`."""

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from merging.backbones.hugging_face import columns
from tasks.score import Score
from tasks.split import Split
from tasks.task import Task
from tasks.text.drawing import SIZES
from tasks.text.suite import CLASSES, build

STRENGTHS = (1.0, 10.0, 100.0)  # of which validation chooses: the inverse of the L2 penalty


class BagOfWords:
    """TF-IDF of words and pairs of words; of two texts that of each, their product and their cosine."""

    def __init__(self, train: Split):
        from sklearn.feature_extraction.text import TfidfVectorizer

        self.vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
        self.vectorizer.fit([text for texts in columns(list(train.inputs)) for text in texts])

    def features(self, split: Split) -> Any:
        """Sparse [N, words], or [N, 3 words + 1] of pairs."""
        from scipy.sparse import csr_matrix, hstack

        first, *others = (self.vectorizer.transform(texts) for texts in columns(list(split.inputs)))
        if not others:
            return first
        both = first.multiply(others[0])
        return hstack([first, others[0], both, csr_matrix(both.sum(1))]).tocsr()


def fitted(features: Any, labels: Tensor, strength: float) -> Any:
    """Logistic regression of classes, ridge regression of numbers."""
    from sklearn.linear_model import LogisticRegression, Ridge

    if labels.is_floating_point():
        return Ridge(alpha=1 / strength).fit(features, labels.numpy())
    return LogisticRegression(C=strength, max_iter=200).fit(features, labels.numpy())


def score(task: Task, split: str, strengths: Sequence[float] = STRENGTHS) -> Score:
    """Of a model of words that is fitted on train, at the strength that is best on validation."""
    train = task.split("train")
    words = BagOfWords(train)
    x = words.features(train)
    models = [fitted(x, train.labels, strength) for strength in strengths]

    def scored(model: Any, name: str) -> Score:
        kind = train.labels.dtype
        return task.evaluate(
            lambda samples: {"predicted": torch.from_numpy(model.predict(words.features(samples))).to(kind)}, name
        )

    best = max(models, key=lambda model: scored(model, "val").value)
    return scored(best, split)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tasks.text.baselines", description=__doc__)
    parser.add_argument("--split", choices=("val", "test"), default="test")
    split = parser.parse_args().split
    for task in build("gloss8", list(CLASSES), SIZES).tasks:
        result = score(task, split)
        print(f"{task.name:8} {result.metric:17} {100 * result.value:5.1f} +- {100 * result.standard_error:.1f}")


if __name__ == "__main__":
    main()
