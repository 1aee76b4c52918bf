from __future__ import annotations

import random
import time

import pytest
from sacrebleu.metrics import BLEU

from sedsft.evaluation.diversity import distinct_answers, self_bleu, self_bleu_signature


def test_identical_samples_score_100_and_disjoint_ones_0() -> None:
    assert self_bleu(["1 + 2 = 3"] * 8) == pytest.approx(100)
    assert self_bleu(["7"] * 2) == pytest.approx(100)
    assert self_bleu(["", ""]) == 100
    assert self_bleu(["a b c d e", "v w x y z"]) == 0
    assert self_bleu(["", "a b"]) == 0


def test_one_sample_has_no_self_bleu() -> None:
    assert self_bleu(["a"]) is None
    assert self_bleu([]) is None


def test_hand_computed_pair() -> None:
    """Five of six unigrams, 4/5 bigrams, 3/4 trigrams and 2/3 four-grams match, in both directions, lengths are equal."""
    expected = 100 * (5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25
    assert self_bleu(["a b c d e f", "a b c d e g"]) == pytest.approx(expected)


@pytest.mark.parametrize("vocabulary", [3, 10, 60])
def test_equals_sacrebleu_sentence_by_sentence(vocabulary: int) -> None:
    rng, bleu = random.Random(vocabulary), BLEU(tokenize="13a", effective_order=True)
    for _ in range(40):
        texts = [" ".join(str(rng.randrange(vocabulary)) for _ in range(rng.choice([1, 2, 5, 20]))) for _ in range(5)]
        texts.append("x, y... $3\n ")
        scores = [bleu.sentence_score(text, texts[:i] + texts[i + 1 :]).score for i, text in enumerate(texts)]
        assert self_bleu(texts) == pytest.approx(sum(scores) / len(scores), abs=1e-9)


def test_signature_names_references_and_tokenizer() -> None:
    signature = self_bleu_signature(8)
    assert "nrefs:7" in signature
    assert "eff:yes" in signature
    assert "tok:13a" in signature


def test_450_prompts_of_8_samples_are_quick() -> None:
    rng = random.Random(0)
    prompts = [[" ".join(str(rng.randrange(60)) for _ in range(20)) for _ in range(8)] for _ in range(450)]
    started = time.process_time()
    for texts in prompts:
        self_bleu(texts)
    assert time.process_time() - started < 3


def test_distinct_answers_leave_out_missing_ones() -> None:
    assert distinct_answers(["1/2", "1/2", None, "3"]) == 2
    assert distinct_answers([None]) == 0
