"""What tests of jobs of parts run in processes of their own, to be killed."""

import os
import sys
import time
import warnings
from pathlib import Path

from batch_fakes import FakeLLM

import aphrodite_jax.batch.preemption
import aphrodite_jax.llm
from aphrodite_jax.batch import open_parts, run_parts
from aphrodite_jax.cli import main
from aphrodite_jax.config import ModelConfig

assert ModelConfig().hf_text_config  # imports what takes longest, before processes fork


def run_command(argv, log, *, load_seconds=0.0, step_seconds=0.0, leaves_within=29.0):
    """Run the command ``aphrodite-jax``, and leave with its exit status.

    Args:
      log: a file for what it writes to stdout and stderr.
      load_seconds, step_seconds: of loading the model, and of each step.
      leaves_within: as of `Preemption`.
    """
    warnings.simplefilter("ignore")
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)

    class SlowLLM(FakeLLM):
        def __init__(self, model, **options):
            os.write(1, b"loading\n")
            time.sleep(load_seconds)
            super().__init__(Path(model))
            step = self.engine.step

            def slow_step(max_decode_steps):
                os.write(1, b"step\n" * (step_seconds > 1))
                time.sleep(step_seconds)
                return step(max_decode_steps)

            self.engine.step = slow_step

    aphrodite_jax.llm.LLM = SlowLLM
    aphrodite_jax.batch.preemption.Preemption.__init__.__defaults__ = (leaves_within,)
    sys.exit(main(argv))


def run_share(directory, share):
    """Answer the parts of worker I of N, or whatever is left."""
    warnings.simplefilter("ignore")
    llm = FakeLLM(directory / "model", step_seconds=0.004)
    job = open_parts(
        directory / "requests.jsonl", directory / "answers", model_config=llm.model_config, rows_per_part=16
    )
    run_parts(llm, job, range(share[0], job.num_units, share[1]) if share else None, show_progress=False)
    job.finish()


MODEL_OPTIONS = {"max_num_seqs": 2, "max_model_len": 64, "warm_up": False, "show_progress": False}


def run_shipped_model(pictures, output, prompt):
    """Ask the model that ships about the pictures of a folder."""
    llm = aphrodite_jax.llm.LLM(**MODEL_OPTIONS)
    job = open_parts(pictures, output, model_config=llm.model_config, prompt=prompt, max_tokens=6, rows_per_part=8)
    run_parts(llm, job, show_progress=False)
