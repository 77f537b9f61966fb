"""Start `torchrun` from a notebook or a test."""

import inspect
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

END = """
if __name__ == "__main__":
    import json, os, sys
    result = {name}(*json.loads(sys.argv[2]))
    with open(os.path.join(sys.argv[1], os.environ["RANK"]), "w") as file:
        json.dump(result, file)
"""

# A new try meets at a new place; else it may find addresses of the one before (pytorch 135712).
ANEW = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def torchrun(
    worker: Callable, processes: int, *arguments, uses: Iterable[Callable] = (), restarts: int = 0
) -> list[Any]:
    """Write a function into a script, start it with `torchrun`, and collect what it returns.

    torchrun --standalone --nproc-per-node PROCESSES --max-restarts RESTARTS script.py

    Args:
        worker: its source is the script, so it imports what it needs; it returns JSON's types.
        processes: how many run it, each with one thread.
        arguments: JSON's types, the same for every process.
        uses: functions that it calls, whose source goes into the script, too.
        restarts: how often all processes start anew when one of them fails.

    Returns:
        What each process returned, by its number.

    Raises:
        RuntimeError: it failed; the message ends with what it said.
    """
    sources = [inspect.getsource(each) for each in (*uses, worker)]
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "script.py"
        script.write_text("\n\n".join([*sources, END.format(name=worker.__name__)]))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--local-addr", "localhost", "--nproc-per-node", str(processes)]
        command += ["--max-restarts", str(restarts), str(script), folder, json.dumps(arguments)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | (ANEW if restarts else {})
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            said = done.stderr.split(" failed (exitcode")[0]  # what follows is torchrun's own trace
            raise RuntimeError(f"{worker.__name__} failed under torchrun:\n{said[-3000:]}")
        return [json.loads((Path(folder) / str(i)).read_text()) for i in range(processes)]
