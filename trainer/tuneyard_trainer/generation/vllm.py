"""vLLM behind the sampler's interface: in the worker's process, on the worker's device.

The engine is built from the policy's configuration alone. Each call first copies the policy's
present weights into the engine, layer by layer and with the adapter merged into the copies.
Nothing is read from disk or written to it. The engine returns the log-probability of each token,
and `rollouts` refuses an engine whose log-probabilities differ from the policy's.

A completion depends only on weights, prompt and key here too (vLLM seeds a generator for each
request), but the same key gives another completion than with transformers.
"""

from __future__ import annotations

import gc
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tuneyard.api.alignment import Sampling
from tuneyard.errors import StageError
from tuneyard_trainer import extras
from tuneyard_trainer.generation.sampling import (
    Sampled,
    batch_size,
    cache_bytes,
    cache_bytes_per_token,
)
from tuneyard_trainer.models import adapters
from tuneyard_trainer.models.files import first_line
from tuneyard_trainer.models.probes import base_of

BLOCK = 128
"""Tokens in a block of vLLM's cache on CPU (16 on GPU). A sequence takes whole blocks."""
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the weights are in this process
    "VLLM_NO_USAGE_STATS": "1",  # sends no usage statistics
    "VLLM_LOGGING_LEVEL": "ERROR",
}


@dataclass
class VllmSampler:
    """A vLLM engine for one policy."""

    model: nn.Module
    """A plain model, or one with an adapter that can be merged. Its weights may change between
    calls."""
    engine: Any
    """A `vllm.LLM`."""
    stop: tuple[int, ...]
    """The tokens that end a completion."""
    settings: Sampling
    untied: bool
    """Whether the engine keeps an output head apart from the embeddings, even if the model ties
    them."""

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
        """Return a sampler with a new engine.

        `longest`: the most tokens of a prompt with its completion. `workers`: the number of
        processes that build engines together. Raises StageError MissingExtra or
        EngineUnsupported.
        """
        extras.require_vllm()
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
        with tempfile.TemporaryDirectory() as folder, _named_errors(base):
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
                enable_prefix_caching=False,  # weights change between calls
                enforce_eager=device.type == "cpu",
                logprobs_mode="processed_logprobs",
                distributed_executor_backend="external_launcher" if workers > 1 else "uni",
            )
        # The finalizer would destroy the workers' process group when the engine is deleted.
        engine.llm_engine.engine_core._finalizer.detach()
        return cls(model, engine, stop, settings, untied)

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        keys: Sequence[int],
        before_batch: Callable[[], None] = lambda: None,
    ) -> list[Sampled]:
        from vllm import SamplingParams

        before_batch()  # all prompts are one batch of the engine
        weights = adapters.merged_weights(self.model, with_tied=self.untied)
        self.engine.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        parameters = [
            SamplingParams(
                temperature=self.settings.temperature,
                top_p=self.settings.top_p,
                max_tokens=self.settings.max_new_tokens,
                seed=key,
                stop_token_ids=list(self.stop),
                ignore_eos=True,  # `stop` has it already
                detokenize=False,
                logprobs=0,  # of the sampled token only
            )
            for key in keys
        ]
        requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        results = self.engine.generate(requests, parameters, use_tqdm=False)
        return [_sampled(result.outputs[0]) for result in results]

    def close(self) -> None:
        """Free the engine's weights and cache."""
        self.engine.collective_rpc("shutdown")
        self.engine = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _sampled(output: Any) -> Sampled:
    tokens = tuple(output.token_ids)
    steps = zip(tokens, output.logprobs, strict=True)
    return Sampled(tokens, tuple(float(step[token].logprob) for token, step in steps))


@contextmanager
def _named_errors(model: nn.Module) -> Iterator[None]:
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
            advice="Remove sampling.engine to sample with transformers.",
        ) from error
