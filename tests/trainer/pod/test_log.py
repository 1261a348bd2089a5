"""A pod's log: one line for each event."""

from __future__ import annotations

import io
import re

from tuneyard_trainer.pod.log import Log


def test_an_event_is_one_line_for_any_content_of_its_fields() -> None:
    stream = io.StringIO()
    log = Log(stream)
    log("failed", reason="InvalidData", message='row 7:\n"a b"', advice="", missing=None)
    log("progress", step=3, loss=1.23456789, stages=["prepare", "sft"], event="a metric's name")
    first, second = stream.getvalue().splitlines()
    assert re.fullmatch(
        r"time=\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ event=failed reason=InvalidData "
        r'message="row 7:\\n\\"a b\\""',
        first,
    )
    assert "step=3 loss=1.23457 stages=prepare,sft" in second


def test_half_of_a_character_from_a_file_can_be_logged() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    Log(stream)("progress", message="nothing reads the column note\ud800")
    stream.seek(0)
    assert r"column note\ud800" in stream.read()
