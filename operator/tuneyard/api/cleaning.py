"""The rules that clean data sets before their rows are tokenized."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from tuneyard.api.meta import Model, Rule

LANGUAGE_PATTERN = r"^[a-z]{2,3}$"
Treatment = Literal["ignore", "report", "redact", "drop"]
QualityRules = Literal["repetition", "gopher", "fineweb"]


class PersonalData(Model):
    """The treatment of each kind of personal data. ignore: it is not searched. report: the rows are
    counted. redact: the data becomes a placeholder such as [EMAIL]. drop: the row is left out."""

    email: Treatment = "report"
    """E-mail addresses, without those of domains reserved for examples."""
    phone: Treatment = "report"
    """Telephone numbers with a country code, or in the North American form."""
    card: Treatment = "report"
    """Payment card numbers whose check digit is right."""
    iban: Treatment = "report"
    """International bank account numbers whose check digits are right."""
    key: Treatment = "report"
    """Access keys and tokens of well-known services, and private keys."""


class Clean(Model):
    """Rules that remove or change rows by their text."""

    duplicates: Literal["exact", "near"] | None = None
    """Leave out rows that repeat an earlier row of any data set of the split. exact: with the same
    turns. near: also with nearly the same words. None: repeated rows stay."""
    similarity: float | None = Field(default=None, gt=0, le=1)
    """Share of five-word sequences that near duplicates have in common (Jaccard index). None:
    0.8."""
    repair_encoding: bool = False
    """Repair text that was decoded with a wrong character encoding, such as `Ã©` for `é`."""
    languages: list[Annotated[str, Field(max_length=3, pattern=LANGUAGE_PATTERN)]] | None = Field(
        default=None, min_length=1, max_length=97
    )
    """Languages to keep, as ISO 639 codes. A row is left out if it is surely in another language;
    rows of few words stay. None: all languages."""
    min_words: int | None = Field(default=None, ge=1, le=1 << 20)
    """Fewest words of a row. None: no limit."""
    max_words: int | None = Field(default=None, ge=1, le=1 << 20)
    """Most words of a row. None: no limit."""
    quality: list[QualityRules] | None = Field(default=None, min_length=1, max_length=3)
    """Published rules for web documents, of which only repetition also suits conversations.
    repetition: repeated lines, paragraphs and word sequences (Rae et al. 2021). gopher: length,
    words and symbols (Rae et al. 2021). fineweb: short, repeated and unfinished lines (Penedo et
    al. 2024). None: none."""
    personal_data: PersonalData | None = None
    """Search for personal data. None: it is not searched."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            cel="!has(self.similarity) || (has(self.duplicates) && self.duplicates == 'near')",
            holds=lambda clean: clean.similarity is None or clean.duplicates == "near",
            message="applies to near duplicates only: set duplicates: near, or remove similarity",
            path="similarity",
            reads=("similarity", "duplicates"),
        ),
        Rule(
            cel="!has(self.minWords) || !has(self.maxWords) || self.minWords <= self.maxWords",
            holds=lambda clean: (
                clean.min_words is None
                or clean.max_words is None
                or clean.min_words <= clean.max_words
            ),
            message="must be at most maxWords: lower minWords, or raise maxWords",
            path="minWords",
            reads=("minWords", "maxWords"),
        ),
    )
