"""Write operator/tuneyard/planning/trl_fields.py: the arguments of TRL's configs, and their types.

    python scripts/trl_fields.py [--check]

--check writes nothing, and fails if the file is out of date. Needs the trainer's packages and TRL:
the planner checks `training.trl` against this file, since it imports neither.
"""

from __future__ import annotations

import dataclasses
import enum
import sys
import types
import typing
from pathlib import Path

from trl.trainer.distillation_config import DistillationConfig
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.kto_config import KTOConfig
from trl.trainer.reward_config import RewardConfig
from trl.trainer.rloo_config import RLOOConfig
from trl.trainer.sft_config import SFTConfig

FILE = Path(__file__).resolve().parents[1] / "operator/tuneyard/planning/trl_fields.py"
CONFIGS = {
    "SFT": SFTConfig,
    "DPO": DPOConfig,
    "KTO": KTOConfig,
    "REWARD": RewardConfig,
    "GRPO": GRPOConfig,
    "RLOO": RLOOConfig,
    "DISTILL": DistillationConfig,
}
NAMES = {
    bool: "bool",
    int: "int",
    float: "float",
    str: "str",
    list: "list",
    dict: "dict",
    tuple: "list",
}
"""The types of values, as a manifest holds them."""


def main() -> None:
    text = module()
    if "--check" not in sys.argv:
        FILE.write_text(text, encoding="utf-8")
    elif not FILE.exists() or FILE.read_text(encoding="utf-8") != text:
        sys.exit(f"{FILE} is out of date: run `python scripts/trl_fields.py`")


def module() -> str:
    """Return the text of the file."""
    parts = [
        '"""The arguments of TRL\'s configs, and the types of their values.\n\n'
        'Written by scripts/trl_fields.py; do not edit.\n"""\n\n'
        "from __future__ import annotations\n\nfrom collections.abc import Mapping\n"
    ]
    for name, config in CONFIGS.items():
        hints = typing.get_type_hints(config)
        lines = [
            f'    "{field.name}": "{" | ".join(sorted(type_names(hints[field.name])))}",'
            for field in sorted(dataclasses.fields(config), key=lambda field: field.name)
        ]
        parts.append(f"{name}: Mapping[str, str] = {{\n" + "\n".join(lines) + "\n}\n")
    return "\n".join(parts)


def type_names(hint: object) -> set[str]:
    """Return the names of the types that a hint allows. An enum is written as its value; a mapping
    is not written as the path of a file; other classes cannot be written at all."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        names = set().union(*map(type_names, parts))
        return names - {"str"} if "dict" in names else names
    if origin is typing.Literal:
        return set().union(*(type_names(type(part)) for part in parts))
    if hint is type(None):
        return {"null"}
    kind = origin or hint
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return {"str"}
    return {NAMES[kind]} if isinstance(kind, type) and kind in NAMES else set()


if __name__ == "__main__":
    main()
