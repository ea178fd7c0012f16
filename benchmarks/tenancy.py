"""Many functions on one box: what several lanes and devices are worth, what tenants can take from each other, what is in time.

Every time is taken through the public interface: a `trunkline serve` for each variant, clients in this process that ask again and
again. Variants take turns in short blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from benchmarks.devices_bench import devices
from benchmarks.fairness_bench import deadlines, neighbours
from benchmarks.lanes_bench import lanes
from benchmarks.report import Report, arguments
from benchmarks.tenancy_bench import TenancyBench

# In the order in which they are measured.
SECTIONS: Mapping[str, Callable[[TenancyBench], None]] = {
    "neighbours": neighbours,
    "deadlines": deadlines,
    "lanes": lanes,
    "devices": devices,
}


def main() -> None:
    chosen = arguments(__doc__ or "")
    report = Report("tenancy", chosen.quick, chosen.device)
    with TenancyBench(report, chosen.seed) as bench:
        for section in SECTIONS.values():
            section(bench)
    if chosen.device == "cpu":
        report.lack("run with --device cuda:0", "all of it on a GPU")
    report.finish(chosen.json)


if __name__ == "__main__":
    main()
