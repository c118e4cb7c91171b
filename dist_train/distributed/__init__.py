"""The processes of a run: who they are, how they agree, and which one hangs."""
