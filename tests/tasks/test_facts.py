"""What is published about the twenty tasks, against the papers' own counts."""

from dataclasses import replace

import pytest

from merging.errors import UserError
from tasks.vision import dataset_registry as known
from tasks.vision.dataset_registry import check_order, facts

# task: classes, templates, training images, test images (Tang et al. 2024, fusion_bench)
PUBLISHED = {
    "SUN397": (397, 2, 19850, 19850), "Cars": (196, 8, 8144, 8041), "RESISC45": (45, 18, 18900, 6300),
    "EuroSAT": (10, 3, 21600, 2700), "SVHN": (10, 1, 73257, 26032), "GTSRB": (43, 3, 26640, 12630),
    "MNIST": (10, 1, 60000, 10000), "DTD": (47, 8, 3760, 1880), "Flowers102": (102, 1, 1020, 6149),
    "PCAM": (2, 1, 262144, 32768), "FER2013": (7, 6, 28709, 7178), "OxfordIIITPet": (37, 1, 3680, 3669),
    "STL10": (10, 2, 5000, 8000), "CIFAR100": (100, 18, 50000, 10000), "CIFAR10": (10, 18, 50000, 10000),
    "Food101": (101, 1, 75750, 25250), "FashionMNIST": (10, 2, 60000, 10000), "EMNIST": (26, 1, 124800, 20800),
    "KMNIST": (10, 1, 60000, 10000), "RenderedSST2": (2, 1, 6920, 1821),
}  # fmt: skip


def test_there_are_twenty_tasks():
    assert set(known.names()) == set(PUBLISHED)


@pytest.mark.parametrize("task", PUBLISHED)
def test_counts(task):
    found = facts(task)
    classes, templates, train, test = PUBLISHED[task]
    assert (len(found.classes), len(found.templates)) == (classes, templates)
    assert found.sizes == {"train": train, "test": test}
    assert found.hub is not None and {"id", "args", "image", "label", "train", "test"} == set(found.hub)


@pytest.mark.parametrize("task", PUBLISHED)
@pytest.mark.parametrize("variant", known.VARIANTS)
def test_class_names_and_templates_are_usable(task, variant):
    found = facts(task, variant)
    assert len(set(found.classes)) == len(found.classes) and all(isinstance(name, str) for name in found.classes)
    assert all(template.count("{}") == 1 for template in found.templates)
    assert len(found.labels) in (0, len(found.classes))


@pytest.mark.parametrize(
    ("task", "alphabetical"),
    [("SUN397", True), ("RESISC45", True), ("DTD", True), ("FER2013", True), ("Food101", True), ("CIFAR10", True),
     ("OxfordIIITPet", True), ("STL10", True), ("Cars", False), ("Flowers102", False)],
)  # fmt: skip
def test_order_is_that_of_the_labels(task, alphabetical):
    names = list(facts(task).classes)
    assert (names == sorted(names)) == alphabetical


def test_known_landmarks_of_unsorted_lists():
    cars, flowers = facts("Cars").classes, facts("Flowers102").classes
    assert cars[0] == "AM General Hummer SUV 2000" and cars[-1] == "smart fortwo Convertible 2012"
    assert cars[173] == "Ram C/V Cargo Van Minivan 2012"
    assert (flowers[0], flowers[15], flowers[92]) == ("pink primrose", "globe-flower", "ball moss")


def test_eurosat_is_mapped_by_name():
    """Folder names in alphabetical order, and the wording of the prompt that belongs to each."""
    found = facts("EuroSAT")
    pairs = dict(zip(found.labels, found.classes, strict=True))
    assert list(found.labels) == sorted(found.labels)
    assert pairs["HerbaceousVegetation"] == "brushland or shrubland" and pairs["SeaLake"] == "lake or sea"


def test_variants_say_what_differs():
    assert facts("Flowers102", "tall_masks").classes[92] == "air plant"
    assert facts("OxfordIIITPet").classes[1] == "american_bulldog"
    assert facts("OxfordIIITPet", "task_vectors").classes[1] == "American Bulldog"
    digits = facts("EMNIST", "tall_masks")
    assert (len(digits.classes), digits.hub, digits.sizes["test"]) == (10, None, 40000)
    assert facts("EuroSAT", "task_vectors").sizes["val"] == 2700
    assert "19,887" in facts("SUN397", "task_vectors").note
    faces = facts("FER2013", "tall_masks").classes
    assert faces[3] == "['happy', 'smiling']" and faces[-1] == "['neutral', 'bored']"
    assert len(facts("STL10", "task_singular_vectors").templates) == 18
    assert facts("EMNIST", "task_singular_vectors").classes == digits.classes
    assert facts("EMNIST", "task_singular_vectors").templates != digits.templates


def test_what_is_unknown_is_refused():
    with pytest.raises(UserError, match="no task 'Birds'"):
        facts("Birds")
    with pytest.raises(UserError, match="fusion_bench, task_vectors"):
        facts("DTD", "mine")


def test_label_names_in_another_order_are_refused():
    found = facts("FER2013")
    csv = ["angry", "disgust", "fear", "happy", "sad", "surprise", "neutral"]
    for good in (found.labels, found.classes, [name.title() for name in found.labels], ["1", "2"], None):
        check_order(found, good)
    with pytest.raises(UserError, match="label 4 is 'sad', the zero-shot head has 'neutral'"):
        check_order(found, csv)
    check_order(replace(found, order="free"), csv)
