"""torchrun, for several processes on a CPU: a process that fails says why itself, and nothing is added.

python -m align.training.borders.torchrun [torchrun's own options] -m align.sft RECIPE
"""

from __future__ import annotations

import logging
import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run


def main() -> None:
    """Exits with the status of the process that failed first; 1 if a signal ended it, which is said here."""
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        run(parse_args(sys.argv[1:]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            print(f"process {rank} (pid {failure.pid}) was ended by {failure.signal_name()}", file=sys.stderr)
        raise SystemExit(max(failure.exitcode, 1)) from None


if __name__ == "__main__":
    main()
