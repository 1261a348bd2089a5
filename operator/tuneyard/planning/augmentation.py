"""Augmentation of training data: its stage, its requests to a model, and its faults.

The requests are written for Tuneyard. A manifest can replace all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tuneyard.api.cleaning import Clean
from tuneyard.api.plan import Input, SourceInput, StageInput
from tuneyard.api.sources import Augment, FineTuneData
from tuneyard.api.stage_settings import AugmentSettings, InversionSettings, ParaphraseSettings
from tuneyard.errors import Fault
from tuneyard.planning import defaults
from tuneyard.planning.drafts import (
    Draft,
    data_inputs,
    dataset_settings,
    judge_input,
    judge_settings,
    text_rules,
)

ROWS = "augmented.jsonl"
"""The output file of the stage that the stage `prepare` reads."""
PROMPT, ANSWER = "{prompt}", "{answer}"

_PARAPHRASE = """\
Rewrite the message below {how}. It must ask for exactly the same thing: keep every name, number \
and condition, and do not answer it. Reply with the rewritten message only.

Message: {{prompt}}"""
PARAPHRASES = tuple(
    _PARAPHRASE.format(how=how)
    for how in (
        "in other words",
        "as short as possible, in other words",
        "in everyday language, as if to a friend",
        "politely, in a complete sentence",
    )
)
"""Templates of the requests for a paraphrase: the first is used for one paraphrase of a row, the
first two for two, and so on."""
INVERSION = """\
The text below is the answer to a message. Write the message that it answers. The message must \
name what the answer is about, and must not contain the answer. Reply with the message only.

Answer: {answer}"""
"""Template of the request for a question."""


def augmentation(
    data: FineTuneData, path: str, model: SourceInput
) -> tuple[list[Draft], dict[str, Input]]:
    """Return the stage that augments the data, and the input with which the stage `prepare` reads
    its rows; both are empty if the manifest does not ask for it. `path`: the data's field."""
    augment = data.augment
    if augment is None:
        return [], {}
    judge, runtime = judge_input(augment.by, f"{path}.augment.by")
    originals = data_inputs(data.model_copy(update={"replay": None, "validation": None}), path)
    for role in ("documents", "toxicity"):  # of the stage `prepare` alone
        originals.pop(role, None)
    inputs = {"model": model, **originals, **judge}
    own = len(data.train) + len(data.replay.data if data.replay else [])
    rows = StageInput(stage="augment", file=ROWS, path=f"{path}.augment")
    return [Draft("augment", _settings(data, augment), inputs, runtime)], {f"train.{own}": rows}


def _settings(data: FineTuneData, augment: Augment) -> AugmentSettings:
    paraphrase, inversion = augment.paraphrase, augment.inversion
    return AugmentSettings(
        kind="rewrite" if runs_a_model(augment) else "augment",
        train=[each.model_copy(update={"weight": 1.0}) for each in dataset_settings(data.train)],
        on_invalid_row=data.on_invalid_row,
        clean=_rules_of_rows(data),
        documents=data.retrieval is not None,
        chat_template=data.chat_template,
        judge=judge_settings(augment.by),
        paraphrase=ParaphraseSettings(
            requests=list(paraphrase.requests or PARAPHRASES)[: paraphrase.per_row],
            share=paraphrase.share,
        )
        if paraphrase
        else None,
        inversion=InversionSettings(request=inversion.request or INVERSION, share=inversion.share)
        if inversion
        else None,
        templates=augment.templates or [],
        max_new_tokens=augment.max_new_tokens,
        seed=defaults.SAMPLING_SEED,
    )


def _rules_of_rows(data: FineTuneData) -> Clean | None:
    """Return the rules for single rows. The stage `prepare` removes duplicates and toxic rows, and
    what was made of them."""
    rules = text_rules(data)
    if rules is not None:
        rules = rules.model_copy(update={"duplicates": None, "similarity": None})
    return None if rules == Clean() else rules


def runs_a_model(augment: Augment) -> bool:
    """Return whether the job's workers run the model that writes."""
    writes = augment.paraphrase is not None or augment.inversion is not None
    return writes and (augment.by is None or augment.by.endpoint is None)


# ---- faults -----------------------------------------------------------------------------------


def augmentation_faults(data: FineTuneData, path: str, *, shared: bool) -> Iterator[Fault]:
    """Yield the faults of an augmentation. `path`: the data's field. `shared`: whether the workers
    share the model."""
    augment = data.augment
    if augment is None:
        return
    path = f"{path}.augment"
    if all(dataset.format == "text" for dataset in data.train):
        yield Fault(
            path,
            "rewrites questions, and all data sets of train have the format text, which has none: "
            "remove augment, or set the format of the rows",
        )
    if shared and runs_a_model(augment):
        yield Fault(
            f"{path}.by",
            "needs a whole model on each worker, and compute.sharding is fsdp: set by.endpoint, or "
            "remove sharding",
        )
    yield from _request_faults(augment, path)
    yield from _template_faults(augment.templates or [], f"{path}.templates")


def _request_faults(augment: Augment, path: str) -> Iterator[Fault]:
    """Yield the faults of the requests to the model."""
    if augment.paraphrase:
        requests = augment.paraphrase.requests or PARAPHRASES
        for index, request in enumerate(requests):
            if PROMPT not in request:
                yield Fault(
                    f"{path}.paraphrase.requests[{index}]",
                    f"does not contain {PROMPT}, where the question is inserted: add it",
                )
        wanted = augment.paraphrase.per_row
        if wanted > len(requests):
            remedy = "add requests" if augment.paraphrase.requests else "set requests"
            yield Fault(
                f"{path}.paraphrase.perRow",
                f"{wanted} paraphrases of a row need as many requests, and there are "
                f"{len(requests)}: {remedy}, or lower perRow",
            )
    inversion = augment.inversion
    if inversion and inversion.request and ANSWER not in inversion.request:
        yield Fault(
            f"{path}.inversion.request",
            f"does not contain {ANSWER}, where the answer is inserted: add it",
        )


def _template_faults(templates: Sequence[str], path: str) -> Iterator[Fault]:
    """Yield the faults of templates for questions."""
    for index, template in enumerate(templates):
        where, count = f"{path}[{index}]", template.count(PROMPT)
        if count != 1:
            yield Fault(
                where,
                f"must contain {PROMPT}, where the question is inserted, once, and contains it "
                f"{count} times",
            )
        elif template.strip() == PROMPT:
            yield Fault(where, "is the question alone, which changes nothing: add words around it")
        elif template in templates[:index]:
            first = templates.index(template)
            yield Fault(where, f"is the same as templates[{first}]: remove one of them")
