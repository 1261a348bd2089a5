"""The rule that reports or removes rows which a classifier calls toxic.

It runs a model, unlike the rules in `cleaning`, and judges the rows that these leave.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tuneyard.api.plan import SourceInput
from tuneyard.api.stage_settings import PrepareSettings, ToxicitySettings
from tuneyard_trainer.data.cleaning.excerpts import EXCERPT
from tuneyard_trainer.data.cleaning.findings import Action, Cleaned, Finding
from tuneyard_trainer.data.cleaning.text import passages
from tuneyard_trainer.models.classifiers import Classifier, Verdict
from tuneyard_trainer.worker import StageContext


@dataclass(frozen=True)
class Toxicity:
    """Judges batches of rows by a classifier."""

    classifier: Classifier
    settings: ToxicitySettings

    @classmethod
    def of(cls, context: StageContext) -> Toxicity | None:
        """Return the rule of a prepare stage. None: the job asks for none. Raises StageError
        ClassifierBroken or UnknownLabel."""
        settings = context.settings(PrepareSettings).toxicity
        if settings is None:
            return None
        source = context.stage.inputs["toxicity"]
        path = source.path if isinstance(source, SourceInput) else ""
        field = path.removesuffix(".classifier.uri") or "spec.data.clean.toxicity"
        context.worker.report(message="loading the classifier of toxicity")
        classifier = Classifier.load(
            context.inputs["toxicity"], settings.labels, context.worker.device, field
        )
        return cls(classifier, settings)

    def __call__(
        self, rows: Sequence[Cleaned], before_batch: Callable[[], None] = lambda: None
    ) -> list[Cleaned]:
        """Return the rows with a finding in each toxic one; rows that were removed are not judged.
        `before_batch`: called before each forward pass."""
        texts = [
            (index, text)
            for index, row in enumerate(rows)
            if row.removed_by is None
            for text in passages(row.example)
        ]
        found = self.classifier.verdicts([text for _, text in texts], before_batch)
        worst: dict[int, tuple[Verdict, str]] = {}
        for (index, text), verdict in zip(texts, found, strict=True):
            if index not in worst or verdict.probability > worst[index][0].probability:
                worst[index] = verdict, text
        return [self._judged(row, worst.get(index)) for index, row in enumerate(rows)]

    def _judged(self, row: Cleaned, worst: tuple[Verdict, str] | None) -> Cleaned:
        if worst is None or worst[0].probability < self.settings.threshold:
            return row
        (label, probability, start, end), text = worst
        action: Action = "removed" if self.settings.treatment == "drop" else "reported"
        end = min(end, start + EXCERPT)
        note = f"{label} {probability:.2f}"
        finding = Finding(f"toxicity.{label}", action, text, start, end, note)
        return row._replace(findings=(*row.findings, finding))
