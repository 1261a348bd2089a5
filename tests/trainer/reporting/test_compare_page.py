"""The page of a comparison in a browser: by clicks and keys, at each size and color."""

from __future__ import annotations

from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page

from tests.trainer.comparison.outputs import comparison
from tests.trainer.reporting.conftest import DESKTOP, PHONE, Open
from tuneyard_trainer.comparison.page import write


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of two jobs."""
    root = tmp_path_factory.mktemp("jobs")
    write(comparison(root), root / "comparison.html")
    return root / "comparison.html"


def visible(page: Page) -> list[str]:
    """Return the questions that are visible, in their order."""
    return [text[:9] for text in page.locator(".answer:visible .question").all_inner_texts()]


def test_filters_and_search_find_the_answers_that_differ(opened: Open) -> None:
    page = opened()
    assert visible(page) == ["How long?", "Same?", "</script>"]
    for name, shown in (
        ("Differ (2)", ["How long?", "</script>"]),
        ("Worse than low (1)", ["How long?"]),
        ("Longest first", ["</script>", "How long?", "Same?"]),
        ("All", ["How long?", "Same?", "</script>"]),
    ):
        button = page.get_by_role("button", name=name, exact=True)
        button.click()
        assert visible(page) == shown, name
        assert button.get_attribute("aria-pressed") == "true"
        assert page.get_by_role("status").inner_text() == f"Showing {len(shown)} of 3 answers"
    page.get_by_label("Search in questions and answers").fill("24 MONTHS")
    assert visible(page) == ["How long?"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_axe_finds_nothing_and_the_page_does_not_scroll_sideways(
    opened: Open, scheme: str, size: dict[str, int]
) -> None:
    page = opened(viewport=size, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    found = Axe().run(page).response["violations"]
    assert [(each["id"], each["nodes"][0]["target"]) for each in found] == []


def test_in_print_a_number_is_on_one_line_and_no_table_leaves_the_paper(
    opened: Open, tmp_path: Path
) -> None:
    found = comparison(tmp_path)
    long = found.metrics[0].model_copy(
        update={"metric": "manners/accuracyPerCharacter", "intervals": [(-1.486, 1.475)] * 2}
    )
    path = tmp_path / "long.html"
    write(found.model_copy(update={"metrics": [long, *found.metrics]}), path)
    page = opened(path, viewport={"width": 680, "height": 960})  # A4 without its margins
    page.emulate_media(media="print")
    assert page.evaluate("document.documentElement.scrollWidth") <= 680
    row = page.get_by_role("row").filter(has_text="manners/accuracyPerCharacter")
    cell = row.get_by_role("cell").first
    count = """each => {
      const range = new Range();
      range.selectNodeContents(each);
      return range.getClientRects().length;
    }"""
    assert (cell.inner_text(), cell.evaluate(count)) == ("2.000", 1)
    bars, card = row.locator("svg").bounding_box(), page.locator(".card", has=row).bounding_box()
    assert bars is not None
    assert card is not None
    assert bars["x"] + bars["width"] < card["x"] + card["width"] - 8


def test_the_jobs_are_side_by_side_in_the_table_and_the_answers(opened: Open) -> None:
    page = opened()
    row = page.get_by_role("row").filter(has_text="validationLoss, lower is better")
    base, low, high = row.get_by_role("cell").all_inner_texts()[:3]
    assert base == "2.000"
    assert low.startswith("1.8")
    assert high.startswith("best")
    assert row.locator("svg circle").count() == 2
    columns = page.locator(".answer").first.locator("h4")
    assert columns.all_inner_texts() == ["Basewrong", "lowright", "highwrong", "Reference"]
    boxes = [column.bounding_box() for column in columns.all()[:3]]
    assert len({box["y"] for box in boxes if box}) == 1
    assert page.locator(".answer").first.locator("mark").all_inner_texts() == ["24"]


def test_each_job_has_the_color_of_the_plot_in_the_key_and_the_intervals(opened: Open) -> None:
    for scheme, colors in (
        ("light", ["rgb(0, 114, 178)", "rgb(213, 94, 0)"]),
        ("dark", ["rgb(86, 180, 233)", "rgb(230, 159, 0)"]),
    ):
        page = opened(color_scheme=scheme)
        drawn = "elements => elements.map(each => getComputedStyle(each).fill)"
        assert page.locator(".bars g").evaluate_all(drawn)[:2] == colors


def test_hostile_texts_are_texts_and_without_a_script_all_answers_are_visible(
    opened: Open,
) -> None:
    page = opened()
    assert page.title() == "Comparison of low, high · Tuneyard"
    assert page.locator("script").count() == 1
    bare = opened(java_script_enabled=False)
    assert bare.locator(".answer").count() == 3
    assert not bare.get_by_role("button").first.is_visible()
