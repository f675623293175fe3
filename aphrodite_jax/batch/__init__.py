"""Jobs: many rows in, their answers out, over as many runs as it takes.

An OpenAI batch file to one file in the same order:

from aphrodite_jax import LLM
from aphrodite_jax.batch import run_batch

report = run_batch(LLM(), "requests.jsonl", "answers.jsonl")

Any form of input to a directory of parts, which several runs may share:

from aphrodite_jax.batch import open_parts, run_parts

llm = LLM()
job = open_parts("pictures/", "answers/", model_config=llm.model_config, prompt="What is this?")
report = run_parts(llm, job)
job.finish()
"""

from aphrodite_jax.batch.job import BatchReport, Job, open_job
from aphrodite_jax.batch.parts import PartsJob, PartsReport, open_parts
from aphrodite_jax.batch.run import answer_job, run_batch
from aphrodite_jax.batch.run_parts import run_parts

__all__ = [
    "BatchReport",
    "Job",
    "PartsJob",
    "PartsReport",
    "answer_job",
    "open_job",
    "open_parts",
    "run_batch",
    "run_parts",
]
