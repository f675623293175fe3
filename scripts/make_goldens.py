"""Make or check the golden files of the parity tests with Hugging Face's own models. Needs torch.

    python scripts/make_goldens.py            # write tests/goldens/*.npz
    python scripts/make_goldens.py --check    # compute them again and compare

Each file holds a config, the seed of its weights (`tests/checkpoints.py` makes them from it), and prompts
with their media, float32 prefill logits and 32 greedy tokens. Seeds are searched until every greedy choice
is clear, so that equal tokens are a fair demand of other implementations. The cases are in `golden_cases`.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "scripts")]

import checkpoints  # noqa: E402
from golden_cases import Case, all_cases  # noqa: E402
from golden_files import GOLDENS, read_golden  # noqa: E402

transformers.utils.logging.disable_progress_bar()

NUM_GREEDY = 32
CLEAR_MARGIN = 0.01
"""Least distance of the best logit from the second best, at each greedy step."""
SAME = 1e-4
"""Largest difference of logits between a stored file and a new computation."""

UNLIKE_BY = 0.01


def make_prompt(case: Case, prompt: tuple, seed: int) -> dict:
    """Token ids with one placeholder an item, and the items; the last two of three items touch."""
    num_text, given, sizes = (*prompt, [])[:3]
    image_sizes = [(checkpoints.IMAGE_SIZE,) * 2] * given if isinstance(given, int) else given
    first_special = min([checkpoints.IMAGE_TOKEN, *case.special_tokens.values()])
    noise = checkpoints.uniform(f"text {num_text} {len(image_sizes)}", (num_text,), seed)
    tokens = [1, *(3 + ((noise[1:] + 1) / 2 * (first_special - 3)).astype(int)).tolist()]
    kinds = ["image"] * len(image_sizes) + ["video"] * len(sizes)
    placeholders = {"image": checkpoints.IMAGE_TOKEN, "video": case.config.get("video_token_id"), **case.placeholders}
    shift = 0
    for kind, position in zip(kinds, (3, 6, 7, 9), strict=False):
        before, behind = case.around.get(kind, ((), ()))
        item = [*before, placeholders[kind], *behind]
        tokens[position + shift : position + shift] = item
        shift += len(item) - 1
    return {
        "prompt": np.array(tokens, np.int32),
        "images": checkpoints.images_of(image_sizes, seed) if image_sizes else [],
        "videos": [checkpoints.video_of(size, seed + index) for index, size in enumerate(sizes)],
    }


def write_checkpoint(directory: Path, case: Case, seed: int) -> Path:
    return checkpoints.write_checkpoint(directory, case.config, seed, layout="memory", **described(case))


def described(case: Case) -> dict:
    """What `checkpoints.write_checkpoint` must know of a case beside its config; the golden keeps it."""
    return {
        "shapes": None if checkpoints.has_shapes(case.config) else reference_shapes(case.config),
        "files": dict(case.files),
        "special_tokens": dict(case.special_tokens),
        "hub_names": [list(rule) for rule in case.hub_names],
    }


def reference_shapes(config: dict) -> dict[str, list[int]]:
    """Name to shape of the tensors of Hugging Face's model; tied ones once."""
    hf_config = transformers.AutoConfig.for_model(**config)
    with torch.device("meta"):
        model = getattr(transformers, config["architectures"][0])._from_config(hf_config)
    seen: set[int] = set()
    shapes = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            shapes[name] = list(tensor.shape)
        seen.add(id(tensor))
    return shapes


def load_reference(directory: Path) -> torch.nn.Module:
    """The model as transformers loads it; every tensor of the file must be used, and none be missing."""
    config = transformers.AutoConfig.from_pretrained(directory)
    model_cls = getattr(transformers, config.architectures[0])
    model, info = model_cls.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    problems = {kind: names for kind, names in info.items() if names}
    if problems:
        raise SystemExit(f"transformers does not load {directory.name} cleanly: {problems}")
    return model.eval()


@torch.no_grad()
def run_reference(directory: Path, case: Case, prompt: dict) -> dict[str, np.ndarray]:
    """Expanded ids, prefill logits ``[T, V]``, greedy tokens, and the least margin of a greedy choice.

    The model is loaded anew for each prompt, and for each call where a rope scaling keeps state from one to the next.
    """
    expanded, keywords = case.reference_inputs(
        directory, prompt["prompt"].tolist(), list(prompt["images"]), list(prompt["videos"])
    )
    model = load_reference(directory)
    ids = torch.tensor([expanded], dtype=torch.long)
    logits = model(input_ids=ids, **keywords).logits[0].float().numpy()
    if case.config.get("rope_parameters", {}).get("rope_type") in ("dynamic", "longrope"):
        model = load_reference(directory)
    generation_config = transformers.GenerationConfig(
        do_sample=False,
        max_new_tokens=NUM_GREEDY,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    model.generation_config = transformers.GenerationConfig()
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=generation_config, **keywords
    )
    best = torch.topk(torch.cat(out.logits), 2).values
    tokens = out.sequences[0, len(expanded) :].numpy().astype(np.int32)
    assert len(tokens) == NUM_GREEDY
    return {
        "input_ids": np.array(expanded, np.int32),
        "logits": logits,
        "tokens": tokens,
        "margin": float((best[:, 0] - best[:, 1]).min()),
    }


def make_golden(name: str) -> dict[str, np.ndarray]:
    """The content of one file, by the first seed whose greedy choices are clear and not all the same.

    Nor is a token of an answer that of an item: in one call with the prompt it would stand for a row of one.
    """
    case = all_cases()[name]
    special = {checkpoints.IMAGE_TOKEN, *case.special_tokens.values()}
    for seed in range(200):
        golden = {"config": np.array(json.dumps(case.config)), "seed": np.array(seed)}
        golden["described"] = np.array(json.dumps(described(case)))
        margins, distinct = [], []
        with tempfile.TemporaryDirectory(prefix=name) as folder:
            directory = write_checkpoint(Path(folder), case, seed)
            for index, given in enumerate(case.prompts):
                prompt = make_prompt(case, given, seed)
                answer = run_reference(directory, case, prompt)
                if index == len(case.prompts) - 1 and case.unlike is not None:
                    require_other_logits(directory, case, prompt, answer["logits"])
                golden |= {f"{index}.{key}": value for key, value in stored_form(prompt).items()}
                golden |= {f"{index}.{key}": answer[key] for key in ("input_ids", "logits", "tokens")}
                has_media = len(prompt["images"]) + len(prompt["videos"])
                margins.append(-1 if has_media and special & set(answer["tokens"].tolist()) else answer["margin"])
                distinct.append(len(set(answer["tokens"].tolist())))
                if margins[-1] < CLEAR_MARGIN or distinct[-1] < 5:
                    break  # this seed is none
        if min(margins) >= CLEAR_MARGIN and min(distinct) >= 5:
            print(f"{name}: seed {seed}, least margin {min(margins):.3f}, distinct tokens {distinct}")
            return golden
    raise SystemExit(f"{name}: no seed gives clear greedy choices")


def stored_form(prompt: dict) -> dict[str, np.ndarray]:
    """Images of one size as one array; those of different sizes, and videos, an array each (`golden_files`)."""
    stored = {f"video{index}": video for index, video in enumerate(prompt["videos"])} | {"prompt": prompt["prompt"]}
    images = prompt["images"]
    if len({image.shape for image in images}) <= 1:
        empty = np.zeros((0, checkpoints.IMAGE_SIZE, checkpoints.IMAGE_SIZE, 3), np.uint8)
        return stored | {"images": np.stack(images) if len(images) else empty}
    return stored | {f"image{index}": image for index, image in enumerate(images)}


def require_other_logits(directory: Path, case: Case, prompt: dict[str, np.ndarray], logits) -> None:
    (directory / "config.json").write_text(json.dumps(case.unlike))
    other = run_reference(directory, case, prompt)["logits"]
    (directory / "config.json").write_text(json.dumps(case.config))
    distance = np.abs(other - logits).max()
    if distance < UNLIKE_BY:
        raise SystemExit(f"{directory.name}: what the case is about moves logits by {distance:.1e} only")


def check_golden(name: str) -> float:
    """Largest difference of logits between the stored file and a new computation.

    Raises:
      AssertionError: another config or other prompts are stored, or the greedy tokens differ.
    """
    golden, case = read_golden(name), all_cases()[name]
    assert golden.config == json.loads(json.dumps(case.config)), f"{name}: another config is stored; make it again"
    assert golden.described == json.loads(json.dumps(described(case))), f"{name}: another checkpoint is stored"
    worst = 0.0
    with tempfile.TemporaryDirectory(prefix=name) as folder:
        directory = write_checkpoint(Path(folder), case, golden.seed)
        for given, prompt in zip(case.prompts, golden.prompts, strict=True):
            made = make_prompt(case, given, golden.seed)
            np.testing.assert_array_equal(prompt.prompt, made["prompt"], err_msg=f"{name}: prompt")
            for field in ("images", "videos"):
                for stored, item in zip(getattr(prompt, field), made[field], strict=True):
                    np.testing.assert_array_equal(stored, item, err_msg=f"{name}: {field}")
            answer = run_reference(directory, case, made)
            for field in ("input_ids", "tokens"):
                np.testing.assert_array_equal(answer[field], getattr(prompt, field), err_msg=f"{name}: {field}")
            worst = max(worst, float(np.abs(answer["logits"] - prompt.logits).max()))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="cases; all of them by default")
    parser.add_argument("--check", action="store_true", help="compare with the stored files")
    args = parser.parse_args()
    GOLDENS.mkdir(exist_ok=True)
    cases = all_cases()
    for name in args.names or cases:
        if args.check:
            worst = check_golden(name)
            print(f"{name}: logits differ by {worst:.1e}")
            if worst > SAME:
                raise SystemExit(f"{name}: that is more than {SAME:.0e}")
        else:
            np.savez_compressed(GOLDENS / f"{name}.npz", **make_golden(name))
    stray = sorted(file.name for file in GOLDENS.glob("*.npz") if file.stem not in cases)
    if stray:
        raise SystemExit(f"{GOLDENS} holds files of no case: {', '.join(stray)}")
    print(f"{sum(file.stat().st_size for file in GOLDENS.glob('*.npz')) / 1e6:.2f} MB in {GOLDENS}")


if __name__ == "__main__":
    main()
