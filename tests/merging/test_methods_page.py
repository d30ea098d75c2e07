"""docs/methods.md is what its program makes now, and the fields leave no method out without a reason."""

import re

import methods_page
import pytest
import yaml

from merging import methods
from merging.options import snake_case

FIELDS = {path.stem: path.read_text("utf-8") for path in (methods_page.CONF / "experiment").glob("field_*.yaml")}
OWN = sorted(name for name, text in FIELDS.items() if "# Left out:" in text)  # the others have a list of these
COMMAND = "python tests/merging/methods_page.py > docs/methods.md"


def test_the_page_is_up_to_date():
    assert methods_page.PAGE.read_text("utf-8") == methods_page.page(), f"Make it again: {COMMAND}"


@pytest.mark.parametrize("name", sorted({*OWN} - {"field_lora"}))
def test_a_field_has_every_method_or_says_why_not(name):
    values = yaml.safe_load(FIELDS[name])["hydra"]["sweeper"]["params"]["method"].split(",")
    swept = {snake_case(methods_page.target(method).rpartition(".")[2]) for method in values}
    lines = re.findall(r"^#   ([a-z_, ]+): ", FIELDS[name], re.M)
    excused = {method for line in lines for method in line.split(", ")}
    every = {snake_case(method) for method in methods.discovered()}
    assert len({*values}) == len(values) and not swept & excused
    assert swept | excused == every


def test_facts_are_read_where_they_stand():
    lines = {name: methods_page.sentences(method) for name, method in methods.discovered().items()}
    assert lines["Ties"][:2] == [
        "TIES-Merging: trim, elect a sign per entry, merge those that agree.",
        "Yadav et al., 2023, arXiv 2306.01708.",
    ]
    assert methods_page.checked(methods.Dare, True) == "`test_methods::test_dare_equals_the_published_steps`"
    assert methods_page.checked(methods.Cat, True).endswith("(algebra)")
    passes = {name: methods_page.measured(name, getattr(methods, name)).passes for name in ("Average", "Pcb", "Base")}
    assert passes == {"Average": "1", "Pcb": "5", "Base": "0"}
