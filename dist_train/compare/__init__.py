"""Comparison of runs: ``dist-train compare`` and the end of ``dist-train study``."""
