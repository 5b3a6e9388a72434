"""Comparing penalties on a task: at equal epochs, at equal gradient evaluations, over seeds, with a report."""
