"""Which problems of evaluation benchmarks stand in training rows: whole, or in part by a run of equal words.

Words are those of the text after Unicode NFKC and case folding, without punctuation and mathematical signs. A problem overlaps
with a row that holds 13 of its words in a row, the length that GPT-3 (arXiv 2005.14165, appendix C) and Llama 2
(arXiv 2307.09288, appendix A.6) look at up to tokenization; of a shorter problem, all of them. It is found whole where its text
without punctuation and white space, but with mathematical signs, is part of the row's. What is kept in memory is the
benchmarks' size; rows only pass by.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

NGRAM_WORDS = 13
LISTED_ROWS = 5

_WORD = re.compile(r"[^\W_]+")
# What carries the meaning of a formula; brackets, dollar signs and backslashes are written in several ways.
_NOT_COMPARED = re.compile(r"[^\w+\-*/=<>^%!|]|_")

Words = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class OverlappingRow:
    """A training row and the problem that it shares text with; `problem` counts from 1, as the benchmark's rows do."""

    file: str
    line: int
    problem: int
    exact: bool
    words: str
    """The first equal words, by which a common phrase can be told from a leak."""


@dataclass(frozen=True, slots=True)
class BenchmarkOverlap:
    """What was found of one benchmark. Problems found whole count under `ngram`, too."""

    benchmark: str
    problems: int
    exact: int
    ngram: int
    rows: int
    """Training rows that share text with any of its problems."""
    unchecked: int
    """Problems without a word, which cannot be looked for."""
    listed: tuple[OverlappingRow, ...]
    """The first few pairs of a row and a problem."""

    @property
    def share(self) -> float:
        """Share of problems that overlap."""
        return self.ngram / self.problems


class OverlapScan:
    """Index of benchmark problems through which the texts of training rows are passed, one at a time."""

    def __init__(self, benchmarks: Mapping[str, Sequence[str]]) -> None:
        """`benchmarks`: texts of the problems, in order, by the benchmark's name."""
        self._names = tuple(benchmarks)
        self._problems = [(name, number, text) for name, texts in benchmarks.items() for number, text in enumerate(texts, 1)]
        self._ngrams: dict[Words, list[int]] = {}
        lengths: defaultdict[str, set[int]] = defaultdict(set)
        self._unchecked = dict.fromkeys(benchmarks, 0)
        for index, (name, _, text) in enumerate(self._problems):
            words = words_of(text)
            self._unchecked[name] += not words
            for ngram in ngrams_of(words):
                problems = self._ngrams.setdefault(ngram, [])
                if index not in problems[-1:]:
                    problems.append(index)
                lengths[ngram[0]].add(len(ngram))
        self._lengths = {first: tuple(sorted(found)) for first, found in lengths.items()}
        self._exact: set[int] = set()
        self._overlapping: set[int] = set()
        self._rows = dict.fromkeys(benchmarks, 0)
        self._listed: dict[str, list[OverlappingRow]] = {name: [] for name in benchmarks}

    @property
    def num_ngrams(self) -> int:
        """Entries of the index, which rows do not change."""
        return len(self._ngrams)

    def add(self, text: str, line: int, file: str = "") -> None:
        """Look for every problem in the text of one training row."""
        words = words_of(text)
        found: dict[int, Words] = {}
        for at, word in enumerate(words):
            for length in self._lengths.get(word, ()):
                ngram = words[at : at + length]
                for index in self._ngrams.get(ngram, ()):
                    found.setdefault(index, ngram)
        if not found:
            return
        compared = _compared(text)
        names = set()
        for index in sorted(found):
            name, number, problem = self._problems[index]
            names.add(name)
            exact = _compared(problem) in compared
            self._overlapping.add(index)
            if exact:
                self._exact.add(index)
            if len(self._listed[name]) < LISTED_ROWS:
                self._listed[name].append(OverlappingRow(file, line, number, exact, " ".join(found[index])))
        for name in names:
            self._rows[name] += 1

    def result(self) -> tuple[BenchmarkOverlap, ...]:
        """What was found so far, one record per benchmark."""

        def count(name: str, problems: Iterable[int]) -> int:
            return sum(self._problems[index][0] == name for index in problems)

        return tuple(
            BenchmarkOverlap(
                benchmark=name,
                problems=count(name, range(len(self._problems))),
                exact=count(name, self._exact),
                ngram=count(name, self._overlapping),
                rows=self._rows[name],
                unchecked=self._unchecked[name],
                listed=tuple(self._listed[name]),
            )
            for name in self._names
        )


def words_of(text: str) -> Words:
    """The text's words: letters and digits, in one form and case."""
    return tuple(_WORD.findall(_folded(text)))


def ngrams_of(words: Words) -> Iterable[Words]:
    """Runs of 13 words; of fewer words, all of them; of none, nothing."""
    if not words:
        return ()
    length = min(NGRAM_WORDS, len(words))
    return (words[at : at + length] for at in range(len(words) - length + 1))


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()


def _compared(text: str) -> str:
    return _NOT_COMPARED.sub("", _folded(text))
