"""What a GPU can show: MFU, decoding with CUDA graphs, chunked scoring, and prompts read with KV memories.

    make bench-gpu [ONLY="mfu decoding scoring prefill-snapkv …"] [OUTPUT=runs/gpu] [REHEARSE=1]

Each measurement writes OUTPUT/NAME.json when it has ended. If that file exists, its result is printed and not measured
again. So the same call resumes a call that was stopped, and deleting a file measures it again. If one
fails, its error is printed, the others are still measured, and the exit code is 1.
"""

from __future__ import annotations

import functools
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.gpu import decoding, mfu, prefill, scoring
from bench.gpu.machine import free, need_device
from sinkmodel.console import command, put, say
from sinkmodel.errors import UserError
from sinkmodel.files import read_json, write_json
from sinkmodel.parser import OneLineParser, path_of

Measurement = tuple[Callable[[], dict[str, Any]], Callable[[dict[str, Any]], str]]
MEASUREMENTS: dict[str, Measurement] = {
    "mfu": (mfu.measure, mfu.show),
    "decoding": (decoding.measure, decoding.show),
    "scoring": (scoring.measure, scoring.show),
    **{f"prefill-{name}": (functools.partial(prefill.measure, name), prefill.show) for name in prefill.MEMORIES},
}


@command("bench.gpu")
def main(argv: list[str]) -> int:
    parser = OneLineParser("bench.gpu", __doc__ or "", "example: python -m bench.gpu scoring --output runs/gpu")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(MEASUREMENTS)} (default: all)")
    parser.add_argument("--output", type=path_of, required=True, help="folder of the results")
    options = parser.parse_args(argv)
    for name in options.names:
        if name not in MEASUREMENTS:
            raise UserError(f"there is no measurement {name!r}; choose among {', '.join(MEASUREMENTS)}")
    need_device()
    options.output.mkdir(parents=True, exist_ok=True)
    failed = [name for name in options.names or MEASUREMENTS if not shown(name, options.output / f"{name}.json")]
    if failed:
        say(f"failed: {', '.join(failed)}; the same command measures them again")
    return 1 if failed else 0


def shown(name: str, file: Path) -> bool:
    """Measure unless there is a result, and print it. False if the measurement failed."""
    measure, show = MEASUREMENTS[name]
    try:
        if not file.exists():
            write_json(file, measure())
        put(show(read_json(file)))
        return True
    except Exception:
        say(f"{name}: failed\n{traceback.format_exc()}")
        free()
        return False


if __name__ == "__main__":
    sys.exit(main())
