"""The figures in README and docs/speed.md are those of result files and of commands."""

from __future__ import annotations

import json
import re

import pytest

from benchmarks import network_operations
from scripts.comfy_host import REPOSITORY

READMES = {name: (REPOSITORY / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh.md")}
NAMES = {title: architecture for architecture, (title, _) in network_operations.NETWORKS.items()}


def results(path):
    return json.loads((REPOSITORY / path).read_text(encoding="utf-8"))


def rows(text):
    """Cells of a Markdown table, below its head."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_each_row_of_the_demo_is_that_of_one_evaluated_model():
    text = READMES["README.md"].partition("<!-- demo: begin -->")[2].partition("<!-- demo: end -->")[0]
    known = [printed(model) for model in results("demo/logs/evaluation.json")["models"].values()]
    assert rows(text)
    for name, *cells in rows(text):
        figures = set(re.findall(r"\d[\d.,]*", " ".join(cells)))
        assert figures and any(figures <= model for model in known), name


def printed(model):
    """All figures of an evaluated model, as README may print them."""
    values = [model.get("weights"), *model["sizes"]["48"].values()]
    numbers = [value for value in values if isinstance(value, (int, float))]
    return {form.format(value) for value in numbers for form in ("{:.3f}", "{:.2f}", "{:.1f}", "{:,}")}


@pytest.mark.parametrize("readme", READMES)
def test_the_speeds_at_1024_are_those_of_the_timed_networks(readme):
    timed = {
        row["architecture"]: row["variants"]["PyTorch attention"]["seconds"]
        / row["variants"]["lean ΔConv"]["seconds"]
        for row in results("benchmarks/results/network_intel_xeon_float32.json")["rows"]
        if row["size"] == [1024, 1024]
    }
    assert {title: figure(cells[0]) for title, cells in speeds(readme).items()} == {
        title: f"{timed[architecture]:.1f}" for title, architecture in NAMES.items()
    }


@pytest.mark.parametrize("readme", READMES)
def test_the_savings_at_2048_are_those_that_the_counter_gives(readme):
    def fewer(architecture):
        attention, ours = network_operations.operations(architecture, 2048)
        return f"{attention / ours:.1f}"

    assert {title: figure(cells[1]) for title, cells in speeds(readme).items()} == {
        title: fewer(architecture) for title, architecture in NAMES.items()
    }


def speeds(readme):
    """Model -> its cells in the table of what ΔConv gains."""
    return {cells[0]: cells[1:] for cells in rows(READMES[readme]) if cells[0] in NAMES}


def figure(cell):
    (found,) = re.findall(r"\d+\.\d", cell)
    return found


def test_the_page_on_speed_has_the_table_of_operations():
    page = (REPOSITORY / "docs" / "speed.md").read_text(encoding="utf-8")
    assert "\n".join(network_operations.table()) in page
