"""The operator ``dist_train::exit_loss``: one kernel for CUDA, one for the CPU."""
