"""Exact-match accuracy of the shipped model through `LLM.generate`, greedy, on pictures that it never saw.

    python scripts/evaluate_tiny_llava.py [--model DIRECTORY] [--limit N]

Prints the share of answers that are right word for word: all questions of easy-vqa's official test split, and
"which digit is this?" for the held-out fifth of scikit-learn's handwritten digits. Needs the extra ``test``.
"""

import argparse
import collections

import tiny_llava_data as data

from aphrodite_jax import LLM, SamplingParams


def ask_all(llm: LLM, asked: list[tuple[data.Picture, str, str]]) -> list[str]:
    """The answer to each ``(picture, question, answer)``."""
    prompts = [
        {"prompt": f"USER: <image>\n{question} ASSISTANT:", "multi_modal_data": {"image": picture.image()}}
        for picture, question, _ in asked
    ]
    outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=16), on_error="raise")
    return [output.outputs[0].text for output in outputs]


def report(name: str, llm: LLM, asked: list[tuple[data.Picture, str, str]]) -> float:
    """Print and return the share of exact answers, with the most frequent mistakes."""
    answers = ask_all(llm, asked)
    wrong = collections.Counter(
        (answer, given) for (_, _, answer), given in zip(asked, answers, strict=True) if given != answer
    )
    accuracy = 1 - wrong.total() / len(asked)
    print(f"{name}: {100 * accuracy:.2f}% of {len(asked)} answers exact", flush=True)
    for (answer, given), count in wrong.most_common(5):
        print(f"  {count} x {given!r} for {answer!r}", flush=True)
    return accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="directory of another model; the shipped one by default")
    parser.add_argument("--limit", type=int, help="ask only so many questions of each kind, evenly spread")
    parser.add_argument("--max-num-seqs", type=int, default=64)
    args = parser.parse_args()
    llm = LLM(args.model, max_num_seqs=args.max_num_seqs, max_model_len=128, max_num_batched_tokens=1024)
    shapes = [(p, question, answer) for p in data.load_shapes("test") for question, answer in p.asked]
    digits = [(p, "which digit is this?", str(p.digit)) for p in data.load_digits("test")]
    for name, asked in (("easy-vqa, official test split", shapes), ("held-out handwritten digits", digits)):
        step = 1 if args.limit is None else max(1, len(asked) // args.limit)
        report(name, llm, asked[::step])


if __name__ == "__main__":
    main()
