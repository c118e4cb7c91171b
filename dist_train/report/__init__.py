"""What a trained network is worth: accuracy at every exit and at every budget, measured once per image and written down."""
