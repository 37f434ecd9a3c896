"""Every figure of README and docs/performance is one of a result file, and all of them have one age."""

import re
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from benchmarks import plots, render, results
from benchmarks.stored import RESULTS, ROOT, load

each_page = pytest.mark.parametrize("page", render.PAGES)


@pytest.fixture(scope="module")
def stored() -> dict[str, dict[str, Any]]:
    return load(RESULTS)


def test_every_file_says_what_its_figures_depend_on_and_all_have_one_age(stored: dict[str, dict[str, Any]]) -> None:
    assert {part.name for part in results.PARTS} == stored.keys()
    infos = [content["environment"] for content in stored.values()]
    wanted = {"processor", "instruction_set", "fastnn", "torch", "python", "commit", "date", "threads", "seconds_a_row"}
    assert all(info.keys() == wanted for info in infos)
    assert len({(info["processor"], info["fastnn"], info["torch"], info["commit"]) for info in infos}) == 1
    dates = [datetime.strptime(info["date"], "%Y-%m-%d %H:%M UTC") for info in infos]
    assert max(dates) - min(dates) < timedelta(hours=3)
    assert {part.command(True, Path("x"))[2] for part in results.PARTS} <= {
        f"benchmarks.{file.stem}" for file in (ROOT / "benchmarks").glob("*.py")
    }


@each_page
def test_pages_have_the_stored_figures(page: str, stored: dict[str, dict[str, Any]]) -> None:
    text = (ROOT / page).read_text()
    assert render.rendered(text, stored) == text, "make results ARGS=--only writes the pages anew"


def test_a_figure_that_no_file_has_is_refused(stored: dict[str, dict[str, Any]]) -> None:
    text = (ROOT / "README.md").read_text()
    begin, end = re.search(r"\*\*\d+\.\d times", text).span()
    changed = text[:begin] + "**99.9 times" + text[end:]
    assert render.rendered(changed, stored) == text


def test_every_block_and_every_plot_is_on_a_page() -> None:
    text = "".join((ROOT / page).read_text() for page in render.PAGES)
    assert set(re.findall(r"<!-- results: ([\w ]+) -->", text)) == render.BLOCKS.keys()
    assert len(re.findall("<!-- results", text)) == len(re.findall("<!-- end -->", text))
    assert set(re.findall(r"plots/(\w+)-light\.svg", text)) == plots.PLOTS.keys()
    assert set(re.findall(r"plots/(\w+)-dark\.svg", text)) == plots.PLOTS.keys()


@pytest.mark.parametrize("theme", plots.THEMES)
@pytest.mark.parametrize("name", plots.PLOTS)
def test_plots_show_the_stored_figures(name: str, theme: str, stored: dict[str, dict[str, Any]]) -> None:
    drawn = (ROOT / render.PLOTS / f"{name}-{theme}.svg").read_text()
    assert f"results {plots.digest(name, stored)}" in drawn


def test_readme_is_short_and_has_no_figure_of_its_own() -> None:
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 150
    outside = re.sub(r"<!-- results.*?<!-- end -->", "", text, flags=re.DOTALL)
    assert not re.findall(r"\d+\.\d+ times|\d\.\d+x|\d+ MB", outside)
