"""The manifest reader: the manifests it accepts, and the message for each mistake."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from tests.manifests.manifests import (
    BROKEN_RULES,
    GRPO,
    MINIMAL,
    VALID,
    BrokenField,
    BrokenRule,
    Manifest,
    broken_fields,
    changed,
)
from tuneyard.api.alignmentjob import AlignmentJob
from tuneyard.api.finetunejob import FineTuneJob
from tuneyard.api.meta import Model, Rule, yaml_fields
from tuneyard.errors import ManifestError
from tuneyard.manifests.crd import crds
from tuneyard.manifests.explain import REMEDIES
from tuneyard.manifests.fields import Partial, mappings, nested
from tuneyard.manifests.manifest import KINDS, parse, read

PARTS = {
    "apiVersion": "apiVersion: tuneyard.io/v1alpha1",
    "kind": "kind: FineTuneJob",
    "metadata": "metadata: {name: job}",
    "spec": "spec:",
    "model": '  model: {uri: "hf://org/model"}',
    "data": '  data: {train: [{uri: "file://t"}]}',
    "output": '  output: {uri: "file://o"}',
    "more": "",
}


def text(**parts: str) -> str:
    """Return a manifest with some of its eight lines replaced; `more` is the last."""
    return "\n".join({**PARTS, **parts}.values())


def faults(manifest: str, source: str | None = None) -> list[str]:
    with pytest.raises(ManifestError) as caught:
        read(manifest, source)
    return [str(fault) for fault in caught.value.faults]


def models(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield model
    for info in yaml_fields(model).values():
        inner = nested(info.annotation)
        if inner is not None:
            yield from models(inner)


ALL_MODELS = {model for kind in KINDS.values() for model in models(kind)}
SPEC = "model, method, data, adapter, training, evaluate, output, compute, tracking, runPolicy"
FORMATS = (
    "auto, messages, alpaca, dolly, flan, question-answer, sharegpt, openassistant, ultrachat, "
    "prompt-completion, text, preference, ranking, labeled, feedback"
)

ONE_FAULT = {
    # ---- the document
    "no text": (
        "",
        "the manifest is empty: write a job, beginning with apiVersion: tuneyard.io/v1alpha1",
    ),
    "comments only": (
        "# nothing\n---\n",
        "the manifest is empty: write a job, beginning with apiVersion: tuneyard.io/v1alpha1",
    ),
    "a list": ("- a", "1: a list is not a manifest: write a mapping"),
    "a word": ("word", "1: 'word' is not a manifest: write a mapping"),
    "a tab": (
        "spec:\n\tmodel: x",
        "2: not valid YAML at column 1: found character '\\t' that cannot start any token: "
        "indent with spaces, not tabs",
    ),
    "a colon": (
        "a: b: c",
        "1: not valid YAML at column 5: mapping values are not allowed here: quote a value that "
        "contains ': '",
    ),
    "an open bracket": (
        "a: [1,",
        "1: not valid YAML at column 7: expected the node content, but found '<stream end>'",
    ),
    "a control character": (
        "a: 1\nb: \x01",
        "2: YAML does not allow the character '\\x01': remove it",
    ),
    "an unknown alias": ("a: *b", "1: not valid YAML at column 4: found undefined alias 'b'"),
    "a recursive alias": (
        "a: &a\n  b: *a",
        "1: a.b: the alias contains itself: remove it",
    ),
    "a foreign tag": (
        text(more="  method: !!python/name:os.system sft"),
        "8: spec.method: the tag !!python/name:os.system is not supported: remove it",
    ),
    "a tag of another type": (
        text(more="  training: {epochs: !!int many}"),
        "8: spec.training.epochs: 'many' is not of the type !!int: correct it, or remove !!int",
    ),
    "a key twice": (
        text(more="  method: sft\n  method: pretrain"),
        "9: spec.method: 'method' is set twice (first on line 8): remove one",
    ),
    "a key that is a number": (
        text(metadata="metadata: {name: job, labels: {1: a}}"),
        "3: metadata.labels: the key 1 is not a string: write '1'",
    ),
    "a template": (
        text(metadata="metadata: {name: job, labels: {{x}}}"),
        "3: metadata.labels: a key must be a string: quote text with braces or brackets",
    ),
    "a merge of nothing": (
        text(more="  compute: {<<: 5}"),
        "8: spec.compute: << takes a mapping or a list of mappings: change its value to one",
    ),
    # ---- apiVersion, kind, metadata
    "no apiVersion": (
        text(apiVersion=""),
        "2: apiVersion: required and missing: add apiVersion: tuneyard.io/v1alpha1",
    ),
    "another version": (
        text(apiVersion="apiVersion: tuneyard.io/v1"),
        "1: apiVersion: 'tuneyard.io/v1' is not a version of this API: write tuneyard.io/v1alpha1",
    ),
    "no kind": (
        text(kind=""),
        "1: kind: required and missing: add kind: FineTuneJob or AlignmentJob",
    ),
    "almost a kind": (
        text(kind="kind: FinetuneJob"),
        "2: kind: 'FinetuneJob' is not a kind of job: did you mean 'FineTuneJob'?",
    ),
    "another kind": (
        text(kind="kind: Secret"),
        "2: kind: 'Secret' is not a kind of job: write FineTuneJob or AlignmentJob",
    ),
    "a kind that is no text": (
        text(kind="kind: []"),
        "2: kind: a list is not a kind of job: write FineTuneJob or AlignmentJob",
    ),
    "no metadata": (
        text(metadata=""),
        "1: metadata: required and missing: add it. Name, namespace and labels.",
    ),
    "no name": (
        text(metadata="metadata: {generateName: job-}"),
        "3: metadata.name: required and missing: add it. Name of the job: at most 40 "
        "lower-case letters, digits and dashes, starting with a letter.",
    ),
    "a long name": (
        text(metadata=f"metadata: {{name: {'a' * 41}}}"),
        "3: metadata.name: 41 characters are too many: write at most 40",
    ),
    "a capital name": (
        text(metadata="metadata: {name: Job}"),
        "3: metadata.name: 'Job' is not valid: use at most 40 lower-case letters, digits and "
        "dashes, starting with a letter",
    ),
    "an unknown metadata field": (
        text(metadata="metadata: {name: job, lables: {}}"),
        "3: metadata.lables: unknown field 'lables': did you mean 'labels'?",
    ),
    # ---- unknown fields
    "a misspelled field": (
        text(more="  training: {epoch: 3}"),
        "8: spec.training.epoch: unknown field 'epoch': did you mean 'epochs'?",
    ),
    "Python's spelling": (
        text(more="  training: {max_steps: 3}"),
        "8: spec.training.max_steps: unknown field 'max_steps': did you mean 'maxSteps'?",
    ),
    "a field too high": (
        text(more="  epochs: 3"),
        "8: spec.epochs: unknown field 'epochs': it belongs at spec.training.epochs",
    ),
    "a misspelled field too high": (
        text(more="  epoch: 3"),
        "8: spec.epoch: unknown field 'epoch': it belongs at spec.training.epochs",
    ),
    "a field in the wrong place": (
        text(more="  training: {rank: 8}"),
        "8: spec.training.rank: unknown field 'rank': it belongs at spec.adapter.lora.rank or "
        "spec.adapter.qlora.rank",
    ),
    "a field that is nowhere": (
        text(more="  nonsense: 3"),
        f"8: spec.nonsense: unknown field 'nonsense': spec takes {SPEC}",
    ),
    "an unknown field of the document": (
        text(spec="speck: 3\nspec:"),
        "4: speck: unknown field 'speck': did you mean 'spec'?",
    ),
    # ---- types
    "words for an integer": (
        text(more="  training: {maxSteps: three}"),
        "8: spec.training.maxSteps: 'three' is not an integer: write a number, e.g. 3",
    ),
    "a quoted integer": (
        text(more='  training: {maxSteps: "3"}'),
        "8: spec.training.maxSteps: '3' is not an integer: remove the quotes",
    ),
    "a fraction for an integer": (
        text(more="  training: {maxSteps: 2.5}"),
        "8: spec.training.maxSteps: 2.5 is not an integer: write a number, e.g. 3",
    ),
    "a boolean for a number": (
        text(more="  training: {epochs: yes}"),
        "8: spec.training.epochs: yes is not a number: write a number, e.g. 0.5",
    ),
    "a quoted number": (
        text(more='  training: {epochs: "2e-1"}'),
        "8: spec.training.epochs: '2e-1' is not a number: remove the quotes",
    ),
    "infinity": (
        text(more="  training: {epochs: .inf}"),
        "8: spec.training.epochs: .inf is not a finite number: write a number, e.g. 0.5",
    ),
    "a quoted boolean": (
        text(output='  output: {uri: "file://o", merge: "true"}'),
        "7: spec.output.merge: 'true' is not a boolean: remove the quotes",
    ),
    "a number for a boolean": (
        text(output='  output: {uri: "file://o", merge: 1}'),
        "7: spec.output.merge: 1 is not a boolean: write true or false",
    ),
    "a number for a string": (
        text(model='  model: {uri: "hf://org/model", revision: 1.10}'),
        '5: spec.model.revision: 1.10 is a number, not a string: quote it: "1.10"',
    ),
    "a boolean for a string": (
        text(data='  data: {train: [{uri: "file://t"}], systemPrompt: yes}'),
        '6: spec.data.systemPrompt: yes is a boolean, not a string: quote it: "yes"',
    ),
    "a list for a string": (
        text(model='  model: {uri: ["hf://org/model"]}'),
        "5: spec.model.uri: a list is not a string: write text",
    ),
    "a mapping for a list": (
        text(data='  data: {train: {uri: "file://t"}}'),
        "6: spec.data.train: a mapping is not a list: write a list, '- ' before each item",
    ),
    "a URI for a mapping": (
        text(model="  model: hf://org/model"),
        "5: spec.model: 'hf://org/model' is not a mapping: write uri: hf://org/model below it",
    ),
    "a number for a mapping": (
        text(more="  training: 5"),
        "8: spec.training: 5 is not a mapping: write its fields below it",
    ),
    "a word for a map of strings": (
        text(more="  compute: {nodeSelector: gpu}"),
        "8: spec.compute.nodeSelector: 'gpu' is not a mapping: write 'key: value' lines below it",
    ),
    "nothing in a list": (
        text(data="  data: {train: [null]}"),
        "6: spec.data.train[0]: null is not a mapping: write its fields below it",
    ),
    "words for a number or auto": (
        text(more="  training: {batchSize: three}"),
        "8: spec.training.batchSize: 'three' is not an integer or 'auto': write a number, e.g. 3, "
        "or auto",
    ),
    "almost auto": (
        text(more="  training: {learningRate: atuo}"),
        "8: spec.training.learningRate: 'atuo' is not a number or 'auto': did you mean 'auto'?",
    ),
    "a quoted number where auto may stand": (
        text(more='  training: {learningRate: "2e-4"}'),
        "8: spec.training.learningRate: '2e-4' is not a number or 'auto': remove the quotes",
    ),
    "almost a word where a list may stand": (
        text(more="  adapter: {lora: {targets: atention}}"),
        "8: spec.adapter.lora.targets: 'atention' is not a list, 'all-linear' or 'attention': did "
        "you mean 'attention'?",
    ),
    "a number in a list of strings": (
        text(more="  adapter: {lora: {targets: [q_proj, 5]}}"),
        '8: spec.adapter.lora.targets[1]: 5 is a number, not a string: quote it: "5"',
    ),
    # ---- values
    "almost a choice": (
        text(data='  data: {train: [{uri: "file://t", format: mesages}]}'),
        f"6: spec.data.train[0].format: 'mesages' is not one of {FORMATS}: did you mean "
        "'messages'?",
    ),
    "no choice": (
        text(more="  method: rlhf"),
        "8: spec.method: 'rlhf' is not one of sft, pretrain: write one of them",
    ),
    "a switch where a word is wanted": (
        text(data='  data: {train: [{uri: "file://t"}], packing: off}'),
        "6: spec.data.packing: off is not one of auto, always, never: did you mean 'never'?",
    ),
    "too small": (
        text(more="  training: {maxSteps: 0}"),
        "8: spec.training.maxSteps: 0 is too small: write at least 1",
    ),
    "not above": (
        text(more="  training: {epochs: 0}"),
        "8: spec.training.epochs: 0 is too small: write more than 0",
    ),
    "too large": (
        text(more="  evaluate: {samples: 1_000}"),
        "8: spec.evaluate.samples: 1_000 is too large: write at most 100",
    ),
    "not below": (
        text(data='  data: {train: [{uri: "file://t"}], validation: {fraction: 1}}'),
        "6: spec.data.validation.fraction: 1 is too large: write less than 1",
    ),
    "a bound where auto may stand": (
        text(data='  data: {train: [{uri: "file://t"}], maxLength: 1048577}'),
        "6: spec.data.maxLength: 1048577 is too large: write at most 1048576, or auto",
    ),
    "an empty string": (
        text(model='  model: {uri: "hf://org/model", revision: ""}'),
        "5: spec.model.revision: 0 characters are too few: write at least 1",
    ),
    "an empty list": (
        text(data="  data: {train: []}"),
        "6: spec.data.train: 0 items are too few: write at least 1",
    ),
    "a broken quantity": (
        text(more="  compute: {memory: 16GB}"),
        "8: spec.compute.memory: '16GB' is not valid: write a Kubernetes quantity, e.g. \"500m\" "
        'or "16Gi"',
    ),
    "no scheme": (
        text(data="  data: {train: [{uri: data/x.jsonl}]}"),
        "6: spec.data.train[0].uri: 'data/x.jsonl' has no scheme: write file://data/x.jsonl",
    ),
    "a hub name": (
        text(model="  model: {uri: org/model}"),
        "5: spec.model.uri: 'org/model' has no scheme: write hf://org/model for a model of the "
        "hub, or file://org/model for a folder",
    ),
    "half a scheme": (
        text(output='  output: {uri: "s3:bucket/key"}'),
        "7: spec.output.uri: 's3:bucket/key' has no scheme: write s3://bucket/key",
    ),
    "almost a scheme": (
        text(data='  data: {train: [{uri: "http://host/x"}]}'),
        "6: spec.data.train[0].uri: 'http://host/x' has the scheme 'http', which this field "
        "does not support: did you mean https://host/x?",
    ),
    "another scheme": (
        text(output='  output: {uri: "hf://org/model"}'),
        "7: spec.output.uri: 'hf://org/model' has the scheme 'hf', which this field does "
        "not support: write one of pvc, s3, gs, file",
    ),
    "a scheme alone": (
        text(output='  output: {uri: "file://"}'),
        "7: spec.output.uri: 'file://' has no path: write one after file://",
    ),
    "white space in a URI": (
        text(output='  output: {uri: "file://my folder"}'),
        "7: spec.output.uri: 'file://my folder' contains white space: rename the file or folder",
    ),
    # ---- what is missing
    "no spec": (
        "\n".join(PARTS[name] for name in ("apiVersion", "kind", "metadata")),
        "1: spec: required and missing: add it. The specification of the job.",
    ),
    "no output": (
        text(output=""),
        "4: spec.output: required and missing: add it. The location of the result and its content.",
    ),
    "an empty output": (
        text(output="  output:"),
        "7: spec.output: required and missing: add it. The location of the result and its content.",
    ),
    "an item without its URI": (
        text(data="  data:\n    train:\n    - weight: 1"),
        "8: spec.data.train[0].uri: required and missing: add it. Location: "
        "file://data/train.jsonl (relative to the manifest), s3://BUCKET/KEY, "
        "hf://datasets/ORG/NAME/file.parquet, pvc://CLAIM/PATH or pkg://PACKAGE/FILE. The suffix "
        "decides between JSONL, JSON, CSV, Parquet and text; each may be compressed (.gz, .bz2, "
        ".xz, .zst).",
    ),
    # ---- rules across fields
    "two of a union": (
        text(more="  adapter:\n    lora: {}\n    qlora: {}"),
        "8: spec.adapter: set exactly one of lora, qlora, prefix, prompt, ia3, bottleneck; found "
        "lora and qlora",
    ),
    "none of a union": (
        text(more="  adapter: {}"),
        "8: spec.adapter: set exactly one of lora, qlora, prefix, prompt, ia3, bottleneck; found "
        "none",
    ),
    "fewer workers than the least": (
        text(more="  compute: {workers: 2, minWorkers: 4}"),
        "8: spec.compute.minWorkers: must not exceed workers: lower minWorkers or raise workers; "
        "found 4 above 2",
    ),
}


@pytest.mark.parametrize(("manifest", "message"), ONE_FAULT.values(), ids=ONE_FAULT)
def test_a_mistake_has_one_message_with_its_line_field_reason_and_remedy(
    manifest: str, message: str
) -> None:
    assert faults(manifest) == [message]


def test_a_judge_as_the_independent_reward_is_refused_with_the_field_that_takes_one() -> None:
    judged = copy.deepcopy(GRPO)
    judged["spec"]["independentReward"] = {"judge": {"model": {"uri": "hf://org/judge"}}}
    assert faults(yaml.safe_dump(judged))[-1].endswith(
        "spec.independentReward.judge: unknown field 'judge': a judge compares completions once "
        "training is over: set evaluate.winRate.judge"
    )


def test_every_fault_of_every_document_is_reported_at_once_in_order() -> None:
    first = text(
        output="  output: {}",
        more="  epochs: 3\n  adapter: {lora: {rank: 0}}\n  training: {freeze: {}, seed: -1}",
    )
    second = text(kind="kind: FineTune", metadata="metadata: {name: other}", model="")
    assert faults(f"{first}\n---\n{second}\n---\na: [", "jobs.yaml") == [
        "jobs.yaml:7: spec.output.uri: required and missing: add it. Folder of the result: "
        "pvc://CLAIM/PATH, s3://BUCKET/KEY, gs://BUCKET/KEY or file://PATH (relative to the "
        "manifest). Each job needs a folder of its own.",
        "jobs.yaml:8: spec.epochs: unknown field 'epochs': it belongs at spec.training.epochs",
        "jobs.yaml:9: spec.adapter.lora.rank: 0 is too small: write at least 1",
        "jobs.yaml:10: spec.training.seed: -1 is too small: write at least 0",
        "jobs.yaml:10: spec.training.freeze: applies to full fine-tuning only, as an adapter "
        "freezes the whole base model: remove training.freeze or adapter",
        "jobs.yaml:13: kind: 'FineTune' is not a kind of job: did you mean 'FineTuneJob'?",
        "jobs.yaml:15: spec.model: required and missing: add it. The base model.",
        "jobs.yaml:21: not valid YAML at column 5: expected the node content, but found "
        "'<stream end>'",
    ]


@pytest.mark.parametrize(
    "more",
    [
        "  adapter: {lorra: {}}",
        "  adapter: {prefix: 5}\n",
        "  validation: {fraction: 0.1}\n  training: {earlyStopping: {}}",
        "  training: {epochs: many, maxSteps: 5}",
    ],
)
def test_a_rule_is_not_reported_if_a_field_that_it_reads_has_a_fault(more: str) -> None:
    assert len(faults(text(more=more))) == 1


def test_two_jobs_with_the_same_name_are_refused() -> None:
    assert faults(f"{text()}\n---\n{text()}") == [
        "12: metadata.name: 'job' is the name of an earlier FineTuneJob too: rename one"
    ]


def test_two_jobs_with_the_same_name_in_two_namespaces_are_accepted() -> None:
    other = text(metadata="metadata: {name: job, namespace: other}")
    assert len(read(f"{text()}\n---\n{other}")) == 2


def test_several_documents_are_read_in_order_and_empty_ones_skipped() -> None:
    documents = [yaml.safe_dump(manifest) for manifest in VALID.values()]
    jobs = read(
        "---\n# none\n---\n"
        + "\n---\n".join(
            document.replace("name: job\n", f"name: job-{number}\n", 1)
            for number, document in enumerate(documents)
        )
    )
    assert [job.kind for job in jobs] == [manifest["kind"] for manifest in VALID.values()]
    assert [job.metadata.name for job in jobs] == [f"job-{n}" for n in range(len(documents))]


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("2e-4", 0.0002),
        ("2E-4", 0.0002),
        ("1.", 1.0),
        (".5", 0.5),
        ("+1", 1.0),
        ("0x1", 1.0),
        ("1e0", 1.0),
    ],
)
def test_numbers_mean_what_they_mean_to_kubectl(written: str, meant: float) -> None:
    (job,) = read(text(more=f"  training: {{learningRate: {written}}}"))
    assert isinstance(job, FineTuneJob)
    assert job.spec.training.learning_rate == meant


@pytest.mark.parametrize(
    ("written", "meant"), [("1_000", 1000), ("010", 8), ("0o10", 8), ("3.0", 3), ("1e3", 1000)]
)
def test_integers_mean_what_they_mean_to_kubectl(written: str, meant: int) -> None:
    (job,) = read(text(more=f"  training: {{maxSteps: {written}}}"))
    assert isinstance(job, FineTuneJob)
    assert job.spec.training.max_steps == meant


@pytest.mark.parametrize("written", ["yes", "on", "True", "y"])
def test_booleans_mean_what_they_mean_to_kubectl(written: str) -> None:
    (job,) = read(text(output=f'  output: {{uri: "file://o", merge: {written}}}'))
    assert job.spec.output.merge is True


@pytest.mark.parametrize("written", ["2026-11-21", "1:30", "1.2.3", "'yes'", "1e", "0x"])
def test_strings_are_the_same_as_for_kubectl(written: str) -> None:
    (job,) = read(text(model=f'  model: {{uri: "hf://org/model", revision: {written}}}'))
    assert isinstance(job, FineTuneJob)
    assert job.spec.model.revision == written.strip("'")


def test_a_field_without_a_value_is_absent() -> None:
    assert read(text(more="  adapter:\n  training:\n    epochs: ~")) == read(text())


def test_null_is_kept_if_it_differs_from_absence() -> None:
    (job,) = read(text(more="  training: {optimizer: {maxGradientNorm: null}}"))
    assert isinstance(job, FineTuneJob)
    assert job.spec.training.optimizer.max_gradient_norm is None


def test_anchors_aliases_and_merge_keys_work_and_explicit_keys_take_precedence() -> None:
    data = (
        "  data:\n"
        "    train:\n"
        '    - &first {uri: "file://a", weight: 2}\n'
        '    - {uri: "file://b", <<: *first}\n'
        "    - *first"
    )
    (job,) = read(text(data=data))
    assert isinstance(job, FineTuneJob)
    assert [(one.uri, one.weight) for one in job.spec.data.train] == [
        ("file://a", 2),
        ("file://b", 2),
        ("file://a", 2),
    ]


def test_a_fault_behind_an_alias_names_the_field_and_the_line_where_it_was_written() -> None:
    data = '  data:\n    train: [{uri: "file://a", fields: &names {txt: t}}]'
    assert faults(text(data=data)) == [
        "7: spec.data.train[0].fields.txt: unknown field 'txt': did you mean 'text'?"
    ]


def test_too_many_expanded_aliases_are_refused_before_they_fill_the_memory() -> None:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    for number in range(1, 12):
        name, previous = chr(ord("a") + number), chr(ord("a") + number - 1)
        lines.append(f"{name}: &{name} [{', '.join([f'*{previous}'] * 9)}]")
    (fault,) = faults("\n".join(lines))
    assert fault.endswith("more than 50000 values with aliases expanded: remove aliases")


def test_deep_nesting_is_refused() -> None:
    assert faults("[" * 1000) == ["the YAML is nested too deeply: flatten it"]


def test_a_text_above_the_size_limit_is_refused_without_parsing() -> None:
    assert faults("[" * (1 << 20) + "[", "big.yaml") == [
        "big.yaml: the manifest has 1048577 bytes, and the limit is 1048576: put data in files and "
        "name them by uri"
    ]


def test_a_status_in_a_file_is_ignored() -> None:
    (job,) = read(text() + "\nstatus: {phase: Nonsense}")
    assert job.status is None


def test_metadata_of_kubectl_get_is_accepted() -> None:
    metadata = "metadata: {name: job, uid: x, resourceVersion: '1', managedFields: [{a: 1}]}"
    assert read(text(metadata=metadata))[0].metadata.uid == "x"


# ---- objects from the API server


def test_an_object_of_the_api_server_is_parsed_with_its_status() -> None:
    metadata = {"name": "job", "uid": "x", "generation": 2, "unheardOf": 1, "managedFields": []}
    status = {"phase": "Running", "observedGeneration": 2, "ofANewerOperator": {"a": 1}}
    job = parse({**MINIMAL, "metadata": metadata, "status": status})
    assert job.metadata.generation == 2
    assert job.status is not None
    assert job.status.phase == "Running"


def test_an_object_of_the_api_server_has_faults_without_lines() -> None:
    with pytest.raises(ManifestError) as caught:
        parse(changed(MINIMAL, {"spec.training": {"learningRate": True, "ofANewerVersion": 1}}))
    assert [str(fault) for fault in caught.value.faults] == [
        "spec.training.learningRate: true is not a number or 'auto': write a number, e.g. 0.5, or "
        "auto"
    ]


@pytest.mark.parametrize("manifest", VALID.values(), ids=VALID)
def test_unknown_fields_of_an_object_of_the_api_server_are_ignored(manifest: Manifest) -> None:
    """After a rollback, the operator reads objects with fields that only a newer version knows."""
    newer = copy.deepcopy(manifest)
    for _, mapping, _ in list(mappings(KINDS[manifest["kind"]], newer)):
        mapping["ofANewerVersion"] = {"a": 1}
    assert parse(newer) == parse(manifest)
    with pytest.raises(ManifestError, match="unknown field 'ofANewerVersion'"):
        read(yaml.safe_dump(newer))


def test_an_unknown_value_of_an_object_of_the_api_server_is_refused() -> None:
    """It has no meaning that this version could act on."""
    with pytest.raises(ManifestError, match=r"spec\.method: 'distill'"):
        parse(changed(MINIMAL, {"spec.method": "distill"}))


def test_conditions_that_only_a_newer_version_knows_are_ignored() -> None:
    def condition(type_: str) -> dict[str, str]:
        since = "2026-11-26T12:00:00Z"
        return {"type": type_, "status": "True", "reason": "R", "lastTransitionTime": since}

    status = {"phase": "Running", "conditions": [condition("Throttled"), condition("Running")]}
    parsed = parse({**MINIMAL, "status": status}).status
    assert parsed is not None
    assert [one.type for one in parsed.conditions] == ["Running"]


def test_parsing_leaves_its_argument_as_it_was() -> None:
    value = changed(MINIMAL, {"spec.training.epochs": None})
    parse(value)
    assert value["spec"]["training"] == {"epochs": None}


# ---- all fields and rules


@pytest.mark.parametrize("manifest", VALID.values(), ids=VALID)
def test_valid_manifests_are_read(manifest: Manifest) -> None:
    assert read(yaml.safe_dump(manifest)) == [parse(manifest)]


def test_the_valid_manifests_fill_every_field_of_every_model() -> None:
    filled = {
        (model, name)
        for manifest in VALID.values()
        for model, mapping, _ in mappings(KINDS[manifest["kind"]], manifest)
        for name in mapping
    }
    specs = {model for kind in KINDS.values() for model in models(nested_spec(kind))}
    every = {(model, name) for model in specs for name in yaml_fields(model)}
    assert every <= filled


def nested_spec(kind: type[BaseModel]) -> type[BaseModel]:
    spec = nested(yaml_fields(kind)["spec"].annotation)
    assert spec is not None
    return spec


BROKEN_FIELDS = list(broken_fields(crds()))


@pytest.mark.parametrize("broken", BROKEN_FIELDS, ids=lambda broken: broken.name)
def test_the_reader_refuses_at_the_same_field_what_the_schema_refuses(broken: BrokenField) -> None:
    with pytest.raises(ManifestError) as caught:
        read(yaml.safe_dump(broken.manifest))
    assert {fault.path for fault in caught.value.faults} == {broken.path}


@pytest.mark.parametrize("broken", BROKEN_RULES, ids=lambda broken: broken.name)
def test_a_broken_rule_is_named_with_its_remedy(broken: BrokenRule) -> None:
    with pytest.raises(ManifestError) as caught:
        read(yaml.safe_dump(broken.manifest))
    (fault,) = caught.value.faults
    assert (fault.path, fault.message.split("; found")[0]) == (broken.path, broken.message)


@pytest.mark.parametrize("broken", BROKEN_RULES, ids=lambda broken: broken.name)
def test_a_broken_rule_is_refused_in_python_too(broken: BrokenRule) -> None:
    with pytest.raises(ValueError, match="Value error"):
        KINDS[broken.manifest["kind"]].model_validate(broken.manifest)


def all_rules() -> set[Rule]:
    return {rule for model in ALL_MODELS if issubclass(model, Model) for rule in model.rules}


def test_every_rule_has_a_manifest_that_breaks_it() -> None:
    assert {rule.message for rule in all_rules()} == {broken.message for broken in BROKEN_RULES}


@pytest.mark.parametrize("manifest", VALID.values(), ids=VALID)
def test_no_rule_reads_a_field_that_it_does_not_name(manifest: Manifest) -> None:
    for model, mapping, _ in mappings(KINDS[manifest["kind"]], manifest):
        for rule in model.rules if issubclass(model, Model) else ():
            reads: set[str] = set()
            assert rule.holds(RecordingPartial(model, mapping, reads))
            named = {name[:end] for name in rule.reads for end in _ends(name)}
            assert reads <= named, rule


def _ends(name: str) -> list[int]:
    return [index for index, letter in enumerate(name) if letter == "."] + [len(name)]


class RecordingPartial(Partial):
    """A Partial that records the paths of the fields that are read."""

    def __init__(
        self, model: type[BaseModel], value: dict[str, Any], read: set[str], path: str = ""
    ) -> None:
        super().__init__(model, value)
        self._read, self._path = read, path

    def __getattr__(self, name: str) -> Any:
        path = self._path + (self._model.model_fields[name].alias or name)
        self._read.add(path)
        value = super().__getattr__(name)
        if isinstance(value, Partial):
            return RecordingPartial(value._model, dict(value._value), self._read, f"{path}.")
        return value


def test_every_pattern_has_a_remedy() -> None:
    patterns: set[str] = set()

    def visit(node: Any) -> None:
        if isinstance(node, dict):
            patterns.update([node["pattern"]] if isinstance(node.get("pattern"), str) else [])
            node = list(node.values())
        for part in node if isinstance(node, list) else ():
            visit(part)

    for kind in (FineTuneJob, AlignmentJob):
        visit(kind.model_json_schema()["$defs"])
    of_uris = {pattern for pattern in patterns if re.match(r"\^\([a-z0-9|]+\)://", pattern)}
    in_status = {pattern for pattern in patterns if "_,:" in pattern}
    assert patterns - of_uris - in_status == set(REMEDIES)
