"""The heat map is a whole PNG of the numbers it was given."""

import pytest
from cells import TASKS, failed_row, make_row
from matplotlib.figure import Figure
from matplotlib.image import imread

from launchers.plots import _panel, heatmap
from launchers.summary import summarise
from merging.errors import UserError

MERGED = [make_row("average", 0.5), make_row("ties", 0.7), failed_row()]
EXPERT = make_row("expert", 0.9)


def drawn(results):
    ax = Figure().subplots()
    _panel(ax, summarise(results)[0])
    return ax, [text.get_text() for text in ax.texts]


def test_cells_are_percent_of_the_expert():
    ax, texts = drawn([*MERGED, EXPERT])

    assert len(texts) == 2 * (len(TASKS) + 1) + 1  # the expert is the unit, a failure one bar
    assert texts[0] == f"{50 / 0.9:.1f}" and texts[-1] == "failed: ValueError: rank 0"
    assert ax.get_xticklabels()[0].get_text() == "scenes\nexpert 90.0"
    assert "expert's" in ax.get_title(loc="left")


def test_without_an_expert_cells_are_plain_accuracy():
    ax, texts = drawn(MERGED)
    assert texts[0] == "50.0" and "expert" not in ax.get_title(loc="left")


def test_the_file_is_a_picture_and_whole(tmp_path):
    path = heatmap([*MERGED, EXPERT, make_row(suite="other", tasks=["cars"])], tmp_path / "new" / "map.png")
    assert imread(path).shape[1] > 1000 and list(path.parent.iterdir()) == [path]
    assert heatmap([failed_row()], path) == path  # nothing but a failure is still a picture

    with pytest.raises(UserError, match="no rows"):
        heatmap([], path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"map\.png"):
        heatmap(MERGED, tmp_path / "file" / "map.png")
