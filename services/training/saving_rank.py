"""What SFT and policy ranks share: being met by the others, and a training state that is saved beside training."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from services.checkpoints import FileRecord
from services.training.ranks import rendezvous

if TYPE_CHECKING:
    from services.training.engine import TrainEngine


class SavingRank:
    """Base of a rank; `setup` of the class on it opens the engine."""

    _engine: TrainEngine

    def __init__(self, index: int) -> None:
        self.index = index
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")

    def address(self) -> tuple[str, int]:
        """Address of this node and a free port, for rank 0 to be met at."""
        return rendezvous()

    def resume(self, folder: Path) -> None:
        """Go back to the state that `begin_save` wrote into `folder`, a verified checkpoint of the same number of ranks."""
        self._engine.load_state(folder)

    def begin_save(self, folder: Path) -> None:
        """Copy the state of now, and begin to write it into `folder` in a thread; training may go on when this returns.

        Rank 0 writes a model folder, and every rank its training state below `trainer/`.
        """
        self._written = self._writer.submit(self._engine.write, self._engine.snapshot(), folder)

    def saved(self, wait: bool) -> list[FileRecord] | None:
        """The files that this rank wrote, with their hashes, since `begin_save`; None while it writes. Not collective.

        Raises:
            Exception: as raised in the writing thread, such as an OSError of a full disk.
        """
        return self._written.result() if wait or self._written.done() else None
