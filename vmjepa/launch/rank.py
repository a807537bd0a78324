"""One rank of a cluster job: all its output goes to a file of its own, then the `vmjepa` command runs.

Started by vmjepa.launch.node; `VMJEPA_ATTEMPT` names the folder of this attempt. The
trainer's own rank_N.log begins later, and has stderr alone.
"""

from __future__ import annotations

import os
from pathlib import Path

from vmjepa.run_dir import ATTEMPT


def output_of(rank: int, folder: Path) -> Path:
    """The file that holds what `rank` printed."""
    return folder / f"rank_{rank}.out"


def main() -> None:
    """Points stdout and stderr (also of C++ libraries) at the file, then runs the command line."""
    file = os.open(
        output_of(int(os.environ["RANK"]), Path(os.environ[ATTEMPT])), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644
    )
    for stream in (1, 2):
        os.dup2(file, stream)
    os.close(file)
    from vmjepa.cli import main as command

    command()


if __name__ == "__main__":
    main()
