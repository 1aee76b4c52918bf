"""Writes the embedded default's base model and data: `python examples/prepare_demo.py FOLDER`.

Takes about 80 s on two idle cores the first time; the base model is kept in FOLDER/cache (or --cache) for the next time.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sedsft.tasks.demo import prepare
from sedsft.tasks.tiny_model import Recipe


def report(step: int, steps: int, loss: float) -> None:
    """Show one line per 100 steps of pre-training."""
    if step % 100 == 0:
        sys.stdout.write(f"base model: step {step}/{steps}, loss {loss:.3f}\n")
        sys.stdout.flush()


def main() -> None:
    """Read the arguments and write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="receives base/ and data/")
    parser.add_argument("--cache", type=Path, help="where trained base models are kept (default: FOLDER/cache)")
    parser.add_argument("--seed", type=int, default=0, help="seed of base model and data")
    parser.add_argument("--threads", type=int, default=2, help="PyTorch threads while training")
    arguments = parser.parse_args()
    prepare(arguments.folder, arguments.cache, Recipe(seed=arguments.seed), arguments.threads, report)
    sys.stdout.write(f"wrote {arguments.folder}/base and {arguments.folder}/data\n")


if __name__ == "__main__":
    main()
