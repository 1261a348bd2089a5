"""Fixtures of tests in a browser. A test module has the fixture `file`, the page that it opens."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

TIMEOUT = 120_000.0
"""Milliseconds: other tests compute at the same time."""
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 375, "height": 800}

Open = Callable[..., Page]


@pytest.fixture(scope="module")
def browser(chromium: Path) -> Iterator[Browser]:
    """Headless Chromium."""
    as_root = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=chromium, args=as_root, timeout=TIMEOUT)
        yield found
        found.close()


@pytest.fixture
def opened(browser: Browser, file: Path) -> Iterator[Open]:
    """Opens the page. At the end of the test no message, error or request may have occurred."""
    contexts, problems = [], []

    def open_page(path: Path = file, **options: Any) -> Page:
        context = browser.new_context(**{"viewport": DESKTOP, **options})
        context.set_default_timeout(TIMEOUT)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: _note(request.url, path, problems))
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert problems == []


def _note(url: str, path: Path, problems: list[str]) -> None:
    if url != path.as_uri() and not url.startswith("data:"):
        problems.append(url)
