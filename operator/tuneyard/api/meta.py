"""Group, version, the base model and the vocabulary of conditions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Final, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.alias_generators import to_camel

GROUP: Final = "tuneyard.io"
VERSION: Final = "v1alpha1"
API_VERSION: Final = "tuneyard.io/v1alpha1"


class Rule(NamedTuple):
    """A rule across the fields of one model, written once for the API server and once for Python.

    Paths are YAML names, relative to the model ("" is the model itself).
    """

    cel: str
    """The rule in CEL, for the CRD; `self` is the model."""
    holds: Callable[[Any], bool]
    """The same in Python; it may read no field that `reads` does not name."""
    message: str
    """The reason and the remedy; what is wrong stands before it, as the path."""
    path: str = ""
    """The field to blame."""
    reads: tuple[str, ...] = ()
    """Every field that the rule looks at: where one of them is itself at fault, it says nothing."""
    found: Callable[[Any], str] | None = None
    """What was found instead, for Python's message. None: the message says it all."""

    def message_for(self, value: Any) -> str:
        return f"{self.message}; found {self.found(value)}" if self.found else self.message


class Model(BaseModel):
    """Base of every type in the contract: camelCase in YAML, snake_case in Python, mapped here.

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

    rules: ClassVar[tuple[Rule, ...]] = ()

    @model_validator(mode="after")
    def _rules_hold(self) -> Self:
        broken = [rule for rule in self.rules if not rule.holds(self)]
        if broken:
            texts = (f"{rule.path} {rule.message_for(self)}".strip() for rule in broken)
            raise ValueError("; ".join(texts))
        return self


class OneOf(Model):
    """A union told apart by which field is present, as Kubernetes writes them."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        cls.rules = (cls.union_rule(), *cls.rules)

    @classmethod
    def members(cls) -> tuple[str, ...]:
        """The YAML names of the alternatives, in the order of the docs."""
        return tuple(field.alias or name for name, field in cls.model_fields.items())

    @classmethod
    def union_rule(cls) -> Rule:
        present = ", ".join(f"has(self.{name})" for name in cls.members())
        return Rule(
            cel=f"[{present}].filter(present, present).size() == 1",
            holds=lambda one: len(cls._given(one)) == 1,
            message=f"set exactly one of {', '.join(cls.members())}",
            reads=cls.members(),
            found=lambda one: " and ".join(cls._given(one)) or "none",
        )

    @classmethod
    def _given(cls, one: Any) -> list[str]:
        fields = cls.model_fields.items()
        return [field.alias or name for name, field in fields if getattr(one, name) is not None]

    @property
    def kind(self) -> str:
        """The YAML name of the alternative that is set."""
        return self._given(self)[0]


AutoInt = Annotated[int, Field(ge=1, le=1 << 30)] | Literal["auto"]
"""A count that the planner chooses by rule when it is `auto`."""

NAME_PATTERN = r"^[a-z]([-a-z0-9]*[a-z0-9])?$"
NAME_LENGTH = 40
Name = Annotated[str, Field(min_length=1, max_length=NAME_LENGTH, pattern=NAME_PATTERN)]
"""A job's name. DNS-1035 and at most 40 characters: KubeRay allows 47, and `-<attempt>` follows."""

OBJECT_NAME_PATTERN = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"
ObjectName = Annotated[str, Field(min_length=1, max_length=253, pattern=OBJECT_NAME_PATTERN)]
"""The name of another Kubernetes object (DNS-1123 subdomain)."""


class ObjectMeta(BaseModel):
    """The part of Kubernetes' metadata that Tuneyard reads; the rest is kept out of the plan."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        extra="ignore",
        use_attribute_docstrings=True,
    )

    name: Name
    """The job's name: at most 40 lower-case letters, digits and dashes, starting with a letter."""
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


class Report(Model):
    """Base of what the operator reports. Unknown fields are ignored, not refused: after a roll-back
    an older operator reads what a newer one wrote."""

    model_config = ConfigDict(extra="ignore")


class Condition(Report):
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
