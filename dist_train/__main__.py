"""`python -m dist_train` is `dist-train`; the deepspeed launcher starts it so."""

from dist_train.cli import main

if __name__ == "__main__":
    main()
