"""A trained network for use without torch and without this project: programs, policy and a runner in a folder."""
