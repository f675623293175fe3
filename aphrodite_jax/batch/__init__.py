"""Jobs: an OpenAI batch file in, its answers out, over as many runs as it takes.

from aphrodite_jax import LLM
from aphrodite_jax.batch import run_batch

report = run_batch(LLM(), "requests.jsonl", "answers.jsonl")
"""

from aphrodite_jax.batch.job import BatchReport, Job, open_job
from aphrodite_jax.batch.run import answer_job, run_batch

__all__ = ["BatchReport", "Job", "answer_job", "open_job", "run_batch"]
