"""Time to the first token and between tokens at 1 to 64 requests in flight, beside vLLM, and transformers at 1.

    python benchmarks/latency.py                                      # ours, and transformers
    python benchmarks/latency.py --vllm-python VENV/bin/python        # and vLLM; offline_throughput.py sets it up
    python benchmarks/latency.py --only ours --in-flight 1,64 --repeats 1

Requests are those of `offline_throughput`; a new one begins when one ends, so that prompts arrive while others' answers
grow. Twice as many are asked as are in flight, and eight at least. Times are in milliseconds; the first token's counts
from when its request was handed over, with the work on its image. "per token" is the median over requests of the time
from the first token to the last over the tokens between; "gap" is the wait from one piece of an answer to the next, of
one token or more. Start-up and one warm-up run are not counted; repeats take turns; each number is the median over
repeats. The last line of stdout is the result as JSON.
"""

import argparse
import json
import statistics

from workers import WARM_UP, add_options, machine, mixed_lengths, numbered, requests, say, workers

COLUMNS = ("first_token_p50", "first_token_max", "per_token_p50", "gap_p50", "gap_p99", "tokens_per_second")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--in-flight", default="1,4,16,64", help="numbers of requests in flight")
    parser.add_argument("--repeats", type=int, default=3)
    add_options(parser, engines=("ours", "transformers", "vllm"))
    options = parser.parse_args()
    levels = [int(level) for level in options.in_flight.split(",")]
    found: dict[tuple[int, str], list[dict]] = {}
    with workers(options) as started:
        for repeat, called in numbered(options.repeats):
            for level in levels:
                lengths = mixed_lengths(max(8, 2 * level))
                asked = requests(lengths, repeat)
                for worker in started:
                    if worker.name == "transformers" and level > 1:
                        continue  # a batch that runs takes in no other request
                    times = worker.call("latency", requests=asked, in_flight=level)
                    times["tokens_per_second"] = round(sum(lengths) / times.pop("seconds"), 1)
                    say(f"{called}: {level}: {worker.label}: {times}")
                    if repeat != WARM_UP:
                        found.setdefault((level, worker.label), []).append(times)
        where = machine(started)
    table: dict[int, dict[str, dict[str, float]]] = {level: {} for level in levels}
    for (level, name), repeats in found.items():
        table[level][name] = {column: statistics.median(times[column] for times in repeats) for column in COLUMNS}
    print(f"milliseconds; checkpoint {options.checkpoint}; {where['processor']}")
    print(f"{'in flight':>9}  {'engine':34}" + "".join(f"{column.replace('_', ' '):>19}" for column in COLUMNS))
    for level, rows in table.items():
        for name, row in rows.items():
            print(f"{level:9}  {name:34}" + "".join(f"{row[column]:19.1f}" for column in COLUMNS))
    print(json.dumps({"benchmark": "latency", "checkpoint": options.checkpoint, "in_flight": table, "machine": where}))


if __name__ == "__main__":
    main()
