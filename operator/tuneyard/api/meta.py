"""API group and version, the base classes of the models, names, metadata and conditions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Final, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic.alias_generators import to_camel
from pydantic.fields import FieldInfo

GROUP: Final = "tuneyard.io"
VERSION: Final = "v1alpha1"
API_VERSION: Final = "tuneyard.io/v1alpha1"
FINALIZER: Final = "tuneyard.io/cluster"
"""Finalizer of a job whose output is erased with it: it keeps the deleted job until then."""


def yaml_fields(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """Return a model's fields by their YAML names, in order of declaration."""
    return {info.alias or name: info for name, info in model.model_fields.items()}


class Rule(NamedTuple):
    """A rule across fields of one model, in CEL for the API server and in Python.

    Paths are YAML names relative to the model; "" is the model itself.
    """

    cel: str
    """The rule in CEL for the CRD; `self` is the model."""
    holds: Callable[[Any], bool]
    """The rule in Python; it reads only fields that `reads` names."""
    message: str
    """The reason and the remedy; the path is printed before it."""
    path: str = ""
    """The field that is reported as wrong."""
    reads: tuple[str, ...] = ()
    """Every field that the rule reads. The rule is not reported if one of these fields has a
    fault."""
    found: Callable[[Any], str] | None = None
    """Describe the value found, for Python's message. None: nothing is added to the message."""

    def message_for(self, value: Any) -> str:
        """Return the message for a model's value that breaks the rule."""
        return f"{self.message}; found {self.found(value)}" if self.found else self.message


class Model(BaseModel):
    """Base class of the API's models: fields are camelCase in YAML and snake_case in Python.

    Models are strict like the API server: `epochs: "3"` and unknown fields are errors.
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
    """A union in the style of Kubernetes: exactly one of the fields is set."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        cls.rules = (cls.union_rule(), *cls.rules)

    @classmethod
    def members(cls) -> tuple[str, ...]:
        """Return the YAML names of the alternatives, in order of declaration."""
        return tuple(yaml_fields(cls))

    @classmethod
    def union_rule(cls) -> Rule:
        """Return the rule that exactly one alternative is set."""
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
        names = zip(cls.members(), cls.model_fields, strict=True)
        return [member for member, name in names if getattr(one, name) is not None]

    @property
    def kind(self) -> str:
        """The YAML name of the alternative that is set."""
        return self._given(self)[0]


AutoInt = Annotated[int, Field(ge=1, le=1 << 30)] | Literal["auto"]
"""A count, or `auto`: the planner chooses it by rule."""

NAME_PATTERN = r"^[a-z]([-a-z0-9]*[a-z0-9])?$"
NAME_LENGTH = 40
Name = Annotated[str, Field(min_length=1, max_length=NAME_LENGTH, pattern=NAME_PATTERN)]
"""A job's name: DNS-1035, at most 40 characters, since KubeRay allows 47 with `-<attempt>`."""

OBJECT_NAME_PATTERN = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"
ObjectName = Annotated[str, Field(min_length=1, max_length=253, pattern=OBJECT_NAME_PATTERN)]
"""The name of another Kubernetes object (DNS-1123 subdomain)."""


class ObjectMeta(BaseModel):
    """The part of Kubernetes' metadata that Tuneyard reads; other fields are ignored."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        extra="ignore",
        use_attribute_docstrings=True,
    )

    name: Name
    """Name of the job: at most 40 lower-case letters, digits and dashes, starting with a letter."""
    namespace: str | None = None
    """Namespace of the job. None: the namespace of the kubeconfig's context."""
    labels: dict[str, str] = {}
    """Labels, copied to the objects that are created for the job. Labels of other controllers are
    not copied, apart from Kueue's queue and priority class."""
    annotations: dict[str, str] = {}
    """Annotations; Tuneyard does not read them."""
    generation: int | None = None
    """Number of changes of the spec, counted by the API server. None: outside a cluster."""
    uid: str | None = None
    """UID of the object. None: outside a cluster."""


ConditionType = Literal[
    "Planned",
    "Admitted",
    "Running",
    "Suspended",
    "Succeeded",
    "Failed",
    "DataLeaked",
    "GatesPassed",
]


class Report(Model):
    """Base class of the models that the operator reports.

    Unknown fields are ignored: after a rollback an older operator reads the status of a newer one.
    """

    model_config = ConfigDict(extra="ignore")


class Condition(Report):
    """A condition in the format of Kubernetes, so that `kubectl wait --for=condition=...` works."""

    type: ConditionType
    """Type of the condition."""
    status: Literal["True", "False", "Unknown"]
    """Whether the condition holds."""
    reason: str = Field(pattern=r"^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$", max_length=256)
    """Reason of the status, as one CamelCase word."""
    message: str = Field(default="", max_length=32768)
    """Reason of the status, as a sentence."""
    last_transition_time: str = Field(json_schema_extra={"format": "date-time"})
    """Time of the last change of `status` (RFC 3339, UTC)."""
    observed_generation: int | None = Field(default=None, ge=0)
    """Generation of the spec that the condition describes. None: unknown."""
