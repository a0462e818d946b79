"""Runnable studies: the demonstration, the architecture coverage table, tables and figures."""
