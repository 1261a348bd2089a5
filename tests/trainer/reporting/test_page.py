"""The page of a report in a browser: by clicks and keys, at each size and color, and in print."""

from __future__ import annotations

from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page

from tests.trainer.reporting.conftest import DESKTOP, PHONE, Open
from tests.trainer.reporting.pages import ANSWERS, CAPITALS, HOSTILE, written
from tuneyard.api.report import Answer, JobReport, ReportedJob
from tuneyard_trainer.reporting.page import MOST_SHOWN, shown_answers


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a job."""
    return written(tmp_path_factory.mktemp("job"))


def visible(page: Page) -> list[str]:
    """Return the names of the answers that are visible, in their order."""
    names = page.locator(".answer:visible h3")
    return [name.partition("row ")[2][:1] for name in names.all_inner_texts()]


def status(page: Page) -> str:
    return page.get_by_role("status").inner_text()


# ---- search and filters -------------------------------------------------------------------------


def test_each_filter_shows_its_answers_and_is_the_one_that_is_pressed(opened: Open) -> None:
    page = opened()
    assert visible(page) == ["1", "2", "3", "4", "5"]
    for name, shown in (
        ("Flipped (2)", ["1", "2"]),
        ("Worse (2)", ["2", "3"]),
        ("Longest first", ["5", "4", "1", "3", "2"]),
        ("All", ["1", "2", "3", "4", "5"]),
    ):
        button = page.get_by_role("button", name=name, exact=True)
        button.click()
        assert visible(page) == shown, name
        assert button.get_attribute("aria-pressed") == "true"
        assert page.locator("button[aria-pressed=true]").count() == 1
        assert status(page) == f"Showing {len(shown)} of 5 answers"


def test_a_search_narrows_the_answers_of_the_chosen_filter(opened: Open) -> None:
    page = opened()
    search = page.get_by_label("Search in questions and answers")
    search.fill("IS   green")
    assert visible(page) == ["3"]
    assert status(page) == "Showing 1 of 5 answers"
    page.get_by_role("button", name="Flipped (2)").click()
    assert visible(page) == []
    assert status(page) == "No answer matches, of 5 answers"
    search.fill("port")
    assert visible(page) == ["2"]
    search.press("Escape")
    assert search.input_value() == ""
    assert visible(page) == ["1", "2"]


def test_answers_to_suites_are_searched_and_filtered_as_others_and_by_their_suite(
    opened: Open, tmp_path: Path
) -> None:
    page = opened(written(tmp_path, suites={"capitals": CAPITALS, "empty": CAPITALS}))
    assert page.get_by_role("heading", name="Completions of held-out prompts and of").count() == 1
    assert visible(page) == [*"12345", *"678", *"678"]
    source = page.get_by_label("Prompts", exact=True)
    assert source.locator("option").all_inner_texts() == [
        "All",
        "The job's own",
        "capitals",
        "empty",
    ]
    source.select_option("capitals")
    assert visible(page) == ["6", "7", "8"]
    assert status(page) == "Showing 3 of 11 answers"
    for name, shown in (("Flipped (4)", ["6", "7"]), ("Worse (3)", ["6"]), ("All", [*"678"])):
        page.get_by_role("button", name=name, exact=True).click()
        assert visible(page) == shown, name
    page.get_by_label("Search in questions and answers").fill("lima")
    assert visible(page) == ["7"]
    found = page.locator(".answer:visible")
    assert "capitals, capitals.jsonl row 7" in found.locator("h3").inner_text()
    assert "now right" in found.locator("h3").inner_text()
    assert found.get_by_text("Ciudad de los Reyes").count() == 1
    source.select_option("The job's own")
    assert visible(page) == []
    page.get_by_label("Search in questions and answers").fill("")
    assert visible(page) == [*"12345"]
    assert page.title() != "broken"


def test_a_page_without_answers_to_suites_has_no_choice_of_them(opened: Open) -> None:
    page = opened()
    assert page.get_by_label("Prompts", exact=True).count() == 0
    assert page.get_by_role("heading", name="Completions of held-out prompts").inner_text() == (
        "Completions of held-out prompts"
    )


def test_search_and_filters_need_no_mouse(opened: Open) -> None:
    page = opened()
    page.get_by_label("Search in questions and answers").focus()
    page.keyboard.type("warranty")
    assert visible(page) == ["1"]
    for _ in range(3):
        page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.dataset.filter") == "worse"
    page.keyboard.press("Enter")
    assert visible(page) == []
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Space")
    assert visible(page) == ["1"]
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"  # the focus is visible


# ---- sizes, colors, print, no script -------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_axe_finds_nothing_and_the_page_does_not_scroll_sideways(
    opened: Open, scheme: str, size: dict[str, int]
) -> None:
    page = opened(viewport=size, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(13, 17, 23)") == (scheme == "dark")
    for details in page.locator("details").all():
        details.locator("summary").click()
    found = Axe().run(page).response["violations"]
    assert [(each["id"], each["nodes"][0]["target"]) for each in found] == []


def test_print_shows_all_answers_and_sections_and_no_controls(opened: Open) -> None:
    page = opened(color_scheme="dark")
    page.get_by_role("button", name="Worse (2)").click()
    page.emulate_media(media="print")
    assert len(visible(page)) == 5
    assert not page.locator(".controls").is_visible()
    assert page.get_by_text("kind: FineTuneJob").is_visible()  # in closed details
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == "rgb(255, 255, 255)"
    assert page.evaluate("getComputedStyle(document.querySelector('.wide')).overflowX") == "visible"


def test_without_a_script_all_answers_are_visible_and_no_control_is(opened: Open) -> None:
    page = opened(java_script_enabled=False)
    assert page.locator(".answer").count() == len(ANSWERS)
    assert all(answer.is_visible() for answer in page.locator(".answer").all())
    assert not page.get_by_role("button").first.is_visible()


# ---- content -------------------------------------------------------------------------------------


def test_the_summary_says_first_what_changed_and_whether_it_was_worth_it(opened: Open) -> None:
    page = opened()
    assert page.locator("main li").all_inner_texts()[:7] == [
        "Better: held-out loss fell from 2.000 to 1.000; answers right rose from 25 % to 75 %.",
        "Worse: manners: overRefusal rose from 5 % to 20 %.",
        "No clear difference: F1 of words rose from 31 % to 62 %; grammar: accuracy fell from 75 % "
        "to 71 %.",
        "Answers that became right: 9; that became wrong: 1.",
        "Tuning was worth it. Answers right: 75 % after tuning, and 50 % of the base model with 4 "
        "examples in the prompt, which cost 210 tokens in each request.",
        "The loss on general data rose by 0.100 nats per token; the guard allows an increase of "
        "0.100.",
        "1 of 2 gates is not met: grammar/accuracy (advisory, insufficient evidence).",
    ]


def test_the_models_are_compared_with_their_intervals(opened: Open) -> None:
    page = opened()
    rows = page.get_by_role("row").filter(has_text="Answers right")
    assert rows.first.get_by_role("cell").all_inner_texts()[:4] == [
        "25 %\n10 to 50 %",
        "50 %\n28 to 72 %",
        "75 %\n50 to 90 %",
        "+50 points, better\n+20 to +70 points",
    ]
    assert rows.first.locator("svg circle").count() == 3
    for text in ("Loss on general data", "Safety", "Memory of a worker"):
        assert page.get_by_role("heading", name=text, exact=True).is_visible()
    assert page.get_by_text("2.0 GiB").is_visible()


def test_hostile_texts_are_texts_and_control_characters_are_replaced(opened: Open) -> None:
    page = opened()
    assert page.title() == "support-bot · Tuneyard"
    assert page.locator("script").count() == 1
    shown = page.locator(".answer").nth(3).locator(".question").inner_text()
    assert shown == HOSTILE.replace("\x1b", "\ufffd").replace("\u202e", "\ufffd")


def test_on_a_phone_no_number_of_a_table_of_numbers_is_cut(opened: Open) -> None:
    cells = "<td>Dropped as too long</td><td class=number>12</td><td class=number>7,984</td>"
    table = opened(viewport=PHONE).locator(".wide").first
    table.evaluate("(each, cells) => each.innerHTML = `<table><tr>${cells}</tr></table>`", cells)
    assert table.evaluate("each => each.scrollWidth <= each.clientWidth")


def test_the_policy_of_the_page_lets_no_other_script_run(opened: Open, file: Path) -> None:
    changed = file.with_name("changed.html")
    changed.write_text(file.read_text().replace('"use strict";', '"use strict"; document.title=1;'))
    page = opened()
    assert page.locator("meta[http-equiv]").get_attribute("content") is not None
    context = page.context.browser.new_context()  # type: ignore[union-attr]
    other = context.new_page()
    other.goto(changed.as_uri())
    assert other.title() == "support-bot · Tuneyard"
    assert not other.get_by_role("button").first.is_visible()
    context.close()


def test_words_that_differ_from_the_base_models_are_marked(opened: Open) -> None:
    marks = opened().locator(".answer").nth(1).locator("mark")
    assert marks.all_inner_texts() == ["81."]


def test_of_many_answers_the_flipped_and_worse_ones_are_shown_and_the_rest_is_counted(
    opened: Open, tmp_path: Path
) -> None:
    plain = [
        {"where": f"row {number}", "prompt": "?", "base": "No.", "tuned": "Yes."}
        for number in range(10, 710)
    ]
    page = opened(written(tmp_path, [*plain[:499], ANSWERS[0], *plain[499:]]))
    assert page.locator(".answer").count() == MOST_SHOWN
    assert status(page) == f"Showing {MOST_SHOWN} of {MOST_SHOWN} answers"
    note = page.get_by_text("200 of 701 answers, the flipped and worse ones first.")
    assert "report.json has 500 of them" in note.inner_text()
    page.get_by_role("button", name="Flipped (1)").click()
    assert visible(page) == ["1"]


def numbered(count: int, suite: str | None = None, worse: int = -1) -> list[Answer]:
    return [
        Answer(id=str(n), suite=suite, prompt="", tuned="", length=0, worse=n == worse)
        for n in range(count)
    ]


def shown(own: list[Answer], of_suites: list[Answer]) -> list[Answer]:
    job = ReportedJob(name="job", kind="FineTuneJob", base_model="", method="sft")
    return shown_answers(JobReport(job=job, summary=[], answers=own, suite_answers=of_suites))


def test_shown_answers_keep_their_order() -> None:
    found = [answer.id for answer in shown(numbered(300, worse=299), [])]
    assert found == [*(str(n) for n in range(199)), "299"]


def test_the_page_has_answers_to_each_suite_and_no_more_answers_for_them() -> None:
    suites = [*numbered(400, "large", worse=399), *numbered(7, "small")]
    found = shown(numbered(300), suites)
    assert len(found) == MOST_SHOWN
    counts = {
        name: [each.id for each in found if each.suite == name] for name in ("large", "small")
    }
    assert counts["small"] == [str(n) for n in range(7)]
    assert len(counts["large"]) == MOST_SHOWN // 2 - 7
    assert counts["large"][-1] == "399"
    assert len(shown(numbered(3), suites)) == MOST_SHOWN
    assert len(shown([], suites)) == MOST_SHOWN
