"""Sampling through two real engines."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from sedsft.config import SamplingConfig
from sedsft.records import Prompt
from services.errors import DataError, PhaseTimeout, WeightSyncMismatch
from services.rollout.fleet import RolloutFleet, prompt_seed
from services.rollout.worker import GenerateRequest
from tests.services.rollout.conftest import RESOURCES
from tests.services.tiny_llama import random_llama

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def prompts(count: int, length: int = 12) -> list[Prompt]:
    rng = np.random.default_rng(7)
    return [
        Prompt(prompt_ids=(1, 3, *(int(t) for t in rng.integers(5, 72, length))), text="", answer="", line=line + 1)
        for line in range(count)
    ]


def log_probs(prompt_ids: tuple[int, ...], response_ids: tuple[int, ...], temperature: float) -> np.ndarray:
    """Log-softmax(logits / temperature) of the response tokens under the fixture's weights."""
    with torch.no_grad():
        logits_TV = random_llama(0)(torch.tensor([[*prompt_ids, *response_ids]])).logits[0].float() / temperature
    rows_RV = logits_TV[len(prompt_ids) - 1 : -1].log_softmax(-1)
    return rows_RV.gather(1, torch.tensor(response_ids)[:, None])[:, 0].numpy()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_are_those_after_temperature(fleet: RolloutFleet, temperature: float) -> None:
    sampling = SamplingConfig(temperature=temperature, max_tokens=12)
    asked = prompts(6)
    groups = fleet.generate(asked, 2, sampling, seed=1, timeout_s=100)

    def mean_gap(at_temperature: float) -> float:
        gaps = [
            np.abs(np.array(sample.log_probs) - log_probs(prompt.prompt_ids, sample.response_ids, at_temperature))
            for prompt, group in zip(asked, groups, strict=True)
            for sample in group
        ]
        return float(np.concatenate(gaps).mean())

    assert mean_gap(temperature) < 0.04
    assert mean_gap(2 * temperature) > 0.2


def test_top_p_renormalises_over_the_nucleus(fleet: RolloutFleet) -> None:
    [group] = fleet.generate(prompts(1), 8, SamplingConfig(top_p=0.01, max_tokens=4), seed=1, timeout_s=100)
    assert {sample.response_ids for sample in group} == {group[0].response_ids}
    assert all(p == 0.0 for sample in group for p in sample.log_probs)


def test_samples_carry_text_version_truncation(fleet: RolloutFleet, model_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    groups = fleet.generate(prompts(40), 8, SamplingConfig(max_tokens=24), seed=5, timeout_s=100)
    assert len(groups) == 40
    samples = [s for g in groups for s in g]
    assert all(len(g) == 8 for g in groups)
    assert {s.weight_version for s in samples} == {0}
    assert {s.truncated for s in samples} == {True, False}
    for sample in samples:
        assert len(sample.log_probs) == len(sample.response_ids)
        assert sample.truncated == (sample.response_ids[-1] != 2)
        assert len(sample.response_ids) == 24 or not sample.truncated
        assert sample.text == tokenizer.decode(sample.response_ids, skip_special_tokens=True)


def test_same_seed_same_samples_other_seed_others(fleet: RolloutFleet) -> None:
    sampling = SamplingConfig(max_tokens=8)
    first, again, other = (fleet.generate(prompts(3), 4, sampling, seed=s, timeout_s=100) for s in (1, 1, 2))
    assert [s.response_ids for g in first for s in g] == [s.response_ids for g in again for s in g]
    assert [s.response_ids for g in first for s in g] != [s.response_ids for g in other for s in g]
    assert len({s.response_ids for s in first[0]}) == 4


def test_prompts_of_many_tokens_in_one_step(fleet: RolloutFleet) -> None:
    groups = fleet.generate(prompts(64, length=220), 4, SamplingConfig(max_tokens=4), seed=3, timeout_s=150)
    assert sum(len(g) for g in groups) == 256


def test_too_long_prompts_are_named(fleet: RolloutFleet) -> None:
    with pytest.raises(DataError, match=r"at most 206 tokens.*line 1: 222 tokens"):
        fleet.generate(prompts(1, length=220), 1, SamplingConfig(max_tokens=50), seed=0, timeout_s=10)


def test_deadline(fleet: RolloutFleet) -> None:
    short, long = SamplingConfig(max_tokens=150), SamplingConfig(max_tokens=230)
    with pytest.raises(PhaseTimeout, match=r"expected 2 prompts x 2 samples within 0 s, rollout-0 still samples 1, rollout-1"):
        fleet.generate(prompts(2), 2, short, seed=0, timeout_s=0.001)
    # The engines go on with what they have: this ends after it.
    fleet.generate(prompts(2), 2, long, seed=0, timeout_s=100)


def test_engine_refuses_another_version(fleet: RolloutFleet) -> None:
    request = GenerateRequest(((1, 3, 5),), (0,), 1, SamplingConfig(max_tokens=2), version=9, sample_timeout_s=60)
    with pytest.raises(WeightSyncMismatch, match="expected rollout-0 to sample with weight version 9, it is at 0"):
        fleet._group.call_one(0, "generate", request, timeout_s=60)


def test_a_sample_over_its_time_ends_where_it_is(fleet: RolloutFleet, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[tuple[str, str]] = []
    monkeypatch.setattr(fleet, "_event", lambda kind, message, /, **data: events.append((kind, message)))
    monkeypatch.setattr(fleet, "_resources", RESOURCES.model_copy(update={"sample_timeout_s": 0.4}))
    groups = fleet.generate(prompts(24), 16, SamplingConfig(max_tokens=230), seed=1, timeout_s=100)
    samples = [sample for samples in groups for sample in samples]
    cut = [sample for sample in samples if sample.timed_out]
    assert len(samples) == 24 * 16
    assert 0 < len(cut) < len(samples)
    assert all(sample.truncated and len(sample.response_ids) < 230 for sample in cut)
    assert all(len(sample.log_probs) == len(sample.response_ids) for sample in cut)
    assert fleet.counts() == {"redispatched": 0, "late": 0, "wrong_version": 0, "timed_out": len(cut)}
    assert events == [("samples_timed_out", f"{len(cut)} samples ran longer than 0.4 s and end where they were")]
    # Nothing of them goes on in the engines.
    monkeypatch.undo()
    again = fleet.generate(prompts(2), 2, SamplingConfig(max_tokens=8), seed=1, timeout_s=100)
    assert not any(sample.timed_out for group in again for sample in group)


def test_prompt_seeds_leave_room_for_the_samples() -> None:
    seeds = [prompt_seed(s, i) for s in range(20) for i in range(50)]
    assert len(set(seeds)) == 1000
    assert all(0 <= s < 2**62 for s in seeds)
