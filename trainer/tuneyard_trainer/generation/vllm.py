"""vLLM in the worker's process, on the worker's device: it samples and evaluates.

The engine is built from the model's configuration alone. Each call first copies the model's
present weights into the engine, layer by layer and with the adapter merged into the copies.
Nothing is read from disk or written to it. The engine returns the log-probability of each token. An
engine whose log-probabilities differ from the model's is refused: by `rollouts` in training, and by
`VllmEngine` in an evaluation.

A sampled completion depends only on weights, prompt and key here too (vLLM seeds a generator for
each request), but the same key gives another completion than with transformers.
"""

from __future__ import annotations

import gc
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tuneyard.api.alignment import Sampling
from tuneyard.errors import StageError
from tuneyard_trainer import extras
from tuneyard_trainer.data.sharing import SharedStage
from tuneyard_trainer.generation.batches import own_stop_tokens
from tuneyard_trainer.generation.sampling import (
    MAX_SAMPLER_LOGPROB_GAP,
    Sampled,
    batch_size,
    cache_bytes,
    cache_bytes_per_token,
)
from tuneyard_trainer.models import adapters
from tuneyard_trainer.models.files import context_length, first_line
from tuneyard_trainer.models.probes import base_of, probing

BLOCK = 128
"""Tokens in a block of vLLM's cache on CPU (16 on GPU). A sequence takes whole blocks."""
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the weights are in this process
    "VLLM_NO_USAGE_STATS": "1",  # sends no usage statistics
    "VLLM_LOGGING_LEVEL": "ERROR",
}
PATH = "evaluate.engine"
"""The manifest's field that lets vLLM evaluate."""
CHECKED_PROMPTS, CHECKED_TOKENS = 4, 16
"""The shortest prompts of an evaluation's call, and the new tokens of each, whose log-probabilities
are compared with the model's."""


@dataclass
class ModelCopy:
    """A vLLM engine with a copy of one model."""

    model: nn.Module
    """A plain model, or one with an adapter that can be merged, or that is off. Its weights may
    change between calls."""
    llm: Any
    """A `vllm.LLM`."""
    longest: int
    """The most tokens of a prompt with its completion."""
    untied: bool
    """Whether the engine keeps an output head apart from the embeddings, even if the model ties
    them."""

    @classmethod
    def of(
        cls,
        model: nn.Module,
        *,
        precision: torch.dtype,
        longest: int,
        workers: int,
        prefix_caching: bool | None,
        path: str,
    ) -> ModelCopy:
        """Return a new engine.

        `workers`: the number of processes that build engines together. `prefix_caching`: whether
        the tokens that prompts of a call begin with are computed once. None: where vLLM can do so
        for the model. `path`: the manifest's field that asks for vLLM. Raises StageError
        MissingExtra or EngineUnsupported.
        """
        extras.require_vllm(path)
        base = base_of(model)
        device = next(base.parameters()).device
        whole = -(-longest // BLOCK) * BLOCK
        rows, per_token = batch_size(base, whole, device), cache_bytes_per_token(base, device)
        cache = rows * whole * per_token if per_token else cache_bytes(device)
        untied = device.type == "cpu"  # on CPU vLLM never updates a tied head
        config = base.config.__class__.from_dict(base.config.to_dict())
        config.architectures = [type(base).__name__]
        if untied:
            config.tie_word_embeddings = False
        os.environ.update(_ENVIRONMENT)
        with tempfile.TemporaryDirectory() as folder, _named_errors(base, path):
            config.save_pretrained(folder)
            from vllm import LLM

            engine = LLM(
                model=folder,
                load_format="dummy",  # the weights come with the first call
                skip_tokenizer_init=True,
                generation_config="vllm",  # not the model's own settings
                dtype=str(precision).removeprefix("torch."),
                seed=0,
                max_model_len=longest,
                max_num_seqs=rows,
                kv_cache_memory_bytes=cache,
                gpu_memory_utilization=0.01,  # training needs the rest; `cache` is apart from it
                enable_prefix_caching=prefix_caching,
                enforce_eager=device.type == "cpu",
                logprobs_mode="processed_logprobs",
                distributed_executor_backend="external_launcher" if workers > 1 else "uni",
            )
        # The finalizer would destroy the workers' process group when the engine is deleted.
        engine.llm_engine.engine_core._finalizer.detach()
        return cls(model, engine, longest, untied)

    def copy_weights(self) -> None:
        """Give the engine the model's present weights."""
        weights = adapters.merged_weights(self.model, with_tied=self.untied)
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        self.llm.reset_prefix_cache()  # it is of other weights

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        keys: Sequence[int],
        settings: Sampling,
        stop: Sequence[int],
    ) -> list[Sampled]:
        """Return one sampled completion of each prompt. `keys`: a seed for each of them."""
        each = [
            {"temperature": settings.temperature, "top_p": settings.top_p, "seed": key}
            for key in keys
        ]
        return self._generate(prompts, each, settings.max_new_tokens, stop)

    def complete(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: Sequence[int]
    ) -> list[Sampled]:
        """Return the greedy completion of each prompt."""
        return self._generate(prompts, [{"temperature": 0.0}] * len(prompts), max_new_tokens, stop)

    def _generate(
        self,
        prompts: Sequence[Sequence[int]],
        settings: Sequence[dict[str, Any]],
        max_new_tokens: int,
        stop: Sequence[int],
    ) -> list[Sampled]:
        from vllm import SamplingParams

        parameters = [
            SamplingParams(
                **each,
                max_tokens=max_new_tokens,
                stop_token_ids=list(stop),
                ignore_eos=True,  # `stop` has it already
                detokenize=False,
                logprobs=0,  # of the chosen token only
            )
            for each in settings
        ]
        requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        results = self.llm.generate(requests, parameters, use_tqdm=False)
        return [_sampled(result.outputs[0]) for result in results]

    def close(self) -> None:
        """Free the engine's weights and cache."""
        self.llm.collective_rpc("shutdown")
        self.llm = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@dataclass(frozen=True)
class VllmSampler:
    """A sampler on a vLLM engine."""

    copy: ModelCopy
    stop: tuple[int, ...]
    """The tokens that end a completion."""
    settings: Sampling

    @classmethod
    def of(
        cls,
        model: nn.Module,
        stop: tuple[int, ...],
        settings: Sampling,
        *,
        precision: torch.dtype,
        longest: int,
        workers: int,
    ) -> VllmSampler:
        """Return a sampler with a new engine. The parameters and the errors are those of
        `ModelCopy.of`."""
        copy = ModelCopy.of(
            model,
            precision=precision,
            longest=longest,
            workers=workers,
            prefix_caching=False,  # the prompts of training are distinct but for their groups
            path="sampling.engine",
        )
        return cls(copy, stop, settings)

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        keys: Sequence[int],
        before_batch: Callable[[], None] = lambda: None,
    ) -> list[Sampled]:
        before_batch()  # all prompts are one batch of the engine
        self.copy.copy_weights()
        return self.copy.sample(prompts, keys, self.settings, self.stop)

    def close(self) -> None:
        """Free the engine's weights and cache."""
        self.copy.close()


# ---- evaluations --------------------------------------------------------------------------------


@dataclass
class VllmEngine:
    """vLLM behind the interface of an evaluation's engine, for one model. It is built for the first
    prompts, and once more for longer ones."""

    model: nn.Module
    """As of `ModelCopy`."""
    shared: SharedStage
    """The workers, each of which has the whole model and an engine of its own."""
    _copy: ModelCopy | None = field(default=None, init=False)

    def prepare(self, longest: int) -> None:
        """Build an engine for prompts that have up to `longest` tokens with their completions,
        unless there is one. All workers call it. Raises StageError MissingExtra and
        EngineUnsupported."""
        base, worker = base_of(self.model), self.shared.worker
        context = context_length(base.config)
        longest = longest if context is None else min(longest, context)
        if self._copy and self._copy.longest >= longest:
            return
        self.close()
        worker.report(message="starting vLLM")
        with self.shared.in_step():  # the engines are built together
            self._copy = ModelCopy.of(
                self.model,
                precision=next(base.parameters()).dtype,
                longest=longest,
                workers=worker.world_size,
                prefix_caching=None,
                path=PATH,
            )

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        before_batch: Callable[[], None],
    ) -> list[tuple[int, ...]]:
        """Return the greedy completion of each prompt, up to and with a stop token of the model. It
        ends at the end of the model's context at the latest. Raises StageError EngineUnsupported
        for a prompt that fills the context, and SamplerMismatch."""
        if not prompts:
            return []
        stop = own_stop_tokens(self.model)
        found = self._checked(prompts, before_batch).complete(prompts, max_new_tokens, stop)
        return [completion.tokens for completion in found]

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        keys: Sequence[int],
        *,
        stop: tuple[int, ...],
        settings: Sampling,
        before_batch: Callable[[], None],
    ) -> list[tuple[int, ...]]:
        """Return one sampled completion of each prompt, as `complete` does. `keys`: a seed for each
        of them. `stop`: the tokens that end it."""
        if not prompts:
            return []
        found = self._checked(prompts, before_batch).sample(prompts, keys, settings, stop)
        return [completion.tokens for completion in found]

    def close(self) -> None:
        """Free the memory of the engine, if there is one."""
        if self._copy:
            self._copy.close()
        self._copy = None

    def _checked(
        self, prompts: Sequence[Sequence[int]], before_batch: Callable[[], None]
    ) -> ModelCopy:
        """Return the engine with the model's present weights, once it is known to run the model."""
        if self._copy is None:
            raise RuntimeError("no engine: prepare was not called")
        before_batch()  # all prompts are one batch of the engine
        for length in {*map(len, prompts)}:
            if not 0 < length < self._copy.longest:
                raise StageError(
                    "EngineUnsupported",
                    f"vLLM cannot answer a prompt of {length} tokens: the model's context leaves "
                    f"room for prompts of 1 to {self._copy.longest - 1}.",
                    advice=f"Change the prompt, or remove {PATH} to answer with transformers.",
                )
        self._copy.copy_weights()
        shortest = sorted(prompts, key=len)[:CHECKED_PROMPTS]
        found = self._copy.complete(shortest, CHECKED_TOKENS, ())
        gap = _logprob_gap(self.model, shortest, found)
        if not gap <= MAX_SAMPLER_LOGPROB_GAP:
            raise StageError(
                "SamplerMismatch",
                f"the log-probabilities that vLLM gives to the tokens of its answers differ from "
                f"the model's by {gap:.2f} nats on average, above {MAX_SAMPLER_LOGPROB_GAP:.2f}: "
                "it does not run the model that is measured.",
                advice=f"Remove {PATH} to answer with transformers.",
            )
        return self._copy


def _logprob_gap(
    model: Any, prompts: Sequence[Sequence[int]], completions: Sequence[Sampled]
) -> float:
    """Return the mean distance between the engine's log-probabilities of the completions' tokens
    and the model's, in nats. 0: there are no tokens."""
    device = next(model.parameters()).device
    gaps = []
    for prompt, completion in zip(prompts, completions, strict=True):
        row = torch.tensor([[*prompt, *completion.tokens]], device=device)
        with probing(model):
            logits_TV = model(input_ids=row).logits[0, len(prompt) - 1 : -1].float()
        chosen_T1 = torch.tensor(completion.tokens, device=device)[:, None]
        own_T = logits_TV.log_softmax(-1).gather(-1, chosen_T1)[:, 0]
        gaps.append((own_T - torch.tensor(completion.logprobs, device=device)).abs())
    return float(torch.cat(gaps).mean()) if gaps else 0.0


def _sampled(output: Any) -> Sampled:
    tokens = tuple(output.token_ids)
    steps = zip(tokens, output.logprobs, strict=True)
    return Sampled(tokens, tuple(float(step[token].logprob) for token, step in steps))


@contextmanager
def _named_errors(model: nn.Module, path: str) -> Iterator[None]:
    """Convert the errors of vLLM to StageError EngineUnsupported, except memory errors."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except torch.OutOfMemoryError:
        raise  # the runner reports these for every stage
    except Exception as error:  # pydantic's, RuntimeError, ImportError of its CUDA libraries, ...
        raise StageError(
            "EngineUnsupported",
            f"vLLM cannot run {type(model).__name__} here: {first_line(error)}.",
            advice=f"Remove {path} to use transformers.",
        ) from error
