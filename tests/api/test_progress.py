"""Posts that a status could not hold are refused."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from tests.controller.scene import post
from tuneyard.api.progress import Post


@pytest.mark.parametrize("field", ["step", "totalSteps", "resumedStep"])
def test_a_count_that_does_not_fit_into_64_bits_is_refused(field: str) -> None:
    """The API server would refuse the status, and the job could not even be canceled."""
    most = (1 << 63) - 1
    assert Post.model_validate(post(1) | {"tuneyard": {"attempt": 1, field: most}})
    with pytest.raises(ValidationError):
        Post.model_validate(post(1) | {"tuneyard": {"attempt": 1, field: most + 1}})


def test_a_time_that_does_not_fit_into_64_bits_is_refused() -> None:
    with pytest.raises(ValidationError):
        Post.model_validate({"trainerStatus": {"estimatedRemainingSeconds": 1 << 63}})
