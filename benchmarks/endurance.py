"""Throughput and memory of one engine over ten thousand requests in one process: neither may drift.

    python benchmarks/endurance.py                    # about ten minutes
    python benchmarks/endurance.py --requests 2000

Requests have an image of their own and short answers, and are handed over in parts of a tenth; each part has the same
lengths of answers. Memory is the resident set of the engine's process at the end of a part. The last line of stdout is
the result as JSON: the throughput of the last part over that of the first after a warm-up part, and memory at the end
over memory after the first part.
"""

import argparse
import json

import numpy as np
from workers import WARM_UP, add_options, machine, requests, say, workers

PARTS = 10
LONGEST_ANSWER = 8


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000)
    add_options(parser, engines=("ours",))
    options = parser.parse_args()
    lengths = np.random.default_rng(1521).integers(1, LONGEST_ANSWER + 1, options.requests // PARTS).tolist()
    with workers(options) as (engine,):
        engine.call("generate", requests=requests(lengths[:200], WARM_UP))
        print(f"{'requests':>9} {'requests/s':>11} {'step ms':>8} {'plan':>6} {'MiB':>6}")
        rows = []
        before = engine.call("stats")
        for part in range(PARTS):
            seconds = engine.call("generate", requests=requests(lengths, part))["seconds"]
            after = engine.call("stats")
            steps, step, plan = (after[name] - before[name] for name in ("steps", "step", "plan"))
            row = {
                "requests": (part + 1) * len(lengths),
                "requests_per_second": round(len(lengths) / seconds, 2),
                "step_ms": round(step / steps * 1e3, 2),
                "plan_share": round(plan / step, 4),
                "rss_mib": engine.memory()["rss_mib"],
            }
            print("{:9} {:11.2f} {:8.2f} {:6.1%} {:6}".format(*row.values()), flush=True)
            say(f"part {part + 1} of {PARTS} done")
            rows.append(row)
            before = after
        where = machine([engine])
    first, last = rows[0], rows[-1]
    result = {
        "benchmark": "endurance",
        "checkpoint": options.checkpoint,
        "requests": last["requests"],
        "last_over_first_throughput": round(last["requests_per_second"] / first["requests_per_second"], 3),
        "last_over_first_memory": round(last["rss_mib"] / first["rss_mib"], 3),
        "late_compiles": after["late_compiles"],
        "parts": rows,
        "machine": where,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
