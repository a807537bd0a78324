"""What every section of the YAML schema is made of: strict immutable models and a few value types.

Strict, because `batch_size: "24"` or `epochs: true` is a mistake worth hearing about; the one leniency is for numbers
such as `1e-6`, which YAML 1.1 reads as text. Immutable, because a run is a pure function of its config.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

_EXPONENT_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+")


class KeyProblem(ValueError):
    """A wrong combination of values, found by a section. `key` is relative to that section; `text` holds the remedy."""

    def __init__(self, key: str, text: str) -> None:
        super().__init__(f"{key}: {text}")
        self.key, self.text = key, text


class Section(BaseModel):
    """One section of a config file; attribute names are YAML keys, and the text under a field is its description."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)

    unused: ClassVar[dict[str, str]] = {}
    """Keys of V-JEPA's or the seed project's files that this project has no use for: accepted with a notice (why)."""

    unsupported: ClassVar[dict[str, Any]] = {}
    """Keys of those files that would change the result: only this neutral value is accepted, and does nothing."""

    misplaced: ClassVar[dict[str, str]] = {}
    """Unknown keys that show what is amiss with the whole file, and the sentence that says so."""


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, str) and _EXPONENT_NUMBER.fullmatch(value.strip()) else value


def _pair(value: Any) -> Any:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError(f"given {value!r}, expected a list of two numbers, e.g. [0.3, 1.0]")
    return tuple(value)


def _ascending(value: tuple[float, float]) -> tuple[float, float]:
    if value[0] > value[1]:
        raise ValueError(f"given {list(value)}, expected the smaller number first: [{value[1]}, {value[0]}]")
    return value


def _list_of_text(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def lower_case(value: Any) -> Any:
    """For names that the originals compare without regard to case."""
    return value.lower() if isinstance(value, str) else value


Number = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Positive = Annotated[Number, Field(gt=0)]
NonNegative = Annotated[Number, Field(ge=0)]
Fraction = Annotated[Number, Field(ge=0, le=1)]
Share = Annotated[Number, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1)]
FractionPair = Annotated[tuple[Fraction, Fraction], BeforeValidator(_pair)]
ShareRange = Annotated[tuple[Share, Share], BeforeValidator(_pair), AfterValidator(_ascending)]
PositiveRange = Annotated[tuple[Positive, Positive], BeforeValidator(_pair), AfterValidator(_ascending)]
Text = Annotated[str, Field(min_length=1)]
Paths = Annotated[list[Text], BeforeValidator(_list_of_text), Field(min_length=1)]


def require_multiple(key: str, value: int, of: str, unit: int) -> None:
    """Raises KeyProblem, naming the nearest sizes that fit, unless `value` is a multiple of `unit`."""
    if value % unit:
        below, above = value // unit * unit, (value // unit + 1) * unit
        fitting = f"{below} or {above}" if below else f"{above}"
        raise KeyProblem(key, f"{value} is not divisible by {of} ({unit}); use {fitting}, or change {of}")
