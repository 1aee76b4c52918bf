"""The truth that a freshly loaded engine is checked against: the same files, opened by transformers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM

from sedsft.config import Precision


class ReferenceWorker:
    """Scores given tokens with a model folder. One at a time is kept in memory, on the CPU."""

    def __init__(self, index: int) -> None:
        self.index = index
        torch.set_num_threads(1)

    def log_probs(
        self,
        model_path: str,
        precision: Precision,
        temperature: float,
        sequences: Sequence[tuple[npt.ArrayLike, npt.ArrayLike]],
    ) -> list[npt.NDArray[np.float32]]:
        """Log-probability of each response token of the (prompt ids, response ids) pairs at `temperature`."""
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        model = AutoModelForCausalLM.from_pretrained(
            model_path, dtype=dtype, local_files_only=True, use_safetensors=True
        ).eval()
        return [_score(model, np.asarray(prompt), np.asarray(response), temperature) for prompt, response in sequences]


@torch.no_grad()
def _score(
    model: torch.nn.Module, prompt_T: npt.NDArray[np.int32], response_R: npt.NDArray[np.int32], temperature: float
) -> npt.NDArray[np.float32]:
    ids_1T = torch.from_numpy(np.concatenate([prompt_T, response_R])).long()[None]
    logits_RV = model(input_ids=ids_1T).logits[0, len(prompt_T) - 1 : -1].float() / temperature
    chosen_R1 = ids_1T[0, len(prompt_T) :, None]
    scored: npt.NDArray[np.float32] = logits_RV.log_softmax(-1).gather(-1, chosen_R1)[:, 0].numpy()
    return scored
