"""Starting a run: on this machine, on hosts over ssh, on SLURM."""
