"""Group, version, the base model and the vocabulary of conditions."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.alias_generators import to_camel

GROUP = "tuneyard.io"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"


class Rule(NamedTuple):
    """A CEL validation rule of the generated CRD, written beside the validator it mirrors."""

    rule: str
    message: str


class Model(BaseModel):
    """Base of every type in the contract: camelCase in YAML, snake_case in Python, mapped here once.

    Strict: `epochs: "3"` is an error here as it is at the API server. Unknown fields are errors.
    """

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    cel_rules: ClassVar[tuple[Rule, ...]] = ()


class OneOf(Model):
    """A union told apart by which field is present, as Kubernetes writes them."""

    @classmethod
    def members(cls) -> tuple[str, ...]:
        """The YAML names of the alternatives, in the order of the docs."""
        return tuple(field.alias or name for name, field in cls.model_fields.items())

    @classmethod
    def union_rule(cls) -> Rule:
        present = ", ".join(f"has(self.{name})" for name in cls.members())
        return Rule(
            f"[{present}].filter(present, present).size() == 1",
            f"set exactly one of {', '.join(cls.members())}",
        )

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        given = [
            field.alias or name
            for name, field in type(self).model_fields.items()
            if getattr(self, name) is not None
        ]
        if len(given) != 1:
            found = " and ".join(given) if given else "none"
            raise ValueError(f"set exactly one of {', '.join(self.members())}; found {found}")
        return self

    @property
    def kind(self) -> str:
        """The YAML name of the alternative that is set."""
        return next(
            field.alias or name
            for name, field in type(self).model_fields.items()
            if getattr(self, name) is not None
        )


AutoInt = Annotated[int, Field(ge=1, le=1 << 30)] | Literal["auto"]
"""A count that the planner chooses by rule when it is `auto`."""

Name = Annotated[str, Field(min_length=1, max_length=40, pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$")]
"""A job's name. DNS-1035 and at most 40 characters: KubeRay allows 47, and `-<attempt>` follows."""

ObjectName = Annotated[
    str, Field(min_length=1, max_length=253, pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")
]
"""The name of another Kubernetes object (DNS-1123 subdomain)."""


class ObjectMeta(BaseModel):
    """The part of Kubernetes' metadata that Tuneyard reads; the rest is kept out of the plan."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="ignore")

    name: Name
    """The job's name; at most 40 characters, lower case, digits and dashes, starting with a letter."""
    namespace: str | None = None
    """The namespace; None means the one of the context."""
    labels: dict[str, str] = {}
    """Labels, copied to the objects made for the job."""
    annotations: dict[str, str] = {}
    """Annotations; Tuneyard reads none of them."""
    generation: int | None = None
    """The API server's count of spec changes; None outside a cluster."""
    uid: str | None = None
    """The object's identity; None outside a cluster."""


ConditionType = Literal["Planned", "Admitted", "Running", "Suspended", "Succeeded", "Failed"]


class Condition(Model):
    """One condition, in Kubernetes' own shape so that `kubectl wait --for=condition=...` works."""

    type: ConditionType
    """Which question this condition answers."""
    status: Literal["True", "False", "Unknown"]
    """The answer."""
    reason: str = Field(pattern=r"^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$", max_length=256)
    """One CamelCase word for programs."""
    message: str = Field(default="", max_length=32768)
    """A sentence for people."""
    last_transition_time: str = Field(json_schema_extra={"format": "date-time"})
    """When `status` last changed (RFC 3339, UTC)."""
    observed_generation: int | None = Field(default=None, ge=0)
    """The spec's generation this was decided on."""
