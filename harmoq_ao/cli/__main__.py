"""`python -m harmoq_ao.cli`."""

from harmoq_ao.cli import app

app()
