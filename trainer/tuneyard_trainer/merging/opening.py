"""Open the models of a merge, and refuse those that do not fit together, all faults at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tuneyard.api.merging import MergePart
from tuneyard.errors import StageError
from tuneyard_trainer.merging.rows import arrange, union
from tuneyard_trainer.merging.sources import Source, WholeModel, open_source
from tuneyard_trainer.models import adapters, base
from tuneyard_trainer.models.files import config_of, stored_dtype
from tuneyard_trainer.models.weight_files import TensorSpec, stored_tensors

SHOWN = 3
"""Names that a message shows."""


@dataclass(frozen=True)
class Named:
    """A model of a merge in a folder."""

    label: str
    """In messages: the field and its value."""
    key: str
    """The name by which chance tells the models of a merge apart: not the folder, which differs
    from machine to machine."""
    folder: Path
    """A whole model, or an adapter of the base."""
    part: MergePart

    @property
    def is_adapter(self) -> bool:
        """Whether the folder holds an adapter."""
        return adapters.is_adapter(self.folder)


@dataclass(frozen=True)
class Opened:
    """The models of a merge, which fit together."""

    base: Source
    models: Sequence[tuple[Source, MergePart]]
    specs: Mapping[str, TensorSpec]
    """The tensors of the result: those of the base in the base's type."""
    skeleton: PreTrainedModel
    """The base without memory, with the result's size of vocabulary."""
    tokenizer: PreTrainedTokenizerBase
    """The result's."""


def open_models(base_folder: Path, models: Sequence[Named], *, with_union: bool) -> Opened:
    """Open the base and the models. `with_union`: the result also has the tokens that models have
    added to the base's.

    Raises StageError NotMergeable with everything that does not fit, or an error of a model.
    """
    for folder in (base_folder, *(each.folder for each in models if not each.is_adapter)):
        config_of(folder)  # a folder that is no model is named before its files are read
    skeleton = base.load_base(base_folder, dtype=stored_dtype(base_folder), device=base.META)
    whole = WholeModel("the base", "", stored_tensors(base_folder))
    rows = _row_names(skeleton) & whole.specs.keys()
    sources = [_opened(each, base_folder, skeleton, whole) for each in models]
    tokenizer = base.load_tokenizer(base_folder)
    tokenizers = [
        tokenizer if each.is_adapter else base.load_tokenizer(each.folder) for each in models
    ]
    faults = [
        f"{named.label}: {fault}"
        for named, source, own in zip(models, sources, tokenizers, strict=True)
        for fault in (
            *_other_architecture(skeleton, named),
            *_other_tensors(whole, source, rows),
            *(_other_tokens(tokenizer, own) if own is not tokenizer else ()),
        )
    ]
    if faults:
        raise StageError(
            "NotMergeable",
            f"the models cannot be merged: {'; '.join(faults)}.",
            advice="Name models that were tuned from the base, or take these out of the merge.",
        )
    vocabulary = tokenizer.get_vocab()
    vocabularies = [vocabulary if own is tokenizer else own.get_vocab() for own in tokenizers]
    ids = union(vocabulary, vocabularies if with_union else [])
    in_base, in_models = arrange(whole, vocabulary, sources, vocabularies, rows, ids)
    if with_union:
        _add_tokens(tokenizer, tokenizers, ids)
    skeleton.config.get_text_config().vocab_size = len(in_base.places)
    return Opened(
        in_base,
        [(source, each.part) for source, each in zip(in_models, models, strict=True)],
        in_base.specs,
        skeleton,
        tokenizer,
    )


def _opened(
    named: Named, base_folder: Path, skeleton: PreTrainedModel, whole: WholeModel
) -> Source:
    """Open a model. The head of one that ties it to its embeddings is read from these, if the
    base's is a tensor of its own."""
    source = open_source(named.folder, base_folder, named.label, named.key)
    if not isinstance(source, WholeModel):
        return source
    embeddings, head = _names(skeleton)
    tied = config_of(named.folder).get_text_config().tie_word_embeddings
    if tied and head in whole.tensors and head not in source.tensors:
        tensors = {**source.tensors, head: source.tensors[embeddings]}
        return WholeModel(source.label, source.key, tensors)
    return source


def _names(skeleton: PreTrainedModel) -> tuple[str, str]:
    """Return the names of the weights of the embeddings and of the head."""
    wanted = (skeleton.get_input_embeddings(), skeleton.get_output_embeddings())
    names = {id(module): f"{name}.weight" for name, module in skeleton.named_modules()}
    embeddings, head = (names[id(module)] for module in wanted)
    return embeddings, head


def _row_names(skeleton: PreTrainedModel) -> frozenset[str]:
    return frozenset(_names(skeleton))


# ---- faults -------------------------------------------------------------------------------------


def _other_architecture(skeleton: PreTrainedModel, named: Named) -> Iterator[str]:
    if named.is_adapter:
        return
    expected, found = skeleton.config, config_of(named.folder)
    if found.model_type != expected.model_type:
        yield f"it is a {found.model_type} model, and the base a {expected.model_type} model"


def _other_tensors(whole: Source, source: Source, rows: frozenset[str]) -> Iterator[str]:
    expected, found = whole.specs, source.specs
    if missing := sorted(expected.keys() - found.keys()):
        yield f"it lacks {_some(missing)}, which the base has"
    if extra := sorted(found.keys() - expected.keys()):
        yield f"it has {_some(extra)}, which the base lacks"
    differing = [
        f"{name} {_shape(found[name], name in rows)}, not {_shape(expected[name], name in rows)}"
        for name in sorted(expected.keys() & found.keys())
        if _shape(found[name], name in rows) != _shape(expected[name], name in rows)
    ]
    if differing:
        yield f"it has other shapes: {_some(differing)}"


def _shape(spec: TensorSpec, has_tokens: bool) -> tuple[int, ...]:
    """Return a shape without the number of tokens, which may differ."""
    return spec.shape[1:] if has_tokens else spec.shape


def _other_tokens(
    tokenizer: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase
) -> Iterator[str]:
    """Yield the tokens of one tokenizer alone, unless they were added to its vocabulary: a text is
    cut into other tokens then, and no row of one model has the meaning of one of the other."""
    vocabularies = [
        each.get_vocab().keys() - each.get_added_vocab().keys() for each in (tokenizer, own)
    ]
    if vocabularies[0] != vocabularies[1]:
        odd = sorted(vocabularies[0] ^ vocabularies[1])
        shown = _some([repr(token) for token in odd])
        yield f"its tokenizer is another one: one of them alone has {shown}"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _add_tokens(
    tokenizer: PreTrainedTokenizerBase,
    others: Sequence[PreTrainedTokenizerBase],
    ids: Mapping[str, int],
) -> None:
    """Add the tokens of a union to the base's tokenizer, as the models have them."""
    tokens: dict[str, Any] = {}
    for other in others:
        for token in other.added_tokens_decoder.values():
            tokens.setdefault(token.content, token)
    known = tokenizer.get_vocab()
    for text in sorted(ids.keys() - known.keys(), key=ids.__getitem__):
        tokenizer.add_tokens(tokens[text], special_tokens=tokens[text].special)
    found = tokenizer.get_vocab()
    if found != dict(ids):
        odd = _some([repr(token) for token in sorted(ids) if found.get(token) != ids[token]])
        raise StageError(
            "NotMergeable",
            f"the base's tokenizer cannot take the tokens of the other models: {odd}.",
            advice="Merge with the tokens of the base alone: tokenizer base.",
        )
