"""Reward models by TRL's RewardTrainer: the Bradley-Terry likelihood of pairs.

Shapes: P pairs of a micro-batch, L their width in tokens; 2: the chosen and the rejected rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, PrinterCallback
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import RewardTrainer

from tuneyard.api.stage_settings import RewardSettings
from tuneyard.errors import StageError
from tuneyard_trainer.models.base import load_tokenizer
from tuneyard_trainer.models.policies import WEIGHTS
from tuneyard_trainer.preference import reward_model
from tuneyard_trainer.preference.dataset import Comparisons, Preferences
from tuneyard_trainer.preference.ranked import Ranked
from tuneyard_trainer.training.batches import Indices, Order
from tuneyard_trainer.training.course import Course
from tuneyard_trainer.trl_engine import arguments as engine
from tuneyard_trainer.trl_engine.batches import EMPTY, Inputs, Layout, StepBatches, padded
from tuneyard_trainer.trl_engine.schedule import scheduler
from tuneyard_trainer.trl_engine.sums import StepSums, SummingFollowing
from tuneyard_trainer.worker import StageContext, StageOutcome

FILLED, FACTOR, CONSTANT = "filled", "factor", "constant"


class _Trainer(RewardTrainer):
    """RewardTrainer on micro-batches that are made elsewhere, each with its share of the mean."""

    def __init__(self, batches: StepBatches, sums: StepSums, **arguments: Any) -> None:
        self._batches, self._sums = batches, sums
        super().__init__(**arguments)

    def get_train_dataloader(self) -> DataLoader[Inputs]:
        return self._batches.loader()

    def compute_loss(self, model: nn.Module, inputs: Inputs, *args: Any, **kwargs: Any) -> Tensor:
        filled_P, factor, constant = (inputs.pop(name) for name in (FILLED, FACTOR, CONSTANT))

        def scored(**given: Any) -> Any:
            given.pop("margin", None)  # the loss reads it, and not every model ignores it
            outputs = model(**given)
            filled_2P = filled_P.repeat(2)[:, None]
            outputs.logits = torch.where(filled_2P, outputs.logits, 0.0)
            chosen_P, rejected_P = outputs.logits.detach()[:, 0].chunk(2)
            self._sums.add((chosen_P > rejected_P).float().sum()[None])
            return outputs

        loss: Tensor = super().compute_loss(scored, inputs, *args, **kwargs)
        return loss * factor - constant


def run(context: StageContext) -> StageOutcome:
    """Train, and write `weights/` (a whole sequence classifier), `tokenizer/` and `metrics.jsonl`.

    Raises StageError WrongPreferences, and RewardMismatch if the written model differs from the
    trained one.
    """
    settings, worker = context.settings(RewardSettings), context.worker
    training, data = settings.training, Preferences.open(context.inputs["data"])
    require_pairs(data)
    tokenizer = load_tokenizer(context.inputs["data"] / "tokenizer")
    folder = reward_model.start(context)
    model, forward = reward_model.load(context, settings, folder, data, tokenizer)
    _require_last_tokens(data, forward.pad, tokenizer)
    measure = Ranked(model, data, forward, worker, training.seed, settings)
    order = Order.of(data.train.source, data.weights, training.batch_size, training.seed)
    course = Course(context, training, measure, order, model)
    state = course.begin()
    longest = 2 * int(data.train.longest[order.rows].max())
    layout = Layout.of(order, longest, forward.max_tokens, worker.world_size)
    collator = Collator(data.train, layout, worker.world_size, forward.pad, settings.margin)
    batches = StepBatches(
        data.train.longest,
        collator,
        order,
        layout,
        worker,
        first_step=state.step,
        total=course.total,
    )
    following = SummingFollowing(StepSums(("accuracy",), worker), course, state, batches)
    if state.step < course.total and not course.should_stop_early(state):
        with engine.training(following, worker.device):
            trainer(context, settings, batches, layout, following, forward.pad).train()
    state = course.finish(following.state)
    metrics = course.summary(state)
    if worker.is_main:
        metrics |= reward_model.write(context, settings, folder, data, model, forward)
        tokenizer.save_pretrained(context.workdir / "tokenizer")
    reward_model.remove_start(context)
    details = {**course.details(state), "engine": "trl"}
    return StageOutcome(metrics, details, contents=(WEIGHTS, "tokenizer"))


def require_pairs(data: Preferences) -> None:
    """Raise StageError WrongPreferences for rankings and uncertain labels, which TRL does not
    know."""
    if bool((data.train.sizes != 2).any()) or bool((data.train.labels < 1).any()):
        raise StageError(
            "WrongPreferences",
            "TRL's RewardTrainer takes pairs whose order is certain, and the preferences hold "
            "rankings or a judge's probabilities.",
            advice="Set rewardModel.train.training.engine to native.",
        )


def _require_last_tokens(data: Preferences, pad: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise StageError WrongPreferences for a row that ends with padding: a classifier would score
    the token before it."""
    rows = data.train.rows
    wrong = np.flatnonzero(np.asarray(rows.tokens)[np.asarray(rows.offsets)[1:] - 1] == pad)
    if len(wrong):
        raise StageError(
            "WrongPreferences",
            f"TRL's RewardTrainer scores the last token of a row that is not the padding token, "
            f"and training row {wrong[0]} of the prepared ones ends with "
            f"{tokenizer.convert_ids_to_tokens(pad)}.",
            advice="Set rewardModel.train.training.engine to native.",
        )


@dataclass(frozen=True)
class Collator:
    """Makes micro-batches of equally many pairs on all workers, since TRL gathers the scores. Pairs
    without rows fill them: their scores are set to 0, and their constant loss is subtracted."""

    pairs: Comparisons
    layout: Layout
    world_size: int
    pad: int
    """The token that fills rows of unequal length."""
    margin: float

    def __call__(self, pairs: Indices, count: int) -> Inputs:
        """Return the chosen rows and then the rejected ones (2P, L), padded on the right, and what
        makes the trainer's mean of means the mean over the `count` pairs of the global batch."""
        size, share = self.layout.rows, self.layout.share_of_mean(count, self.world_size)
        rows_2P = np.full((2, size), EMPTY, dtype=np.int64)
        rows_2P[:, : len(pairs)] = 2 * pairs + np.array([[0], [1]])  # every group is a pair
        inputs = padded(self.pairs.rows, rows_2P.reshape(-1), self.pad)
        del inputs["completion_mask"]
        filled_P = torch.arange(size) < len(pairs)
        empty = float(F.softplus(torch.tensor(self.margin))) * float((~filled_P).float().mean())
        inputs |= {
            FILLED: filled_P,
            FACTOR: torch.tensor(share),
            CONSTANT: torch.tensor(share * empty),
        }
        return inputs | ({"margin": torch.full((size,), self.margin)} if self.margin else {})


def trainer(
    context: StageContext,
    settings: RewardSettings,
    batches: StepBatches,
    layout: Layout,
    following: SummingFollowing,
    pad: int,
) -> RewardTrainer:
    """Return TRL's trainer of the course's remaining steps."""
    course = following.course
    first = following.state.step
    steps = course.total - first
    arguments = engine.platform_arguments(context, course.settings, layout, steps=steps)
    tokenizer = load_tokenizer(context.inputs["data"] / "tokenizer")
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    arguments |= {
        "max_length": None,
        "disable_dropout": False,
        "center_rewards_coefficient": settings.centering or None,
    }
    one_pair = Dataset.from_dict({"chosen_ids": [[0]], "rejected_ids": [[0]]})
    trained = {parameter: parameter.data for parameter in course.parameters.values()}
    made = _Trainer(
        batches,
        following.sums,
        model=course.model,
        args=RewardConfig(**arguments, **(course.settings.trl or {})),
        train_dataset=one_pair,
        processing_class=tokenizer,
        callbacks=[following],
        optimizers=(course.optimizer, scheduler(course, first)),
    )
    for parameter, tensor in trained.items():  # TRL rounds an adapter over a 4-bit base to bfloat16
        parameter.data = tensor
    made.remove_callback(PrinterCallback)  # the course reports each step
    return made
