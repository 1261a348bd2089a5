"""The rules behind `learningRate: auto` and `batchSize: auto`, each with its source.

`docs/defaults.md` holds the same tables; a test compares them.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Method = Literal["sft", "pretrain"]
Tuning = Literal["full", "lora", "qlora", "prefix", "prompt", "ia3", "bottleneck"]

EPOCHS = 3.0
"""Default epochs of fine-tuning, as in Alpaca's 7B run."""

SPLIT_SEED = 0
"""Seed of the held-out split. It is not `training.seed`, so that runs with different seeds are
compared on the same held-out rows and share one prepared data set."""


ALIGNMENT_EPOCHS = 1.0
"""Default epochs over preferences or prompts: a second epoch over preferences overfits a reward
model (Ouyang et al. 2022, arXiv:2203.02155, section C.2)."""

REVISIONS_HELD_OUT = 0.1
"""Share of the revisions that is held out from the fine-tuning on them."""

SAMPLING_SEED = 0
"""Seed of completions that are sampled to be judged, criticized or measured."""


class Rule(NamedTuple):
    """The values of `auto` for one way of tuning."""

    tuning: Tuning
    """`full`, or the adapter's name in the manifest."""
    title: str
    """Name of the way of tuning in messages."""
    methods: tuple[Method, ...]
    """Methods that the rule applies to."""
    learning_rate: float
    """Peak learning rate, with AdamW."""
    batch_size: int
    """Sequences per optimizer step, over all workers."""
    source: str
    """Source of both values."""


_BOTH: tuple[Method, ...] = ("sft", "pretrain")

RULES = (
    Rule(
        "full",
        "full fine-tuning",
        ("sft",),
        2e-5,
        32,
        "Alpaca trains 7B at 2e-5 and 13B at 1e-5, Tulu 3 (arXiv:2411.15124) 8B at 5e-6; the upper "
        "end suits models below 7B. Both use batches of 128 on 52,000 rows and more; 32 gives a "
        "few thousand rows enough steps.",
    ),
    Rule(
        "full",
        "full pre-training",
        ("pretrain",),
        5e-5,
        32,
        "A higher peak adapts better and forgets more (Gupta et al. 2023, arXiv:2308.04014; "
        "Ibrahim et al. 2024, arXiv:2403.08763). 5e-5 lies between fine-tuning's rates and "
        "pre-training's peaks of 1e-4 and more, because the corpus is far smaller.",
    ),
    Rule(
        "lora",
        "LoRA",
        _BOTH,
        2e-4,
        16,
        "Ten times the rate of full fine-tuning, and less tolerant of large batches (Schulman et "
        "al. 2025, LoRA Without Regret); QLoRA's 2e-4 and 16 (arXiv:2305.14314) agree.",
    ),
    Rule(
        "qlora",
        "QLoRA",
        _BOTH,
        2e-4,
        16,
        "The paper's setting for 7B and 13B (Dettmers et al. 2023, arXiv:2305.14314). It halves "
        "the rate from 33B on: set 1e-4 there.",
    ),
    Rule(
        "prefix",
        "prefix tuning",
        _BOTH,
        1e-2,
        16,
        "PEFT's prefix-tuning guide uses 1e-2 with AdamW and batches of 8, the scripts of P-tuning "
        "v2 (arXiv:2110.07602) 5e-3 to 1e-2 with 8 to 32.",
    ),
    Rule(
        "prompt",
        "prompt tuning",
        _BOTH,
        3e-2,
        8,
        "PEFT's prompt-tuning guide: 3e-2 with AdamW and batches of 8. The paper's 0.3 (Lester et "
        "al. 2021, arXiv:2104.08691) is for Adafactor, which scales its steps by the weights.",
    ),
    Rule(
        "ia3",
        "IA³",
        _BOTH,
        3e-3,
        8,
        "The T-Few recipe: 3e-3 and batches of 8 (Liu et al. 2022, arXiv:2205.05638).",
    ),
    Rule(
        "bottleneck",
        "bottleneck adapters",
        _BOTH,
        3e-4,
        32,
        "The authors' example trains adapters at 3e-4 with batches of 32 (Houlsby et al. 2019, "
        "arXiv:1902.00751, sweeping 3e-5 to 3e-3).",
    ),
)


AlignmentMethod = Literal["reward", "dpo", "ppo", "grpo", "rloo", "distill"]


class AlignmentRule(NamedTuple):
    """The values of `auto` for one alignment method."""

    method: AlignmentMethod
    share: float
    """Peak learning rate as a share of that of supervised fine-tuning, for every way of tuning."""
    batch_size: int
    """Sequences per optimizer step, over all workers."""
    source: str
    """Source of both values."""


ALIGNMENT_RULES = (
    AlignmentRule(
        "reward",
        0.5,
        32,
        "InstructGPT trains its reward model at 9e-6 on batches of 64 prompts (arXiv:2203.02155, "
        "C.2), Llama 2 at 1e-5 (arXiv:2307.09288, 3.2.2): half of fine-tuning's 2e-5.",
    ),
    AlignmentRule(
        "dpo",
        0.025,
        32,
        "Zephyr aligns 7B at 5e-7 with batches of 32 (arXiv:2310.16944), its QLoRA recipe at 5e-6, "
        "Tulu 3 8B at 5e-7 (arXiv:2411.15124). For small models and few pairs set more.",
    ),
    AlignmentRule(
        "ppo",
        0.05,
        16,
        "Llama 2 trains its policies at 1e-6 (arXiv:2307.09288, 3.2.3), Tulu 3 at 3e-7. A batch is "
        "a minibatch: a quarter of the default 64 rollouts, as in the PPO paper's and TRL's four.",
    ),
    AlignmentRule(
        "grpo",
        0.05,
        64,
        "DeepSeekMath trains 7B at 1e-6 (arXiv:2402.03300, 4.2). A batch counts completions: 8 "
        "prompts with 8 completions each.",
    ),
    AlignmentRule(
        "rloo",
        0.05,
        64,
        "Ahmadian et al. train at 1e-6 (arXiv:2402.14740, appendix C). A batch counts "
        "completions: 8 prompts with 8 completions each.",
    ),
    AlignmentRule(
        "distill",
        0.5,
        64,
        "Tinker's on-policy recipes distill 8B at 1e-4 with LoRA on 64 prompts and more, NeMo RL "
        "1.7B at 2e-5 as a whole on 64: half of fine-tuning's rates. TRL's default is 1e-6.",
    ),
)


def rule(method: Method, tuning: str) -> Rule:
    """Return the rule of a method and a way of tuning (`full` or an adapter's name)."""
    return next(rule for rule in RULES if rule.tuning == tuning and method in rule.methods)


def alignment_rule(method: AlignmentMethod, tuning: str) -> Rule:
    """Return the rule of an alignment method: a share of the learning rate of fine-tuning."""
    base = rule("sft", tuning)
    alignment = next(rule for rule in ALIGNMENT_RULES if rule.method == method)
    return base._replace(
        title=f"{method} with {base.title}",
        learning_rate=float(f"{base.learning_rate * alignment.share:g}"),
        batch_size=alignment.batch_size,
        source=alignment.source,
    )
