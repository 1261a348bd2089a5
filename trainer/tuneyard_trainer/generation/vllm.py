"""vLLM behind the sampler's interface: in the worker's process, on the worker's device.

The engine is built from the policy's configuration alone. Before each call it is given the policy's
present weights, layer by layer and an adapter worked into copies, so what it answers with is what
was trained, and nothing is read or written on disk. It says how probable its own tokens were to it;
`rollouts` compares that with the policy and refuses an engine that is another model.

An answer is a function of weights, prompt and key here too (vLLM seeds a generator for each
request), though not the one that transformers gives.
"""

from __future__ import annotations

import gc
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tuneyard.api.alignment import Sampling
from tuneyard.errors import StageError
from tuneyard_trainer import extras
from tuneyard_trainer.generation.sampling import Sampled, at_once, cache_room, token_bytes
from tuneyard_trainer.models import adapters
from tuneyard_trainer.models.files import first_line
from tuneyard_trainer.models.probes import base_of

BLOCK = 128
"""Tokens by which vLLM hands out its cache on CPU (16 on GPU): a sequence takes whole blocks."""
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process, where the weights are
    "VLLM_NO_USAGE_STATS": "1",  # nothing is sent to anybody
    "VLLM_LOGGING_LEVEL": "ERROR",
}


@dataclass
class VllmSampler:
    """One engine over one policy."""

    model: nn.Module
    """A plain model, or one with an adapter that can be merged; its weights may change between
    calls."""
    engine: Any
    """A `vllm.LLM`."""
    stop: tuple[int, ...]
    """The tokens that end an answer."""
    settings: Sampling
    untied: bool
    """The engine keeps a head of its own where the model's is its embeddings."""

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
        """Builds the engine. `longest`: the most tokens of a prompt and its answer. `workers`: how
        many processes build theirs with this one. Raises StageError."""
        extras.require_vllm()
        base = base_of(model)
        device = next(base.parameters()).device
        whole = -(-longest // BLOCK) * BLOCK
        rows, kept = at_once(base, whole, device), token_bytes(base, device)
        untied = device.type == "cpu"  # on CPU vLLM packs a head once, and a tied one never again
        config = base.config.__class__.from_dict(base.config.to_dict())
        config.architectures = [type(base).__name__]
        if untied:
            config.tie_word_embeddings = False
        os.environ.update(_ENVIRONMENT)
        with tempfile.TemporaryDirectory() as folder, _explained(base):
            config.save_pretrained(folder)
            from vllm import LLM

            engine = LLM(
                model=folder,
                load_format="dummy",  # the weights come with the first call
                skip_tokenizer_init=True,
                generation_config="vllm",  # none of the model's own penalties
                dtype=str(precision).removeprefix("torch."),
                seed=0,
                max_model_len=longest,
                max_num_seqs=rows,
                kv_cache_memory_bytes=rows * whole * kept if kept else cache_room(device),
                gpu_memory_utilization=0.01,  # the rest is training's; the cache's size is above
                enable_prefix_caching=False,  # prompts of an update differ, and weights change
                enforce_eager=device.type == "cpu",
                logprobs_mode="processed_logprobs",
                distributed_executor_backend="external_launcher" if workers > 1 else "uni",
            )
        # It would take the workers' process group down with it when it is dropped.
        engine.llm_engine.engine_core._finalizer.detach()
        return cls(model, engine, stop, settings, untied)

    def __call__(self, prompts: Sequence[Sequence[int]], keys: Sequence[int]) -> list[Sampled]:
        from vllm import SamplingParams

        weights = adapters.merged_weights(self.model, with_tied=self.untied)
        self.engine.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        each = [
            SamplingParams(
                temperature=self.settings.temperature,
                top_p=self.settings.top_p,
                max_tokens=self.settings.max_new_tokens,
                seed=key,
                stop_token_ids=list(self.stop),
                ignore_eos=True,  # it is among `stop` already
                detokenize=False,
                logprobs=0,  # of the token that was drawn, and no other
            )
            for key in keys
        ]
        asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        answered = self.engine.generate(asked, each, use_tqdm=False)
        return [_sampled(request.outputs[0]) for request in answered]

    def close(self) -> None:
        """The engine's weights and cache."""
        self.engine.collective_rpc("shutdown")
        self.engine = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _sampled(answer: Any) -> Sampled:
    tokens = tuple(answer.token_ids)
    each = zip(tokens, answer.logprobs, strict=True)
    return Sampled(tokens, tuple(float(known[token].logprob) for token, known in each))


@contextmanager
def _explained(model: nn.Module) -> Iterator[None]:
    """One message for whatever vLLM says when it cannot run a model."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except torch.OutOfMemoryError:
        raise  # named where all of them are
    except Exception as error:  # pydantic's, RuntimeError, ImportError of its CUDA libraries, ...
        raise StageError(
            "EngineUnsupported",
            f"vLLM cannot run {type(model).__name__} here: {first_line(error)}.",
            advice="Remove sampling.engine: transformers samples then.",
        ) from error
