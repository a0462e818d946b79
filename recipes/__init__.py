"""Runnable studies: the demonstration, the architecture coverage table, tables and figures.

Imports any room but ``cli``.
"""
