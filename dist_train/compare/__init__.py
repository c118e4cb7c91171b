"""Runs side by side: ``dist-train compare`` and the end of ``dist-train study``."""
