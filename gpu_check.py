"""Does it work on this GPU?  Numbers, kernels, memory, speed, scripts and ranks, beside what a CPU says, in minutes.

A line each: `ok`; `FAIL`, something is wrong; `slow`, right but far from what the card can do; `note`.  Where something
failed the exit code is 1.  The first thing on a new machine, and what a report of a fault should bring: it names all
versions.

    python gpu_check.py                            # one GPU; two ranks too where there are two
    python gpu_check.py --only numbers kernels     # some of its parts
    python gpu_check.py --device cpu               # what a CPU can: tries the check itself

Copy with: formats/ harness/ tools/ distributed.py lora.py lora_targets.py losses.py packed_attention.py
    packed_model.py packed_probe.py packing.py preference_data.py vision.py
"""

import time

from harness import endings, flags

PARTS = "machine kernels numbers pictures steps waits memory speeds scripts ranks".split()


def get_args(argv=None):
    parser = flags.Parser(__doc__)
    add = parser.group("what to check")
    add("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=f"some of: {', '.join(PARTS)}")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="what to check")
    return parser.parse_args(argv)


if __name__ == "__main__":
    ARGS = get_args()  # before torch is loaded, which takes seconds

import sys

from transformers.utils import logging

import distributed
from tools import gpu_load, gpu_numbers, gpu_runs
from tools.gpu_models import Report

CHECKS = {
    "machine": gpu_numbers.machine,
    "kernels": gpu_numbers.kernels,
    "numbers": gpu_numbers.numbers,
    "pictures": gpu_numbers.pictures,
    "steps": gpu_numbers.steps,
    "waits": gpu_numbers.waits,
    "memory": gpu_load.memory,
    "speeds": gpu_load.speeds,
    "scripts": gpu_runs.scripts,
    "ranks": gpu_runs.ranks,
}


def main(args):
    device = distributed.start(args.device).device  # with all that the scripts set for a GPU
    logging.set_verbosity_error()
    report, began = Report(), time.time()
    for part in args.only:
        print(f"-- {part}", flush=True)
        try:
            CHECKS[part](report, device)
        except Exception as error:  # the other parts are worth their answers still
            report.line("FAIL", part, f"{type(error).__name__}: {str(error)[:600]}")
    found = report.found
    counts = f"{found['ok']} ok, {found['FAIL']} failed, {found['slow']} slow, {found['note']} notes"
    print(f"{counts}, {time.time() - began:.0f} s")
    if found["FAIL"]:
        sys.exit(1)


if __name__ == "__main__":
    endings.run(main, ARGS)
