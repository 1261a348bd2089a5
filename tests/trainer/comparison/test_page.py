"""The page of a comparison: one file with the answers and the curves of all jobs."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from pathlib import Path

import pytest
from PIL import Image

from tests.trainer.comparison.outputs import comparison
from tuneyard.api.comparison import ComparedAnswer, Completion
from tuneyard.api.report import Curve, Point
from tuneyard_trainer.comparison.page import render, write
from tuneyard_trainer.reporting.job_curves import JOB_COLORS, JobCurves, draw_jobs


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page as text."""
    return render(comparison(tmp_path_factory.mktemp("jobs")))


def test_the_page_loads_no_external_resource_and_runs_only_its_own_script(page: str) -> None:
    loaded = re.findall(r'(?:src|srcset|href)="([^"]*)"', page)
    assert all(value.startswith(("data:image/png;base64,", "#")) for value in loaded)
    assert "url(" not in page
    assert "@import" not in page
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page


def test_texts_of_models_are_not_html(page: str) -> None:
    assert page.count("<script>") == 1
    assert "&lt;/script&gt;&lt;script&gt;document.title" in page
    assert "\x1b" not in page
    assert "\u202e" not in page


def test_the_page_marks_the_best_job_and_shows_what_differs(page: str) -> None:
    assert page.count('<span class="badge right">best</span>') == 1
    cell = re.search(r'<td[^>]*data-label="high">(?:(?!</td>).)*best', page, re.DOTALL)
    assert cell is not None
    assert "high is better than low on validationLoss" in page
    assert "40 same items" in page
    assert "<code>spec.training.learningRate</code>" in page
    assert '<td class="number">2 min</td>' in page


def test_the_answers_have_what_the_filters_read(page: str) -> None:
    found = re.findall(r'data-differ="(\w+)" data-worse="(\w+)" data-length="(\d+)"', page)
    assert found[:2] == [("true", "true", "9"), ("false", "false", "2")]
    assert found[2][0] == "true"
    assert "Differ (2)" in page
    assert "Worse than low (1)" in page
    assert "<mark>24</mark>" in page


def test_a_page_shows_the_answers_that_differ_first_if_there_are_too_many(tmp_path: Path) -> None:
    def answer(number: int) -> ComparedAnswer:
        texts = ["yes", "no" if number == 299 else "yes"]
        return ComparedAnswer(
            id=f"row {number + 1}",
            prompt="Why?",
            completions=[Completion(text=text) for text in texts],
            differ=number == 299,
        )

    found = comparison(tmp_path).model_copy(update={"answers": [answer(n) for n in range(300)]})
    path = tmp_path / "comparison.html"
    write(found, path)
    text = path.read_text("utf-8")
    assert text.count("<article") == 200
    assert "row 300<" in text
    assert "row 200<" not in text
    assert "200 of 300 answers" in text
    assert render(found) == text


def test_jobs_without_metrics_curves_and_answers_have_a_page(tmp_path: Path) -> None:
    found = comparison(tmp_path).model_copy(
        update={"metrics": [], "answers": [], "curves": [], "settings": [], "costs": []}
    )
    assert "<script>" not in render(found)


def test_every_job_has_a_color_of_its_own_in_the_plot() -> None:
    def curves(level: int) -> list[Curve]:
        points = [Point(step=step, value=float(level)) for step in range(1, 41)]
        return [Curve(metric="loss", label="Loss", training=points)]

    jobs = [JobCurves(f"job {number}", curves(number)) for number in range(8)]
    for theme in ("light", "dark"):
        png = draw_jobs(jobs, "Training", theme)  # type: ignore[arg-type]
        image = Image.open(io.BytesIO(png)).convert("RGB")
        assert image.size == (1600, 1000)
        colors = {"#{:02x}{:02x}{:02x}".format(*color) for _, color in image.getcolors(1 << 24)}
        assert len(set(JOB_COLORS[theme])) == 8  # type: ignore[index]
        assert set(JOB_COLORS[theme]) <= colors  # type: ignore[index]


def test_a_plot_shows_no_value_that_is_not_finite_and_no_curve_of_a_job_without_one() -> None:
    gap = [Point(step=1, value=2.0), Point(step=2, value=None), Point(step=3, value=1.0)]
    jobs = [JobCurves("a", [Curve(metric="reward", label="Reward", held_out=gap)])]
    assert draw_jobs([*jobs, JobCurves("b", [])], "Training")
    assert draw_jobs([JobCurves("a", []), JobCurves("b", [])], "Training")
