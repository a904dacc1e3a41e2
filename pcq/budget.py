"""Byte budgets: which levels each weight gets so that the file fits."""
