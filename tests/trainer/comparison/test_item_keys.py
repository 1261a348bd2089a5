"""The keys of items: equal for the same rows, prompts and suites, and for nothing else."""

from __future__ import annotations

from typing import Any

from tuneyard_trainer.comparison.item_keys import AskedItems, line_digests, suite_sources

ROWS = b'{"a": 1}\n{"a": 2}\n{"a": 1}\n'


def asked(rows: bytes = b"", preferences: bytes = b"", **more: Any) -> AskedItems:
    known: dict[str, Any] = {"sources": {}, "suites": {}, **more}
    return AskedItems(rows=line_digests(rows), preferences=line_digests(preferences), **known)


def test_rows_have_the_key_of_their_content_and_equal_rows_are_told_apart() -> None:
    keys = asked(ROWS).keys("answerAccuracy", ["row 1", "row 2", "row 3"])
    assert keys is not None
    assert len(set(keys)) == 3
    turned = asked(b'{"a": 2}\n{"a": 1}\n{"a": 1}\n').keys("tokenF1", ["row 1", "row 2", "row 3"])
    assert turned is not None
    assert set(turned) == set(keys)
    assert turned[0] == keys[1]


def test_rows_that_are_not_known_have_no_keys() -> None:
    assert asked().keys("answerAccuracy", ["row 1"]) is None
    assert asked(ROWS).keys("answerAccuracy", ["row 1", "row 4"]) is None
    assert asked(ROWS).keys("answerAccuracy", ["row 0"]) is None


def test_preferences_are_the_same_only_if_all_of_them_are() -> None:
    ids = ["pair 1", "pair 2"]
    keys = asked(preferences=ROWS).keys("preferenceAccuracy", ids)
    assert keys == asked(preferences=ROWS).keys("preferenceAccuracy", ids)
    assert keys != asked(preferences=ROWS + b"{}\n").keys("preferenceAccuracy", ids)
    assert asked(ROWS).keys("preferenceAccuracy", ids) is None


def test_held_out_prompts_are_rows_of_the_preferences_and_others_of_their_source() -> None:
    one, two = (asked(preferences=each) for each in (ROWS, ROWS + b"{}\n"))
    assert one.keys("reward", ["held-out row 1"]) == two.keys("reward", ["held-out row 1"])
    source, other = (asked(sources={"prompts": digest}) for digest in ("sha256:1", "sha256:2"))
    assert source.keys("reward", ["p.jsonl row 1"]) != other.keys("reward", ["p.jsonl row 1"])
    assert asked().keys("reward", ["p.jsonl row 1"]) is None


def test_a_suite_is_the_same_if_its_data_or_the_version_of_its_task_is() -> None:
    def of(number: str, version: int, **task: Any) -> dict[str, str]:
        suites = [
            {"name": "grammar", "choices": {"uri": "file://a"}},
            {"name": "facts", "task": {"name": "mmlu", **task}},
        ]
        manifest = {"spec": {"evaluate": {"suites": suites}}}
        details = {"facts": {"versions": {"mmlu": version}}}
        return suite_sources(manifest, details, {"suite.0": f"sha256:{number}"})

    first = of("1", 2)
    assert first == of("1", 2)
    assert first["grammar"] != of("2", 2)["grammar"]
    assert first["facts"] != of("1", 3)["facts"]
    assert first["facts"] != of("1", 2, fewShot=5)["facts"]
    keys = asked(suites=first)
    assert keys.keys("grammar/accuracy", ["blimp.jsonl row 1"]) is not None
    assert keys.keys("facts/biology/acc", ["biology document 0"]) is not None
    assert keys.keys("manners/overRefusal", ["xstest.csv row 1"]) is None


def test_manifests_of_any_form_have_no_suites() -> None:
    for evaluate in (None, [], {"suites": {}}, {"suites": [3, {"name": 1}]}):
        assert suite_sources({"spec": {"evaluate": evaluate}}, {}, {}) == {}
    assert suite_sources({"spec": 3}, {}, {}) == {}
