"""Stage 4: a prepared model becomes an integer one. Saving and loading.

Imports ``lowering``, ``preparation`` and what lies below them.
"""
