"""The process of one row: reads what to measure from stdin, writes its figures to stdout, and all else to stderr."""

from __future__ import annotations

import json
import os
import re
import sys
import traceback
from typing import Any

import torch
from timing import ON_GPU

from . import measures
from .case import Case

OUT_OF_MEMORY = "out of memory"


def described() -> dict[str, Any]:
    """The device: its name, and the bytes of its memory."""
    if not ON_GPU:
        return {"device": "CPU", "bytes": 0}
    return {"device": torch.cuda.get_device_name(), "bytes": torch.cuda.mem_get_info()[1]}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Figures of the case of a request, or the reason why there are none. Without a case: ``described``."""
    if "case" not in request:
        return described()
    if ON_GPU and request["allocatable"]:
        share = request["allocatable"] / torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(min(share, 1.0))
    try:
        return measures.figures(Case.of(request["case"]))
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        return {"failed": reason(error)}


def reason(error: BaseException) -> str:
    """Why a row cannot be measured. Memory runs out in libraries, too, which raise what they like."""
    if isinstance(error, torch.OutOfMemoryError) or re.search("out of memory|ALLOC_FAILED", str(error)):
        return OUT_OF_MEMORY
    first_line = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first_line}"


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    line = sys.stdin.readline()
    if line:
        answers.write(json.dumps(answer(json.loads(line))) + "\n")
        answers.flush()
    sys.stderr.flush()
    os._exit(0)  # threads and processes of compilers do not always end by themselves


if __name__ == "__main__":
    main()
