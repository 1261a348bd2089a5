"""Take pictures of a report's page: light, dark, on a phone, and in print.

    .venv/bin/python scripts/report_pictures.py out/support-bot/result/report.html pictures

It needs Chromium, which `python tests/rig deps` installs, and the packages of `make setup`.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Literal

from playwright.sync_api import sync_playwright

PICTURES: dict[str, tuple[Literal["light", "dark"], int]] = {
    "light": ("light", 1280),
    "dark": ("dark", 1280),
    "phone": ("light", 375),
}
"""Colors and width in pixels, by name."""


def main(page: Path, folder: Path) -> None:
    """Write a PNG of each of PICTURES and `print.pdf` into the folder."""
    chromium = shutil.which("chromium")
    if chromium is None:
        sys.exit("chromium is not installed: run `python tests/rig deps` as root, or install it")
    folder.mkdir(parents=True, exist_ok=True)
    as_root = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=as_root)
        for name, (scheme, width) in PICTURES.items():
            tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            tab.goto(page.resolve().as_uri())
            tab.screenshot(path=folder / f"{name}.png", full_page=True)
            if name == "light":
                tab.pdf(path=folder / "print.pdf", format="A4")
        browser.close()


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: report_pictures.py PAGE FOLDER")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
