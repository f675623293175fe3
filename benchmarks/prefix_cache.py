"""Eight questions about each of 16 images behind one long system prompt, with and without the caches of prefixes.

    python benchmarks/prefix_cache.py                          # about five minutes
    python benchmarks/prefix_cache.py --system-prompt 1024 --questions 4 --images 32

Requests are handed over at once, image after image. The two engines differ in ``LLM(prefix_caching=...)`` alone. Each
repeat has a system prompt and images of its own, so that nothing is cached when it begins; repeats take turns, start-up
and one warm-up run are not counted, times are medians. The engine counts the prompt tokens that it had to compute. The
last line of stdout is the result as JSON.
"""

import argparse
import json
import statistics

from workers import QUESTIONS, WARM_UP, add_options, machine, numbered, say, workers

VARIANTS = {"with": {"prefix_caching": True}, "without": {"prefix_caching": False}}
COUNTS = ("prompt_tokens", "prompt_tokens_computed", "media_encoded")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--questions", type=int, default=8, help=f"about each image, at most {len(QUESTIONS)}")
    parser.add_argument("--system-prompt", type=int, default=512, help="its characters; tokens of the checkpoint small")
    parser.add_argument("--output-tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    add_options(parser, engines=("ours",))
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    counts: dict[str, dict[str, int]] = {}
    equal: list[bool] = []
    with workers(options, variants=VARIANTS) as started:
        for repeat, called in numbered(options.repeats):
            tokens = []
            for worker in started:
                before = worker.call("stats")
                answer = worker.call("generate", requests=questions(options, repeat))
                after = worker.call("stats")
                say(f"{called}: {worker.setting}: {answer['seconds']:.2f} s")
                tokens.append(answer["tokens"])
                if repeat != WARM_UP:
                    seconds[worker.setting].append(answer["seconds"])
                    counts[worker.setting] = {name: after[name] - before[name] for name in COUNTS}
            equal += [a == b for a, b in zip(*tokens, strict=True)]
        where = machine(started)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    computed = {name: found["prompt_tokens_computed"] for name, found in counts.items()}
    print(f"{options.questions} questions about each of {options.images} images, checkpoint {options.checkpoint}")
    print(f"{'caches':8} {'seconds':>8} {'prompt tokens':>14} {'computed':>9} {'images encoded':>15}")
    for name, found in counts.items():
        print(f"{name:8} {medians[name]:8.2f} {found[COUNTS[0]]:14} {found[COUNTS[1]]:9} {found[COUNTS[2]]:15}")
    result = {
        "benchmark": "prefix_cache",
        "checkpoint": options.checkpoint,
        "requests": options.images * options.questions,
        "speedup": round(medians["without"] / medians["with"], 3),
        "computed_share": round(computed["with"] / computed["without"], 4),
        "equal_answers": round(statistics.mean(equal), 4),
        "counts": counts,
        "seconds": {name: [round(time, 3) for time in times] for name, times in seconds.items()},
        "machine": where,
    }
    print(json.dumps(result))


def questions(options: argparse.Namespace, repeat: int) -> list[dict]:
    """All requests of a repeat."""
    rule = f"You are careful. You look at the picture of set {repeat} before you answer, and you answer in few words. "
    system = (rule * (1 + options.system_prompt // len(rule)))[: options.system_prompt]
    return [
        {
            "text": f"{system} USER: <image>\n{question} ASSISTANT:",
            "images": [repeat * 1000 + image],
            "max_tokens": options.output_tokens,
        }
        for image in range(options.images)
        for question in QUESTIONS[: options.questions]
    ]


if __name__ == "__main__":
    main()
