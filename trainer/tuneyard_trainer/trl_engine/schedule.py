"""The learning rate of a trainer: the course's, from the step at which the attempt begins."""

from __future__ import annotations

from torch.optim.lr_scheduler import LambdaLR

from tuneyard_trainer.training.course import Course


def scheduler(course: Course, first_step: int) -> LambdaLR:
    """Return a scheduler whose first step is `first_step` of the course."""
    peak = course.settings.learning_rate

    def factor(step: int) -> float:
        return course.learning_rate(min(first_step + step, course.total - 1)) / peak

    return LambdaLR(course.optimizer, factor)
