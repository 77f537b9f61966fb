"""Which folder of shards counts: the one that a run's `run.json` names.

Every process writes its part into a new folder beside the last one; when all are done, `run.json`
is replaced, and that is the switch. Who is killed before it leaves a folder that nobody names,
which the next save removes.
"""

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from paligemma.support.files import read_json, shorten
from paligemma.support.processes import process_number, wait_for_all
from paligemma.support.replacing import SaveError, replacing, settled
from paligemma.support.runs import check_same

RUN = "run.json"


@contextmanager
def new_shards(
    folder: str | os.PathLike, losses: list[float], settings: dict
) -> Iterator[os.PathLike]:
    """An empty folder for the shards of all processes; at the end it is the one that counts.

    Args:
        folder: of the run; made when absent.
        losses: of the steps so far.
        settings: with which alone the run may go on; JSON's types only.

    Raises:
        SaveError: a full disk, a read-only directory; what counted before still counts.
    """
    folder = settled(folder)
    place = folder / f"step-{len(losses)}"
    try:
        if process_number() == 0:
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
        wait_for_all()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*in a single process")
            yield place  # torch.distributed.checkpoint.save returns when all have written
        if process_number() == 0:
            run = {"shards": place.name, "losses": losses, "config": settings}
            with replacing(folder) as draft:
                (draft / RUN).write_text(json.dumps(run) + "\n")
            for other in folder.glob("step-*"):
                if other != place:
                    shutil.rmtree(other, ignore_errors=True)
    except (OSError, CheckpointException) as error:
        shutil.rmtree(place, ignore_errors=True)
        raise SaveError(f"cannot write {place} ({_reason(error)})") from None


def find_shards(folder: str | os.PathLike, settings: dict) -> tuple[Path, list[float]] | None:
    """The folder of shards that counts, and the losses of its steps; None: a new run.

    Raises:
        ValueError: `run.json` is broken or of other settings, or the folder holds the checkpoint
            of a run in one process.
    """
    folder = settled(folder)
    file = folder / RUN
    if not file.is_file():
        if (folder / "checkpoint.pt").is_file():
            raise ValueError(
                f"{folder} holds checkpoint.pt, of a run without shards; go on with "
                "paligemma.training.train, or give another folder"
            )
        return None
    try:
        run = read_json(file, dict)
        name, losses, saved = run["shards"], run["losses"], dict(run["config"])
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"its shards are {shorten(name)}")
        losses = [float(loss) for loss in losses]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is broken ({_reason(error)}); remove it to start anew") from None
    check_same(file, saved, settings)
    return folder / name, losses


@contextmanager
def reading_shards(place: Path) -> Iterator[None]:
    """While open, whatever is wrong with shards is said in one line.

    Raises:
        ValueError: a file is broken or absent, or of another model.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*in a single process")
            yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, CheckpointException) as e:
        raise ValueError(
            f"{place} is broken or of another model ({_reason(e)}); remove {RUN} beside it to "
            "start anew, or give another folder"
        ) from None


def _reason(error: BaseException) -> str:
    """Why, in one short line; of several processes the first that failed."""
    failures = list(getattr(error, "failures", {}).values())
    error = failures[0][0] if failures else error
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(reason.split())[:160]
