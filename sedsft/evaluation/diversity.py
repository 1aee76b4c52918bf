"""How much the responses to one prompt differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from sacrebleu.metrics import BLEU

TOKENIZER = "13a"
"""sacrebleu's tokenizer of the texts; figures compare only under the same one and the same number of samples."""
ORDER = 4

_BLEU = BLEU(tokenize=TOKENIZER, effective_order=True, max_ngram_order=ORDER)
_Ngram = tuple[str, ...]


def self_bleu(texts: Sequence[str]) -> float | None:
    """Mean over the samples of one prompt of BLEU-4 of each against all the others, 0 to 100; lower is more diverse.

        (1/n) * sum_i BLEU(text_i; references = all text_j, j != i)

    Sentence-level sacrebleu, multi-reference, effective n-gram order for texts of under four tokens. Responses only, without
    the prompt. It rises with n. None for fewer than two texts; a text that occurs twice scores 100, empty ones too.

    Equal to `BLEU.sentence_score(text_i, others)`, with the n-grams of every text counted once instead of n times: per n-gram
    the largest and the second largest count over the texts give the reference count that leaves out any one text.
    """
    if len(texts) < 2:
        return None
    tokens = [_BLEU.tokenizer(text.rstrip()).split() for text in texts]
    counts = [_ngram_counts(words) for words in tokens]
    largest: dict[_Ngram, tuple[int, int, int]] = {}  # n-gram -> (largest count, index of the text that has it, second largest)
    for index, ngrams in enumerate(counts):
        for ngram, count in ngrams.items():
            first, owner, second = largest.get(ngram, (0, -1, 0))
            largest[ngram] = (count, index, first) if count > first else (first, owner, max(second, count))
    total = 0.0
    for index, ngrams in enumerate(counts):
        lengths = [len(words) for other, words in enumerate(tokens) if other != index]
        if not tokens[index]:
            total += 100.0 * (0 in lengths)
            continue
        matched, present = [0] * ORDER, [0] * ORDER
        for ngram, count in ngrams.items():
            first, owner, second = largest[ngram]
            present[len(ngram) - 1] += count
            matched[len(ngram) - 1] += min(count, second if owner == index else first)
        hyp_len = len(tokens[index])
        ref_len = min(lengths, key=lambda length: (abs(length - hyp_len), length))
        total += _BLEU.compute_bleu(matched, present, hyp_len, ref_len, smooth_method="exp", effective_order=True).score
    return total / len(texts)


def _ngram_counts(words: Sequence[str]) -> Counter[_Ngram]:
    return Counter(tuple(words[i : i + n]) for n in range(1, ORDER + 1) for i in range(len(words) - n + 1))


def self_bleu_signature(num_samples: int) -> str:
    """sacrebleu's description of the metric for `num_samples` texts a prompt, to be recorded beside the figures."""
    metric = BLEU(tokenize=TOKENIZER, effective_order=True, max_ngram_order=ORDER)
    metric.sentence_score("", [""] * max(1, num_samples - 1))
    return str(metric.get_signature())


def distinct_answers(extracted: Iterable[str | None]) -> int:
    """Number of different answers; responses without one do not count."""
    return len({answer for answer in extracted if answer is not None})
